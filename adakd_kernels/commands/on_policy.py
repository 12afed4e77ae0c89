"""`adakd train` with a method whose student samples completions: its options, and TRL's trainer. Needs trl."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from ..integrations.trl import AdaKDDistillationConfig, AdaKDDistillationTrainer
from ..trainer.loading import load_prompts_for
from . import CommandError

__all__ = ["OnPolicyConfig", "check_vllm", "load_prompts", "make_trainer"]


@dataclass
class OnPolicyConfig(AdaKDDistillationConfig):
    """`AdaKDDistillationConfig` with the command's defaults, so that two runs differ in their method alone.

    TRL's own are a learning rate of 1e-6, bf16, and gradient checkpointing.
    """

    beta: float = field(
        default=1.0,
        metadata={
            "help": "0: forward KL; 1: reverse KL; between: Jensen-Shannon with this weight of the teacher. "
            "Without effect where a divergence is given."
        },
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate of AdamW."})
    bf16: bool = field(default=False, metadata={"help": "Use bf16 mixed precision."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Compute the activations again in the backward, to save memory."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare the data; left out, the main one."}
    )
    # No options of the command, which has others for them.
    trust_remote_code: bool = field(default=False, init=False)
    model_init_kwargs: Any = field(default=None, init=False)
    teacher_model_name_or_path: Any = field(default=None, init=False)
    teacher_model_revision: Any = field(default=None, init=False)
    teacher_model_init_kwargs: Any = field(default=None, init=False)
    use_vllm: bool = field(default=False, init=False)


def check_vllm() -> None:
    """Refuse to sample with vLLM where it cannot run.

    Raises:
        CommandError: there is no GPU, or no vllm.
    """
    if not torch.accelerator.is_available():
        raise CommandError(
            "generation vllm needs a GPU, and torch finds none on this machine: leave generation out to sample with "
            "transformers"
        )
    if find_spec("vllm") is None:
        raise CommandError("generation vllm needs vllm: pip install 'trl[vllm]'")


def load_prompts(config: OnPolicyConfig, path: str, tokenizer: Any, name: str) -> Any:
    """The prompts and completions of a file; those to train on fill a step at least.

    Raises:
        ValueError: data that cannot be used.
    """
    loaded = load_prompts_for(config, path, tokenizer, name)
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    if name == "train_file" and len(loaded.records) < step:
        raise ValueError(
            f"{path}: has {len(loaded.records)} records, but a step takes {step}: lower per_device_train_batch_size or "
            "gradient_accumulation_steps"
        )
    return loaded


def make_trainer(student: Any, teacher: Any, config: OnPolicyConfig, **others: Any) -> AdaKDDistillationTrainer:
    """The trainer on TRL.

    Raises:
        ValueError, TypeError, ImportError: what the trainer refuses.
    """
    return AdaKDDistillationTrainer(model=student, teacher_model=teacher, args=config, **others)
