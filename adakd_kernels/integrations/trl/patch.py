"""AdaKD's loss in a stock `trl.DistillationTrainer`, whose script stays as it is."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from trl.trainer import distillation_trainer

from ...checks import check_options
from ...loss import AdaKDLoss
from ...trainer.heads import HeadOptions
from ...trainer.records import IGNORE_INDEX
from .distillation import divergence_of_beta
from .loss import Side, loss_and_entropy, make_loss

__all__ = ["PatchedLoss", "patch_distillation_loss"]

NAME = "_chunked_divergence_loss"


def patch_distillation_loss(
    focus_ratio: float = 1.0, temperature_scale: float = 0.5, base_temperature: float = 1.0
) -> PatchedLoss:
    """Give every `trl.DistillationTrainer` of this process AdaKD's loss, from now on or for a `with` block.

    TRL's `beta` chooses the divergence as before. The share is fixed, because a stock trainer does not tell the loss
    about its steps: `AdaKDDistillationTrainer` has the adaptive one. TRL's `temperature` goes on to sample the
    completions, and scales the loss no more: `base_temperature` does, with the factor τ² that TRL's loss leaves out. So
    with `temperature_scale=0` and TRL's temperature 1 the losses stay what they were.

    Args:
        focus_ratio: the share r in (0, 1] of the valid tokens of a micro-batch that the loss counts.
        temperature_scale: c ≥ 0 of equation (6); 0 gives every token the base temperature.
        base_temperature: τ_base > 0.

    Returns:
        A context manager that undoes this at the end of its block; `undo()` does it without one.

    Raises:
        TypeError, ValueError: an option of the wrong type or outside its range.
        RuntimeError: this version of TRL calls its loss in another way.
    """
    return PatchedLoss(focus_ratio, temperature_scale, base_temperature)


class PatchedLoss:
    """The loss in the place of TRL's; `patch_distillation_loss` makes one."""

    def __init__(self, focus_ratio: float, temperature_scale: float, base_temperature: float) -> None:
        self._options: dict[str, Any] = {
            "focus": focus_ratio, "temperature_scale": temperature_scale, "base_temperature": base_temperature,
        }  # fmt: skip
        check_options("reverse_kl", focus_ratio, temperature_scale, base_temperature, "hellinger", 0.0, IGNORE_INDEX)
        self._found: Any = getattr(distillation_trainer, NAME, None)
        ours = [*inspect.signature(self._loss).parameters]
        if self._found is None or [*inspect.signature(self._found).parameters] != ours:
            raise RuntimeError(
                f"this version of trl calls {NAME} in another way: install trl>=1.16,<1.17, or use "
                "AdaKDDistillationTrainer"
            )
        setattr(distillation_trainer, NAME, self._loss)

    def undo(self) -> None:
        """Put back what this one has replaced."""
        if self._found is not None:
            setattr(distillation_trainer, NAME, self._found)
        self._found = None

    def __enter__(self) -> PatchedLoss:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _loss(
        self,
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As TRL's: the loss, the sum of the student's entropies, and the number of valid tokens."""
        # No option here reads the label of a token: 0 stands for any.
        labels = torch.where(completion_mask == 0, IGNORE_INDEX, 0)
        student = HeadOptions(student_logit_scale, student_final_logit_softcapping)
        teacher = HeadOptions(teacher_logit_scale, teacher_final_logit_softcapping)
        out, entropy = loss_and_entropy(
            make_loss(AdaKDLoss, student, teacher, divergence=divergence_of_beta(beta), **self._options),
            Side(student_hidden_states, student_lm_head_weight, student_lm_head_bias, student),
            Side(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, teacher),
            labels,
            num_items_in_batch,
        )
        return out.loss, entropy, (labels != IGNORE_INDEX).sum()
