"""Losses that are not finite: found before an optimizer step takes their gradient, and told by record and token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import TrainerCallback

from .collator import record_ids
from .records import IGNORE_INDEX

__all__ = ["BeforeStepCallback", "MicroBatch", "NonFiniteLossError", "loss_without_gradient"]


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient of a training step is NaN or infinite; the step was not taken."""


class MicroBatch(NamedTuple):
    """What is kept of a micro-batch until its optimizer step: numbers per token, on the device."""

    loss: Tensor  # 0-d
    difficulty: Tensor  # (B, K)
    token_loss: Tensor  # (B, K)
    targets: Tensor  # (B, K), the token that each position predicts
    keep: Tensor | None  # (K,) or (B, K), the positions; None: all
    ids: Tensor | None  # (B, W), the records' ids

    def at_fault(self, decode: Callable[[list[int]], str] | None) -> str:
        """The records, and the first token whose divergence is not finite. Waits for the device."""
        names = record_ids(self.ids, len(self.targets))
        text = f"the loss is {self.loss.item()} on {', '.join(names)}"
        valid = self.targets != IGNORE_INDEX
        # A difficulty of NaN comes from the token's own logits. It spreads to the temperatures of others, and so to
        # their losses. An infinite difficulty is legitimate where the vocabularies of two rows are disjoint.
        for bad in (self.difficulty.isnan() & valid, ~self.token_loss.isfinite() & valid):
            if bad.any():
                row, column = bad.nonzero()[0].tolist()
                token = int(self.targets[row, column])
                position = column if self.keep is None else int(self.keep.expand(valid.shape)[row, column])
                name = "" if decode is None else f", {decode([token])!r}"
                return (
                    f"{text}; the first token at fault is input_ids[{position + 1}] of {names[row]}: id {token}{name}"
                )
        return f"{text}; every token's divergence is finite, so it is cross-entropy or an auxiliary loss"


class BeforeStepCallback(TrainerCallback):
    """Calls a function before each optimizer step, when all gradients of the step are there."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.function()


def loss_without_gradient(model: nn.Module) -> Tensor:
    """A loss of 0 whose backward gives every parameter a gradient of 0, as data parallelism waits for all of them."""
    return sum(p.flatten()[:0].sum() for p in model.parameters() if p.requires_grad)  # type: ignore[return-value]
