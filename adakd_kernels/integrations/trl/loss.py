"""The loss from what TRL hands over: hidden states, heads that may be split, and the entropy that TRL logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ...adaptive import exact_dtype
from ...functional import AdaKDOutput
from ...loss import AdaKDLoss
from ...trainer.heads import HeadOptions, configured_head, plain_head
from ...trainer.trainer import KEEP_BYTES

__all__ = ["Side", "head_options", "loss_and_entropy", "make_loss"]


class Side(NamedTuple):
    """What the loss reads of one model."""

    hidden: Tensor  # (B, L, H)
    weight: Tensor  # (V, H), the head; perhaps a part of it, which FSDP2 or ZeRO-3 put together
    bias: Tensor | None  # (V,)
    after: HeadOptions  # what follows the head


def head_options(role: str, model: Any, *, try_out: bool) -> HeadOptions:
    """What follows the head of a model, as its configuration says and, with `try_out`, as two tokens show.

    Raises:
        ValueError: its logits are something else than its head's result, scaled and soft-capped.
    """
    try:
        return plain_head(model) if try_out else configured_head(model.config)
    except ValueError as error:
        raise ValueError(f"the loss needs a {role} whose logits are those of a plain output layer: {error}") from error


def make_loss(make: Callable[..., AdaKDLoss], student: HeadOptions, teacher: HeadOptions, **options: Any) -> AdaKDLoss:
    """The loss that `make` makes of the options and of what follows the heads."""
    return make(
        student_scale=student.scale,
        student_softcap=student.softcap,
        teacher_scale=teacher.scale,
        teacher_softcap=teacher.softcap,
        keep_bytes=KEEP_BYTES,
        **options,
    )


def loss_and_entropy(
    loss_fn: AdaKDLoss, student: Side, teacher: Side, labels: Tensor, num_items: float | Tensor | None
) -> tuple[AdaKDOutput, Tensor]:
    """The loss of a batch, and the sum of the student's entropies over its valid tokens."""
    entropy = torch.empty(labels.shape, dtype=exact_dtype(labels.device), device=labels.device)
    with _whole(student, teacher) as (of_student, of_teacher):
        out = loss_fn.from_hidden(
            of_student.hidden, of_student.weight, of_teacher.hidden, of_teacher.weight.detach(), labels, num_items,
            student_bias=of_student.bias,
            teacher_bias=None if of_teacher.bias is None else of_teacher.bias.detach(),
            entropy_out=entropy,
        )  # fmt: skip
    return out, entropy.sum()


@contextmanager
def _whole(*sides: Side) -> Iterator[list[Side]]:
    """The sides with whole heads, in a type that their hidden states can be multiplied with.

    The gradient of a head that is put together here goes back to the processes that hold its parts.
    """
    parameters: list[Any] = [part for side in sides for part in (side.weight, side.bias)]
    with maybe_gather_lm_head_ctx(*parameters):
        yield [
            side._replace(
                weight=_part(side.weight, side.hidden),
                bias=None if side.bias is None else _part(side.bias, side.hidden),
            )
            for side in sides
        ]


def _part(parameter: Tensor, hidden: Tensor) -> Tensor:
    """The whole parameter; where autocast does not choose a type, in that of the hidden states."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole if torch.is_autocast_enabled(hidden.device.type) else whole.to(hidden.dtype)
