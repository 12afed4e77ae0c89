"""`selection="step"`: difficulty ranks, median and share over all micro-batches and ranks of an optimizer step.

A pass without a graph measures the difficulties of all micro-batches before the first of them is trained. One choice is
made of all of them, and each micro-batch is trained with its part of it. Of the first pass, a few numbers for each
token are kept, the random state before each forward, and on the hidden route what the teacher's head gets.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..functional import TokenChoice, choose_tokens, token_statistics
from ..linear.function import linear_token_statistics
from ..linear.heads import HeadInput
from ..loss import AdaKDLoss
from .records import IGNORE_INDEX

__all__ = ["CHOSEN", "Chosen", "Measure", "Measured", "StepSelection", "check_step_selection"]

CHOSEN = "chosen"
"""Key of a micro-batch's `Chosen` among its inputs."""


def check_step_selection(trainer: Any) -> None:
    """Refuse what `selection="step"` does not go with.

    Raises:
        ValueError: with the name of it.
    """
    args, whole = trainer.args, "the student has to run once more, alone and as a whole"
    for refused, name, reason in (
        (trainer.is_deepspeed_enabled, "DeepSpeed", whole),
        (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2, "FSDP 1", whole),
        (trainer.get_tp_size() > 1, "tensor parallelism", whole),
        (args.torch_compile, "torch_compile", "compiled without a graph, the student may draw other dropout masks"),
        (
            args.world_size > 1 and not args.average_tokens_across_devices,
            "average_tokens_across_devices=False",
            "it counts the tokens of all ranks together",
        ),
    ):
        if refused:
            raise ValueError(f"selection='step' does not go with {name}: {reason}; set selection='micro_batch'")


class Measured(NamedTuple):
    """What the first pass finds of a micro-batch; takes the place of an `AdaKDOutput`."""

    loss: Tensor  # 0, where a forward expects a loss
    difficulty: Tensor  # (B, K)
    valid: Tensor  # (B, K) bool
    teacher_hidden: Tensor | None  # (B, K, H), on the hidden route


class Measure:
    """Called as an `AdaKDLoss` is, but computes the difficulties alone.

    Args:
        loss_fn: gives the measure of difficulty, and what follows the heads.
    """

    inplace = False

    def __init__(self, loss_fn: AdaKDLoss) -> None:
        self.loss_fn = loss_fn

    @torch.no_grad()
    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *_: Any, **__: Any) -> Measured:
        found = token_statistics(
            student_logits, teacher_logits, targets != IGNORE_INDEX, targets, self.loss_fn.difficulty
        )
        return Measured(found.difficulty.new_zeros(()), found.difficulty, found.valid, None)

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        targets: Tensor,
        *_: Any,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        **__: Any,
    ) -> Measured:
        of = self.loss_fn
        difficulty, valid = linear_token_statistics(
            HeadInput(student_hidden, student_weight, student_bias, of.student_scale, of.student_softcap),
            HeadInput(teacher_hidden, teacher_weight, teacher_bias, of.teacher_scale, of.teacher_softcap),
            targets,
            targets != IGNORE_INDEX,
            of.difficulty,
        )
        return Measured(difficulty.new_zeros(()), difficulty, valid, teacher_hidden)


class RandomState:
    """The state of the random numbers that a model draws, now: of the CPU and of the devices that it is on."""

    def __init__(self, model: nn.Module) -> None:
        self.cpu = torch.get_rng_state()
        one_of_each = {parameter.device: parameter for parameter in model.parameters()}
        self.devices, self.states = get_device_states(*one_of_each.values())
        self.device_type = next((d.type for d in one_of_each if d.type not in ("cpu", "meta")), None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device_type is not None:
            set_device_states(self.devices, self.states, device_type=self.device_type)


@dataclass
class Chosen:
    """What the first pass leaves of a micro-batch for its training.

    Attributes:
        choice: its part of the step's choice.
        teacher_hidden: (B, K, H), or None on the logits route.
        random_state: that before its forward.
    """

    choice: TokenChoice
    teacher_hidden: Tensor | None
    random_state: RandomState


class StepSelection:
    """One optimizer step: its micro-batches, and what is chosen of each, in their order.

    Args:
        trainer: the `AdaKDTrainer` whose step it is.
        batches: all micro-batches of the step on this rank.
    """

    def __init__(self, trainer: Any, batches: list[Any]) -> None:
        self.trainer, self.batches = trainer, batches
        self.chosen: deque[Chosen] = deque()

    def next(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """What `training_step` gets for the next micro-batch: its inputs with its `Chosen`, and a number of items.

        The first call measures all micro-batches. Not before, because a run that is resumed restores its random state
        after it has read them.

        Raises:
            RuntimeError: the micro-batches of the step are not known.
        """
        if self.trainer.args.gradient_accumulation_steps == self.trainer.accelerator.num_processes == 1:
            return inputs, None  # nothing else to choose from: (3)-(6) of this micro-batch
        if self.batches:
            self._choose(model)
        if not self.chosen:
            raise RuntimeError(
                "selection='step' needs all micro-batches of a step before the first is trained. They come from "
                "get_batch_samples of the trainer: call that of AdaKDTrainer where you override it"
            )
        chosen = self.chosen.popleft()
        chosen.random_state.restore()
        return {**inputs, CHOSEN: chosen}, chosen.choice.n

    def _choose(self, model: nn.Module) -> None:
        """Measure all micro-batches, and choose."""
        for trained in (model, self.trainer.optimizer):  # some optimizers change the weights here
            if callable(getattr(trained, "train", None)):
                trained.train()
        batches, self.batches = self.batches, []
        states, measured = [], []
        for batch in batches:
            states.append(RandomState(model))
            measured.append(self.trainer.measure_micro_batch(model, batch))
        choices = choose_over_step(measured, self.trainer.loss_fn, self.trainer.accelerator)
        for choice, found, state in zip(choices, measured, states, strict=True):
            self.chosen.append(Chosen(choice, found.teacher_hidden, state))


def choose_over_step(measured: list[Measured], loss_fn: AdaKDLoss, accelerator: Any) -> list[TokenChoice]:
    """(3)-(6) over the tokens of all micro-batches and ranks; the part of each micro-batch of this rank.

    The tokens stand in the order that they have in one big batch of the same records: micro-batch by micro-batch, in
    each of them rank by rank. Data parallelism takes the mean over the ranks, so n and k are divided by their number.

    A micro-batch with a difficulty of NaN takes no part, so that the others do without its NaN. Its own valid tokens
    have the temperature NaN.
    """
    lost = [found.difficulty.isnan().any() for found in measured]
    longest = max(found.difficulty.numel() for found in measured)
    like = measured[0].difficulty
    packed = torch.full((1, len(measured), longest), -torch.inf, dtype=like.dtype, device=like.device)
    for row, (found, nan) in enumerate(zip(measured, lost, strict=True)):
        values = found.difficulty.where(found.valid & ~nan, -torch.inf)
        packed[0, row, : values.numel()] = values.flatten()
    packed = accelerator.pad_across_processes(packed, dim=2, pad_index=-torch.inf)
    everywhere = accelerator.gather(packed).transpose(0, 1)  # (micro-batches, ranks, tokens)
    valid = everywhere != -torch.inf
    whole = choose_tokens(
        everywhere.masked_fill(~valid, 0.0),
        valid,
        loss_fn.focus_ratio,
        loss_fn.temperature_scale,
        loss_fn.base_temperature,
    )
    ranks, rank = accelerator.num_processes, accelerator.process_index
    choices = []
    for row, (found, nan) in enumerate(zip(measured, lost, strict=True)):
        shape, n = found.difficulty.shape, found.difficulty.numel()
        temperature, selected = (x[row, rank, :n].view(shape) for x in (whole.temperature, whole.selected))
        own = found.valid & nan
        choices.append(
            TokenChoice(
                found.difficulty,
                found.valid,
                temperature.masked_fill(own, torch.nan),
                selected | own,
                whole.n / ranks,
                whole.k / ranks,
            )
        )
    return choices
