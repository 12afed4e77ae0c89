"""AdaKD on TRL's trainers: on the student's own completions, and on data in TRL's formats.

    trainer = AdaKDDistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=AdaKDDistillationConfig(output_dir="out", beta=1.0),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()

docs/trl.md shows the others.
"""

from __future__ import annotations

try:
    from trl.trainer import distillation_trainer as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"adakd_kernels.integrations.trl needs trl 1.16 and transformers: pip install 'adakd-kernels[trl]' ({error})"
    ) from error

from .distillation import AdaKDDistillationConfig, AdaKDDistillationTrainer
from .patch import PatchedLoss, patch_distillation_loss
from .sft import AdaKDSFTConfig, AdaKDSFTTrainer

__all__ = [
    "AdaKDDistillationConfig",
    "AdaKDDistillationTrainer",
    "AdaKDSFTConfig",
    "AdaKDSFTTrainer",
    "PatchedLoss",
    "patch_distillation_loss",
]
