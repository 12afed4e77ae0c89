"""The model card that `adakd train` writes beside the model: what was distilled into what, how, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainerState

from ..trainer.adapters import is_adapter_folder
from ..trainer.citation import CITATION
from ..trainer.config import DATA_OPTIONS
from ..trainer.methods import METHODS
from .models import RunModels, lines_to_try
from .options import ADAPTERS, CHOICE, RunOptions, method_options

__all__ = ["write_model_card"]

ROWS = 20
"""Log lines in the table of the share at most."""


def write_model_card(
    options: RunOptions,
    models: RunModels,
    config: Any,
    tokenizer: Any,
    state: TrainerState,
    records: int,
) -> None:
    """Write README.md into `output_dir`.

    Args:
        options: models and data of the run.
        models: which of these models it took.
        config: its other options.
        tokenizer: of both models.
        state: that of the trainer at the end.
        records: number of records that were trained on.
    """
    path = Path(str(config.output_dir)) / "README.md"
    adapter = is_adapter_folder(path.parent)
    trained_on = str(models.base or options.student)
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        # The hub accepts names of its own only.
        base_model=None if Path(trained_on).is_dir() else trained_on,
        tags=["knowledge-distillation", "adakd", "generated_from_trainer"],
    )
    method = {name: getattr(options, name) for name in CHOICE[:2]} if options.method else {}
    method |= {name: getattr(config, name) for name in method_options(type(config))}
    data_options = [name for name in DATA_OPTIONS if hasattr(config, name) and name != "dataset_num_proc"]
    if options.on_policy:
        limit = f"prompts, with completions of at most {config.max_completion_length} tokens"
        data_options = ["temperature", "top_p", "top_k", "use_vllm"]
        unused = ["beta"] if config.divergence else ["divergence", "divergence_kwargs"]
        method = {name: value for name, value in method.items() if name not in unused}
    else:
        limit = f"records of at most {config.max_length} tokens"
    training = {
        name: getattr(config, name)
        for name in ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
                     "world_size", "seed")
    }  # fmt: skip
    lora = {name: value for name in ADAPTERS if (value := getattr(options, name))}
    steps: dict[str, Any] = {"steps": state.global_step}
    if config.load_best_model_at_end and state.best_global_step:
        steps[f"step of this model, whose {config.metric_for_best_model} is the best"] = state.best_global_step
    logs = state.log_history
    train = [log for log in logs if "loss" in log and "focus_ratio" in log]
    last = next((log for log in reversed(logs) if "eval_loss" in log), {})
    evaluated = {
        name: value
        for name, value in last.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))
    }
    sections = [
        f"# {path.parent.resolve().name}",
        f"{_subject(options, models, adapter)} {_method(options)} by `adakd train`.",
        f"```python\n{lines_to_try(str(config.output_dir), tokenizer)}```",
        f"## Data\n\n`{options.train_file}`: {records} {limit}."
        + (f" Evaluated on `{options.eval_file}`." if options.eval_file else "")
        + f"\n\n{_list({name: getattr(config, name) for name in data_options})}",
        "## Loss\n\n" + _list(method),
        *(["## Adapter\n\n" + _list(lora)] if lora else []),
        f"## Training\n\n{_list({**steps, **training})}",
        "## Share of the tokens that are selected\n\n" + _table(train),
        "## Evaluation\n\n" + (_list(evaluated) if evaluated else "None: no eval_file was given."),
        f"## Citation\n\n```bibtex\n{CITATION}```\n",
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections)).save(path)


def _subject(options: RunOptions, models: RunModels, adapter: bool) -> str:
    """What was distilled from what."""
    base = f"`{models.base or options.student}`"
    student = f"An adapter for {base}" if adapter else f"{base} with an adapter merged in" if models.adapted else base
    began = "" if models.base is None else f" that began as `{options.student}`"
    teacher = f"{base} itself" if models.teacher is None else f"`{options.teacher}`"
    return f"{student}{began}, distilled from {teacher}"


def _method(options: RunOptions) -> str:
    """What it was distilled with."""
    adakd = "token-adaptive knowledge distillation (AdaKD, [arXiv 2510.11615](https://arxiv.org/abs/2510.11615))"
    used = [f"{options.method} ({METHODS[options.method].title})"] if options.method else []
    return "with " + " and ".join(used + [adakd] * options.adakd or ["its loss on every token"])


def _list(values: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {_shown(value)}" for name, value in values.items())


def _table(logs: Sequence[dict[str, float]]) -> str:
    """Step, share and loss of evenly spaced log lines, the last one among them."""
    every = -(-len(logs) // ROWS) or 1
    rows = [f"| {log['step']} | {log['focus_ratio']:.3f} | {log['loss']:.4g} |" for log in logs[::-1][::every][::-1]]
    return "\n".join(["| step | share | loss |", "| ---: | ---: | ---: |", *rows])


def _shown(value: Any) -> str:
    value = getattr(value, "value", value)  # an enumeration
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"`{value}`" if isinstance(value, (str, dict, list)) else str(value)
