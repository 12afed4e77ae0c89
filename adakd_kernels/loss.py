"""The losses as modules: their options, and the `LossAdaptiveFocus` that drives the share r."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .adaptive import ExactModule, LossAdaptiveFocus
from .checks import check_head_options, check_options
from .divergences import Divergence
from .functional import AdaKDOutput, TokenChoice, loss_of_logits
from .linear.function import loss_of_hidden
from .linear.heads import StudentHead, TeacherHead
from .vocab_parallel import VocabParallel

__all__ = ["AdaKDLoss", "LinearAdaKDLoss"]

_LOSS_OPTIONS = (
    "divergence", "temperature_scale", "base_temperature", "difficulty", "ce_weight", "ignore_index", "shift",
)  # fmt: skip
_HEAD_OPTIONS = (
    "student_softcap", "teacher_softcap", "student_scale", "teacher_scale", "chunk_tokens", "keep_bytes",
)  # fmt: skip


class AdaKDLoss(ExactModule):
    """`adakd_loss` whose share r follows the loss (equations (8), (9)) from optimizer step to optimizer step.

    Call it on the logits of each micro-batch, or `from_hidden` on its hidden states, and `step()` once after each
    optimizer step: `step` gives the focus the mean of the losses since the last one (their sum where `num_items` or a
    `choice` was given), averaged over the ranks of `torch.distributed`. The training calls of one optimizer step either
    all give `num_items` or a `choice` or none does; another call is refused, except under `torch.compile`, which does
    not see it.

    Args:
        divergence: as in `adakd_loss`.
        total_steps: optimizer steps of the run, for a `LossAdaptiveFocus` with its defaults.
        focus: instead of `total_steps`: a `LossAdaptiveFocus`, or a float in (0, 1] for a share that stays.
        temperature_scale, base_temperature, difficulty, ce_weight, ignore_index, shift, inplace: as in `adakd_loss`;
            `inplace` concerns calls on logits only.
        student_softcap, teacher_softcap, student_scale, teacher_scale, chunk_tokens, keep_bytes: as in
            `linear_adakd_loss`, for `from_hidden` only.

    Raises:
        TypeError, ValueError: an option of the wrong type or range, or not exactly one of `total_steps` and `focus`.

    Example:
        >>> loss_fn = AdaKDLoss(divergence="reverse_kl", total_steps=1000)
        >>> student = torch.randn(2, 5, 100, requires_grad=True)
        >>> out = loss_fn(student, torch.randn(2, 5, 100), torch.randint(100, (2, 5)))
        >>> out.loss.backward()
        >>> loss_fn.step()
        >>> int(loss_fn.focus.steps)
        1
    """

    _losses: Tensor

    def __init__(
        self,
        divergence: str | Divergence = "reverse_kl",
        *,
        total_steps: int | None = None,
        focus: LossAdaptiveFocus | float | None = None,
        temperature_scale: float = 0.5,
        base_temperature: float = 1.0,
        difficulty: str = "hellinger",
        ce_weight: float = 0.0,
        ignore_index: int = -100,
        shift: bool = False,
        inplace: bool = False,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        chunk_tokens: int | None = None,
        keep_bytes: int = 0,
    ) -> None:
        super().__init__()
        if (total_steps is None) == (focus is None):
            raise ValueError(
                "give total_steps (the share of tokens follows the loss) or focus (a LossAdaptiveFocus, or a float for "
                f"a fixed share), one of the two; got total_steps={total_steps!r}, focus={focus!r}"
            )
        if total_steps is not None:
            focus = LossAdaptiveFocus(total_steps)
        elif not isinstance(focus, LossAdaptiveFocus):
            if not isinstance(focus, (int, float)) or isinstance(focus, bool):
                raise TypeError(f"focus must be a LossAdaptiveFocus or a number in (0, 1], got {type(focus).__name__}")
            if not 0.0 < focus <= 1.0:
                raise ValueError(f"focus must be a LossAdaptiveFocus or a number in (0, 1], got {focus!r}")
        self.divergence = check_options(
            divergence, 1.0, temperature_scale, base_temperature, difficulty, ce_weight, ignore_index,
            shift=shift, inplace=inplace,
        )  # fmt: skip
        check_head_options(student_softcap, teacher_softcap, student_scale, teacher_scale, chunk_tokens, keep_bytes)
        self.focus: LossAdaptiveFocus | float = focus
        self.temperature_scale, self.base_temperature = temperature_scale, base_temperature
        self.difficulty, self.ce_weight = difficulty, ce_weight
        self.ignore_index, self.shift, self.inplace = ignore_index, shift, inplace
        self.student_softcap, self.teacher_softcap = student_softcap, teacher_softcap
        self.student_scale, self.teacher_scale = student_scale, teacher_scale
        self.chunk_tokens, self.keep_bytes = chunk_tokens, keep_bytes
        self._items_given: bool | None = None
        # The sum of the losses since the last step, and what it is to be divided by.
        self.register_buffer("_losses", torch.zeros(2, dtype=torch.float64), persistent=False)

    @property
    def focus_ratio(self) -> Tensor | float:
        """The share r that the next call uses."""
        return self.focus.focus_ratio if isinstance(self.focus, LossAdaptiveFocus) else float(self.focus)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_items: float | Tensor | None = None,
        *,
        choice: TokenChoice | None = None,
        vocab_parallel: VocabParallel | None = None,
    ) -> AdaKDOutput:
        """`adakd_loss` of one micro-batch, at the current share. Shapes and errors are `adakd_loss`'s."""
        self._check_num_items(num_items, choice)
        focus_ratio = self._current_ratio(student_logits)
        options = self._options(*_LOSS_OPTIONS, "inplace")
        out, distillation = loss_of_logits(
            student_logits,
            teacher_logits,
            labels,
            focus_ratio=focus_ratio,
            num_items=num_items,
            choice=choice,
            vocab_parallel=vocab_parallel,
            **options,
        )
        self._record(distillation, num_items, choice)
        return out

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_weight: StudentHead,
        teacher_hidden: Tensor,
        teacher_weight: TeacherHead,
        labels: Tensor,
        num_items: float | Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        choice: TokenChoice | None = None,
        entropy_out: Tensor | None = None,
        vocab_parallel: VocabParallel | None = None,
        reduce_hidden: bool = False,
    ) -> AdaKDOutput:
        """`linear_adakd_loss` of one micro-batch, at the current share. Shapes and errors are its.

        Example:
            >>> loss_fn = AdaKDLoss(divergence="reverse_kl", total_steps=1000, keep_bytes=2**20)
            >>> hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.nn.Linear(8, 100)
            >>> teacher_hidden, teacher_weight = torch.randn(2, 5, 16), torch.randn(100, 16)
            >>> labels = torch.randint(100, (2, 5))
            >>> out = loss_fn.from_hidden(
            ...     hidden, head.weight, teacher_hidden, teacher_weight, labels, student_bias=head.bias
            ... )
            >>> out.loss.backward()
            >>> tuple(hidden.grad.shape), tuple(head.weight.grad.shape)
            ((2, 5, 8), (100, 8))
        """
        self._check_num_items(num_items, choice)
        focus_ratio = self._current_ratio(student_hidden)
        out, distillation = loss_of_hidden(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            focus_ratio=focus_ratio,
            num_items=num_items,
            choice=choice,
            entropy_out=entropy_out,
            vocab_parallel=vocab_parallel,
            reduce_hidden=reduce_hidden,
            **self._options(*_LOSS_OPTIONS, *_HEAD_OPTIONS),
        )
        self._record(distillation, num_items, choice)
        return out

    def _options(self, *names: str) -> dict[str, Any]:
        """The options of these names, as the functions take them."""
        return {name: getattr(self, name) for name in names}

    def _current_ratio(self, like: Tensor) -> Tensor | float:
        """The share r, after the buffers have followed the batch to its device."""
        if self._losses.device != like.device:
            # Buffers that an evaluation makes under inference mode could not be written to in training.
            with torch.inference_mode(False):
                self.to(like.device)
        return self.focus_ratio

    def _in_optimizer_step(self) -> bool:
        """Whether a call belongs to an optimizer step, and is no evaluation."""
        return self.training and torch.is_grad_enabled()

    def _check_num_items(self, num_items: float | Tensor | None, choice: TokenChoice | None) -> None:
        """Refuse a step of which some calls give `num_items` and others do not: it would mix sums and means."""
        num_items = num_items if choice is None else choice.n
        if self._items_given is None or not self._in_optimizer_step() or torch.compiler.is_compiling():
            return
        if self._items_given != (num_items is not None):
            before, now = ("with", "without") if self._items_given else ("without", "with")
            raise ValueError(
                f"num_items must be given to all calls of an optimizer step or to none: an earlier call since step() "
                f"came {before} it, this one {now}; call step() after each optimizer step"
            )

    def _record(self, distillation: Tensor, num_items: float | Tensor | None, choice: TokenChoice | None) -> None:
        """Add the distillation loss of a micro-batch of training to what `step` reads."""
        if not self._in_optimizer_step():
            return
        means = num_items is None and choice is None
        # A compiled graph would have a guard on what is set here, and be compiled twice.
        if not torch.compiler.is_compiling():
            self._items_given = not means
        total, count = self._losses.unbind()
        total += distillation
        if means:
            count += 1.0
        else:
            count.fill_(1.0)

    @torch.no_grad()
    def step(self) -> None:
        """Equations (8) and (9) on the loss since the last call; call it once per optimizer step, on all ranks.

        Without a training call since the last one, nothing changes.
        """
        total, count = self._losses.unbind()
        loss = total / count  # 0/0 is NaN, which the focus leaves out
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        if isinstance(self.focus, LossAdaptiveFocus):
            self.focus.step(loss)
        self._losses.zero_()
        self._items_given = None


class LinearAdaKDLoss(AdaKDLoss):
    """`AdaKDLoss` whose call is `from_hidden`; `from_logits` takes logits. The options are those of `AdaKDLoss`.

    Example:
        >>> loss_fn = LinearAdaKDLoss(divergence="reverse_kl", total_steps=1000)
        >>> hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.nn.Linear(8, 100, bias=False)
        >>> labels = torch.randint(100, (2, 5))
        >>> out = loss_fn(hidden, head.weight, torch.randn(2, 5, 16), torch.randn(100, 16), labels)
        >>> out.loss.backward()
        >>> loss_fn.step()
        >>> int(loss_fn.focus.steps)
        1
    """

    forward = AdaKDLoss.from_hidden  # type: ignore[assignment]
    from_logits = AdaKDLoss.forward
