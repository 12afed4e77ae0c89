"""Losses that are not finite: found before an optimizer step takes their gradient, and told by record and token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from ..checks import is_dtensor
from .checkpoints import last_checkpoint
from .collator import record_ids
from .records import IGNORE_INDEX

__all__ = ["BeforeStepCallback", "FiniteCheck", "MicroBatch", "NonFiniteLossError", "loss_without_gradient"]

logger = logging.getLogger(__name__)


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


class FiniteCheck:
    """What `on_nan` asks for: the losses of an optimizer step and their gradient are looked at before it is taken.

    Args:
        trainer: the `AdaKDTrainer` whose steps these are.

    Attributes:
        grad_norm: the norm of the step's gradient, where `Trainer` computed it.
        skipped: number of micro-batches, and of steps, that were left out in this run.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Begin a run."""
        self.grad_norm: Any = None
        self.skipped = 0
        self._step: list[MicroBatch] = []

    def takes(self, micro_batch: MicroBatch) -> bool:
        """Whether the gradient of a micro-batch counts. With 'raise' all do until `before_step`.

        Raises:
            NonFiniteLossError: as `before_step`; with DeepSpeed, which takes a step at the end of a backward.
        """
        if self._raises:
            self._step.append(micro_batch)
            if self.trainer.is_deepspeed_enabled:
                self.before_step()
            return True
        finite = bool(micro_batch.loss.isfinite())
        if not finite:
            self._skip(micro_batch.at_fault(self._decode))
        return finite

    def before_step(self) -> None:
        """Stop, on all ranks alike, before an optimizer step on a loss or a gradient that is not finite.

        Waits for the device once.

        Raises:
            NonFiniteLossError: with the step, the records, and the first token at fault.
        """
        trainer, args = self.trainer, self.trainer.args
        micro_batches, self._step = self._step, []
        norm, self.grad_norm = self.grad_norm, None
        accelerator, deepspeed = trainer.accelerator, trainer.is_deepspeed_enabled
        if norm is None or accelerator.scaler is not None or (deepspeed and accelerator.mixed_precision == "fp16"):
            norm = 0.0  # a gradient scaler leaves such steps out by itself
        numbers = (norm, *(m.loss for m in micro_batches))
        bad = torch.stack([~torch.as_tensor(number, device=args.device).isfinite() for number in numbers])
        if not accelerator.reduce(bad.any().int()).item():
            return
        # DeepSpeed leaves most such steps out by itself, but not with every optimizer.
        taken = deepspeed and not micro_batches and not accelerator.optimizer_step_was_skipped
        if not (self._raises or taken):
            trainer.model.zero_grad()
            if trainer.is_world_process_zero():
                self._skip(f"the gradient, whose norm is {float(norm)}")
            return
        count, rank = len(micro_batches), args.process_index
        found = [
            f"micro-batch {index} of {count}, rank {rank}: {micro_batch.at_fault(self._decode)}"
            for index, micro_batch in enumerate(micro_batches, 1)
            if not micro_batch.loss.isfinite()
        ]
        found = gather_object(found[:1]) or [f"the loss is finite, but the norm of its gradient is {float(norm)}"]
        if taken:
            found[0] += ", and DeepSpeed has taken the step"
        last = last_checkpoint(str(args.output_dir))
        kept = f"the last checkpoint is {last}" if last else f"there is no checkpoint in {args.output_dir}"
        raise NonFiniteLossError(f"step {trainer.state.global_step + 1}, {found[0]}; {kept}")

    @property
    def _raises(self) -> bool:
        return bool(self.trainer.args.on_nan == "raise")

    @property
    def _decode(self) -> Any:
        """The tokenizer's way from ids to text, or None."""
        return getattr(self.trainer.processing_class, "decode", None)

    def _skip(self, reason: str) -> None:
        self.skipped += 1
        logger.warning("AdaKDTrainer: step %d: left out: %s", self.trainer.state.global_step + 1, reason)


class BeforeStepCallback(TrainerCallback):
    """Calls a function before each optimizer step, when all gradients of the step are there."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.function()


def loss_without_gradient(source: nn.Module | Tensor) -> Tensor:
    """A loss of 0 whose backward gives every parameter a gradient of 0, as data parallelism waits for all of them.

    `source` is the model; of one that FSDP2 or ZeRO-3 has split, the logits of its forward, because its parameters get
    their gradients on the way of that forward alone.
    """
    parts: list[Any] = [source] if isinstance(source, Tensor) else [p for p in source.parameters() if p.requires_grad]
    parts = [part.to_local() if is_dtensor(part) else part for part in parts]  # of tensor parallelism
    loss: Any = sum(part.flatten()[:0].sum() for part in parts)
    return loss  # type: ignore[no-any-return]
