"""`adakd train`: options from a YAML file and flags, records and models from disk or the hub, then a trainer."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import CommandError, is_disk_full

try:
    import yaml  # noqa: F401
except ImportError as error:
    raise CommandError(f"a training run needs pyyaml: pip install 'adakd-kernels[train]' ({error})") from error
try:
    from ..integrations.transformers import (
        AdaKDTrainer,
        check_same_tokenizer,
        last_checkpoint,
    )
    from ..trainer.loading import load_for
except ImportError as error:
    raise CommandError(str(error)) from error

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from ..trainer.adapters import check_checkpoint, is_adapter_folder, load_student, save_merged
from ..trainer.evaluation import MEASURES
from ..trainer.sharded import load_teacher
from .interruption import Interruption
from .model_card import write_model_card
from .models import RunModels, lines_to_try, load, lora_config, quantization
from .options import RunOptions, parse

STATE = "trainer_state.json"
"""What `Trainer` writes last into a checkpoint, and this command last into `output_dir`."""


def run(argv: list[str]) -> int:
    """Train, save the model, its tokenizer and a model card in `output_dir`, and print a line of metrics.

    Raises:
        CommandError: options, data, models or a checkpoint that cannot be used, or what the machine refuses.
    """
    # From peft's own call, in every run with an adapter.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    options, config = parse(argv)
    code = _train(options, config)
    # The trainer must be gone before the process group is destroyed. Otherwise DistributedDataParallel is the last to
    # hold the group, and freeing it there sometimes hangs (torch 2.13, gloo).
    gc.collect()
    PartialState().destroy_process_group()
    return code


def _train(options: RunOptions, config: TrainingArguments) -> int:
    """The run itself; the exit code."""
    _check_loggers(config)
    _check_evaluation(options, config)
    resume = _checkpoint(config)
    _check_output_dir(config)
    finished = _finished(resume, config)
    merge_now = options.merge_adapter and is_adapter_folder(str(config.output_dir))
    if finished is not None and _steps_saved(config) >= finished.global_step and not merge_now:
        _say(config, f"nothing to do: the run in {config.output_dir} has all its {finished.global_step} steps")
        return 0
    models = RunModels.find(options)
    trainer, records = _trainer(options, models, config, resume, finished)
    interruption = Interruption(config.world_size)
    try:
        if finished is None:
            metrics = _fit(trainer, interruption, resume)
            if interruption.requested:
                return _interrupted(config)
        else:
            finished.is_world_process_zero = trainer.is_world_process_zero()
            trainer.state, metrics = finished, {}
        _finish(trainer, options, models, config, metrics, records)
    except KeyboardInterrupt:
        return _interrupted(config)
    except Exception as error:
        if interruption.requested and not is_disk_full(error):
            return _interrupted(config)  # such as a worker of the data loader that Ctrl-C has ended
        explained = _explained(error, trainer, config)
        if explained is None:
            raise
        raise explained from error
    return 0


def _fit(trainer: Any, interruption: Interruption, resume: str | None) -> dict[str, Any]:
    """Train; the metrics of it.

    Raises:
        CommandError: a checkpoint that cannot be resumed from.
    """
    trainer.add_callback(interruption)
    try:
        with interruption:
            result = trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        if resume is None or interruption.started or is_disk_full(error):
            raise
        if str(error).startswith(f"checkpoint {resume} "):  # `check_checkpoint` says it all
            raise CommandError(str(error)) from error
        raise CommandError(f"checkpoint {resume}: cannot be resumed from: {type(error).__name__}: {error}") from error
    return {"focus_ratio": float(trainer.loss_fn.focus_ratio), **result.metrics}


def _finish(
    trainer: Any,
    options: RunOptions,
    models: RunModels,
    config: TrainingArguments,
    metrics: dict[str, Any],
    records: int,
) -> None:
    """Save the model first, then evaluate, and say what there is and how to use it."""
    trainer.save_model()
    if options.eval_file:
        metrics = {**metrics, **trainer.evaluate()}
    trainer.save_metrics("all", metrics, combined=False)
    if options.merge_adapter and trainer.is_world_process_zero():
        save_merged(trainer.model, str(config.output_dir))  # last, because the trainer's student is gone afterwards
    if trainer.is_world_process_zero():
        write_model_card(options, models, config, trainer.processing_class, trainer.state, records)
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(json.dumps({"output_dir": config.output_dir, "steps": trainer.state.global_step, **metrics}))
    what = "adapter" if is_adapter_folder(str(config.output_dir)) else "model"
    _say(
        config,
        f"the {what} is in {config.output_dir}. To try it:\n\n"
        + lines_to_try(str(config.output_dir), trainer.processing_class),
    )


def _say(config: TrainingArguments, text: str) -> None:
    """Print on stderr what is no error; stdout is for numbers. In one process only."""
    if config.should_log:
        print(f"adakd train: {text.rstrip()}", file=sys.stderr)


def _interrupted(config: TrainingArguments) -> int:
    _say(config, f"interrupted; {_resumable(config)}")
    return 130


def _resumable(config: TrainingArguments) -> str:
    """What can be resumed, for the end of a message."""
    last = last_checkpoint(str(config.output_dir))
    if last is None:
        return "there is no checkpoint to resume from"
    if config.save_only_model:
        return f"{last} holds the model alone (save_only_model), which a new run can take as its student"
    return f"'--resume_from_checkpoint last' goes on from {last}"


def _explained(error: Exception, trainer: Any, config: TrainingArguments) -> CommandError | None:
    """An error of a running trainer as one line, if it is one that the user can do something about."""
    if isinstance(error, FloatingPointError):
        return CommandError(f"{error}; the last checkpoint is {last_checkpoint(str(config.output_dir))}", exit_code=1)
    if isinstance(error, torch.OutOfMemoryError):
        return CommandError(
            "the device has no memory left: lower per_device_train_batch_size (and raise "
            f"gradient_accumulation_steps) or max_length; {_resumable(config)}"
        )
    if is_disk_full(error):
        # What was being written is of no use, and takes the room that logs need.
        partial = Path(str(config.output_dir)) / f"checkpoint-{trainer.state.global_step}"
        if config.should_save and not (partial / STATE).exists():
            shutil.rmtree(partial, ignore_errors=True)
        return CommandError(f"no space left on the disk of {config.output_dir}: {error}; {_resumable(config)}")
    return None


def _checkpoint(config: TrainingArguments) -> str | None:
    """The checkpoint to resume from, or None to start a new run."""
    last = last_checkpoint(str(config.output_dir))
    wanted = config.resume_from_checkpoint
    if wanted is None:
        if last is not None:
            raise CommandError(
                f"output_dir {config.output_dir} holds checkpoints of an earlier run: give "
                "--resume_from_checkpoint last to continue it, or another --output_dir"
            )
        return None
    if wanted == "last":
        if last is None:
            raise CommandError(f"output_dir {config.output_dir} has no complete checkpoint to resume from")
        return last
    if not (Path(wanted) / STATE).is_file():
        raise CommandError(f"checkpoint {wanted}: no checkpoint of a trainer: {STATE} is missing")
    return str(wanted)


def _finished(checkpoint: str | None, config: TrainingArguments) -> TrainerState | None:
    """The state in a checkpoint that has all steps of the run; `Trainer` would train one more.

    Raises:
        CommandError: its state cannot be read.
    """
    if checkpoint is None:
        return None
    try:
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"checkpoint {checkpoint}: {STATE} cannot be read: {error}") from error
    if config.max_steps > 0:
        return state if state.global_step >= config.max_steps else None
    return state if (state.epoch or 0.0) >= config.num_train_epochs else None


def _steps_saved(config: TrainingArguments) -> int:
    """Steps of the model in `output_dir` itself, 0 if there is none that was saved to its end."""
    try:
        return int(TrainerState.load_from_json(str(Path(str(config.output_dir)) / STATE)).global_step)
    except (OSError, ValueError, TypeError):
        return 0


def _check_output_dir(config: TrainingArguments) -> None:
    """Make `output_dir` and write a file there, before hours of training want to.

    Raises:
        CommandError: the system refuses.
    """
    if not config.should_save:
        return
    try:
        os.makedirs(str(config.output_dir), exist_ok=True)
        with tempfile.TemporaryFile(dir=config.output_dir) as file:
            file.write(b"\0")
    except OSError as error:
        raise CommandError(f"output_dir {config.output_dir}: cannot be written to: {error.strerror}") from None


def _check_evaluation(options: RunOptions, config: TrainingArguments) -> None:
    """Refuse evaluations without data, and a measure of the best model that no evaluation gives.

    Raises:
        CommandError: one of these.
    """
    if getattr(config, "adaptive_lmbda", False) and not options.eval_file:
        raise CommandError("adaptive_lmbda follows the loss of evaluations, which need records: give --eval_file")
    if config.eval_strategy != "no" and not options.eval_file:
        raise CommandError("eval_strategy needs records to evaluate on: give --eval_file, or --eval_strategy no")
    metric, known = config.metric_for_best_model, ("loss", *(() if options.on_policy else MEASURES))
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise CommandError(f"metric_for_best_model must be one of {', '.join(known)}, got {metric!r}")


def _check_loggers(config: TrainingArguments) -> None:
    """Make the loggers of `report_to` that look as if they were not installed, for the message that they raise.

    Raises:
        CommandError: an unknown logger, or one whose package is missing.
    """
    try:
        get_reporting_integration_callbacks(config.report_to)  # type: ignore[no-untyped-call]
        for name in set(config.report_to or ()) - set(get_available_reporting_integrations()):  # type: ignore[no-untyped-call]
            INTEGRATION_TO_CALLBACK[name]()
    except Exception as error:
        raise CommandError(f"report_to: {error}") from error


def _trainer(
    options: RunOptions, models: RunModels, config: Any, resume: str | None, finished: TrainerState | None
) -> tuple[Any, int]:
    """The trainer with everything loaded, and the number of records that are trained on.

    Tokenizers and records come first, because loading the models takes longest. A run that was stopped between its last
    checkpoint and its end, so that it has `finished`, has its model there, or in the best checkpoint if that is wanted.
    """
    load_data: Any = load_for
    make: Any = _of_data
    if options.on_policy:
        from .on_policy import load_prompts, make_trainer

        if models.teacher is None:
            raise CommandError(f"method {options.method}: a model cannot teach its own adapter: give another --teacher")
        load_data, make = load_prompts, make_trainer
    adapter, bits = lora_config(options), quantization(options, config)
    try:
        if resume is not None:
            check_checkpoint(resume, models.adapted)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if resume is not None and finished is not None:
        if config.load_best_model_at_end and finished.best_global_step:
            best = Path(resume).with_name(f"checkpoint-{finished.best_global_step}")
            resume = str(best) if best.is_dir() else resume
        base = (models.base or models.student) if models.adapted else None
        models, adapter = replace(models, student=resume, base=base), None
    names = {role: name for role in ("student", "teacher") if (name := getattr(models, role)) is not None}
    hub: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    tokenizers = {role: load(role, name, AutoTokenizer.from_pretrained, **hub) for role, name in names.items()}
    try:
        check_same_tokenizer(tokenizers["student"], tokenizers.get("teacher", tokenizers["student"]))
        files = [("train_file", options.train_file), ("eval_file", options.eval_file)]
        data = {name: load_data(config, file, tokenizers["student"], name) for name, file in files if file}
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the cache of tokenised records cannot be written: {error}") from error
    if config.should_log:
        for loaded in data.values():
            print(loaded, file=sys.stderr)
    hub["attn_implementation"] = options.attn_implementation
    student = load(
        "student", models.student, load_student, base=models.base, dtype=options.student_dtype, **hub, **bits
    )
    teacher = None
    if models.teacher is not None:
        split = {"teacher_parallel": getattr(config, "teacher_parallel", "none")}
        teacher = load("teacher", models.teacher, load_teacher, dtype=options.teacher_dtype, **split, **hub)
    try:
        trainer = make(
            student,
            teacher,
            config,
            peft_config=adapter,
            train_dataset=data["train_file"].records,
            eval_dataset=data["eval_file"].records if "eval_file" in data else None,
            processing_class=tokenizers["student"],
        )
    except (ValueError, TypeError, ImportError) as error:
        raise CommandError(str(error)) from error
    return trainer, len(data["train_file"].records)


def _of_data(student: Any, teacher: Any, config: Any, **others: Any) -> AdaKDTrainer:
    """The trainer of the methods that learn from the data alone."""
    return AdaKDTrainer(model=student, teacher=teacher, args=config, **others)
