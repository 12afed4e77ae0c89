"""Which tokens are selected, and at which temperature: (3)-(6), (8) and (9) of docs/maths.md on per-token tensors.

Everything here is a tensor on the logits' device. Shapes do not depend on values and nothing waits for the device, so
the functions work under `torch.compile(fullgraph=True)` and in CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_floating, check_integer, check_mask, check_number, check_range, check_temperature_options

__all__ = ["LossAdaptiveFocus", "ScheduledFocus", "inverse_difficulty_temperature", "select_tokens"]


def exact_dtype(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def focus_count(focus_ratio: float | Tensor, n: Tensor) -> Tensor:
    """k = max(1, ⌊r·n⌋) of (3) as a 0-d int64 tensor, from the product in fp64: in fp32, 0.29·100 rounds up to 29."""
    return (n.to(exact_dtype(n.device)) * focus_ratio).floor().long().clamp_min(1)


def tensor_on(value: float | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """As a tensor. A number is filled in: the copy that `torch.as_tensor` makes of it would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    if torch.compiler.is_compiling() and isinstance(value, float):
        # A float that changes stays an argument of the graph where a tensor is multiplied by it; filled in, it would
        # become a constant, and each value would compile another graph.
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


class ExactModule(nn.Module):
    """A module whose own tensors follow it to a device but keep their type when it, or what owns it, is cast.

    On a device without fp64 they become fp32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        apply: Any = super()._apply
        children: Any = self.children() if recurse else ()
        for child in children:
            child._apply(fn)
        return apply(lambda tensor: _moved(tensor, fn), False)


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn` of the tensor, in the tensor's own type as far as the device has it."""
    try:
        moved = fn(tensor)
    except TypeError:  # no fp64 there
        if tensor.dtype != torch.float64:
            raise
        return fn(tensor.float())
    if moved.dtype == tensor.dtype:
        return moved
    kept = exact_dtype(moved.device) if tensor.dtype == torch.float64 else tensor.dtype
    return tensor.to(moved.device, kept)


def select_tokens(difficulty: Tensor, focus_ratio: float | Tensor = 1.0, mask: Tensor | None = None) -> Tensor:
    """The k = max(1, ⌊r·n⌋) hardest of the n valid tokens; ties go to the lower index (equation (3)).

    Args:
        difficulty: (...) fp16, bf16, fp32 or fp64; NaN is taken for the hardest, so that it is seen.
        focus_ratio: the share r in (0, 1], a float or a 0-d tensor.
        mask: (...) bool, true for valid tokens; None for all.

    Returns:
        (...) bool. Nothing is selected where no token is valid.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.

    Example:
        >>> select_tokens(torch.tensor([0.1, 0.9, 0.5, 0.5]), focus_ratio=0.5)
        tensor([False,  True,  True, False])
    """
    check_floating("difficulty", difficulty)
    check_range("focus_ratio", focus_ratio, 0.0, 1.0, "in (0, 1]", low_open=True)
    if mask is not None:
        check_mask("mask", mask, difficulty.shape)
    valid = torch.ones_like(difficulty, dtype=torch.bool) if mask is None else mask
    order = descending(difficulty, valid).indices
    among_first = torch.arange(order.numel(), device=order.device) < focus_count(focus_ratio, valid.sum())
    # Where no token is valid, k is still 1: `& valid` takes that token out again.
    selected = torch.zeros_like(among_first).scatter(0, order, among_first)
    return selected.view_as(difficulty) & valid


def descending(difficulty: Tensor, mask: Tensor) -> torch.return_types.sort:
    """(n,) difficulties of the tokens in the mask in descending order, equal ones by index; the other tokens last."""
    return difficulty.masked_fill(~mask, -math.inf).flatten().sort(descending=True, stable=True)


def inverse_difficulty_temperature(
    difficulty: Tensor,
    selected: Tensor | None = None,
    temperature_scale: float | Tensor = 0.5,
    base_temperature: float | Tensor = 1.0,
) -> Tensor:
    """Temperature of every token: low where it is hard, high where it is easy (equations (4)-(6)).

    τ = τ_base · exp(−c·(s² − m²)/(s² + m²)), m² the lower median of the difficulty over the selected tokens.

    An infinite difficulty is the hardest there is: ŝ is 1 beside a finite median, −1 where the median alone is
    infinite, and 0 where both are. A difficulty of NaN gives NaN, so that it is seen.

    Args:
        difficulty: (...) s² ≥ 0 of a floating type, such as `token_difficulty` returns; below 0 is taken for 0.
        selected: (...) bool, the tokens whose median is the reference; None for all.
        temperature_scale: c, a float or a 0-d tensor (not checked then); 0 gives every token the base temperature, and
            a negative number turns the direction round, for comparisons: high where a token is hard.
        base_temperature: τ_base > 0, a float or a 0-d tensor (not checked then).

    Returns:
        (...) in [τ_base·e^−|c|, τ_base·e^|c|], of the difficulty's type: no less than its smallest normal number and no
        more than its largest finite one.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.

    Example:
        >>> inverse_difficulty_temperature(torch.tensor([0.0, 0.2, 1e9]), temperature_scale=0.5)
        tensor([1.6487, 1.0000, 0.6065])
    """
    check_floating("difficulty", difficulty)
    if selected is not None:
        check_mask("selected", selected, difficulty.shape)
    check_temperature_options(temperature_scale, base_temperature)
    range_ = torch.finfo(difficulty.dtype)
    return unbounded_temperature(difficulty, selected, temperature_scale, base_temperature).clamp(
        range_.tiny, range_.max
    )


def unbounded_temperature(
    difficulty: Tensor,
    selected: Tensor | None,
    temperature_scale: float | Tensor,
    base_temperature: float | Tensor,
) -> Tensor:
    """`inverse_difficulty_temperature` without its checks; 0 or infinite where it leaves the type's range."""
    if selected is None:
        selected = torch.ones_like(difficulty, dtype=torch.bool)
    values = descending(difficulty, selected).values
    if values.numel() == 0:
        return torch.ones_like(difficulty) * base_temperature
    dtype = difficulty.dtype
    range_ = torch.finfo(dtype)
    # The lower median of k values stands at index ⌊k/2⌋ of their descending order (docs/maths.md, section 6).
    median = values.gather(0, (selected.sum() // 2).clamp_max(values.numel() - 1).view(1)).squeeze(0)
    # Infinity becomes a number that is large beside all others, and small enough that the sum of two stays finite.
    bounded = difficulty.clamp(0.0, 0.25 * range_.max)
    median = median.clamp(0.0, 0.25 * range_.max)  # −inf where nothing is selected
    total = bounded + median
    relative = torch.where(total == 0, 0.0, (bounded - median) / total)
    # A scale that overflows to infinity in this type, or a base that underflows to 0, would make NaN of 0·inf.
    scale = clamped(temperature_scale, -range_.max, range_.max, dtype)
    base = clamped(base_temperature, range_.tiny, range_.max, dtype)
    temperature: Tensor = base * torch.exp(-scale * relative)
    return temperature


def clamped(value: float | Tensor, low: float, high: float, dtype: torch.dtype) -> Any:
    """A number, or a tensor cast to this type, no less than `low` and no more than `high`; NaN stays."""
    return value.to(dtype).clamp(low, high) if isinstance(value, Tensor) else min(max(value, low), high)


def loss_temperature(value: Any, dtype: torch.dtype) -> Any:
    """The nearest temperature whose square, a factor of (7), is neither 0 nor infinite in this type."""
    return clamped(value, math.sqrt(torch.finfo(dtype).tiny), math.sqrt(torch.finfo(dtype).max), dtype)


def token_choice(
    difficulty: Tensor,
    valid: Tensor,
    focus_ratio: float | Tensor,
    temperature_scale: float | Tensor,
    base_temperature: float | Tensor,
    num_items: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(3)-(6) over all of these tokens: (selected, τ, n, k), the last two as `adakd::choose_tokens` has them."""
    selected, dtype = select_tokens(difficulty, focus_ratio, valid), difficulty.dtype
    temperature = unbounded_temperature(difficulty, selected, temperature_scale, base_temperature)
    temperature = loss_temperature(temperature, dtype).where(valid, loss_temperature(base_temperature, dtype))
    n = valid.sum()
    if num_items is None:
        items, count = n.clamp_min(1), focus_count(focus_ratio, n)
    else:
        items = tensor_on(num_items, n.device)
        items = torch.where(items == 0, 1, items)
        count = items.to(exact_dtype(items.device)) * focus_ratio
    return selected, temperature, items.to(dtype), count.to(dtype)


def power_of_two(items: Tensor) -> Tensor:
    """A power of two near `items`, by which the gradients of a mean over so many are scaled up until the backward.

    In fp16 the gradient of a mean over thousands of tokens would be 0 (below 6e-8); a power of two rounds nothing.
    """
    return items / torch.frexp(items).mantissa


def focus_step(
    loss: Tensor,
    focus_ratio: Tensor,
    loss_ema: Tensor,
    loss_reference: Tensor,
    steps: Tensor,
    warmup_steps: int,
    beta: float,
    epsilon: float,
    delta: float,
    min_ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(8) and (9) for one optimizer step: (r, L̄, L_ref, number of steps). A loss that is not finite changes nothing."""
    loss = loss.to(loss_ema)
    finite = loss.isfinite()
    ema = torch.where(steps == 0, loss, beta * loss_ema + (1.0 - beta) * loss)
    ema = torch.where(finite, ema, loss_ema)
    steps = steps + finite
    adapts = finite & (steps > warmup_steps)
    lower = adapts & (ema < loss_reference * (1.0 - epsilon))
    higher = adapts & (ema > loss_reference * (1.0 + epsilon))
    ratio = torch.where(lower, (focus_ratio * (1.0 - delta)).clamp_min(min_ratio), focus_ratio)
    ratio = torch.where(higher, (focus_ratio * (1.0 + delta)).clamp_max(1.0), ratio)
    renewed = (steps == warmup_steps) & finite | (ratio != focus_ratio)
    return ratio, ema, torch.where(renewed, ema, loss_reference), steps


class LossAdaptiveFocus(ExactModule):
    """The share r of the valid tokens that are selected, driven by the loss: LATF, equations (8) and (9).

    Buffers on the module's device hold the state, so it moves, saves, loads and resumes as any module does.

    Args:
        total_steps: optimizer steps of the whole run; sets the length of the warm-up.
        warmup_ratio: part of `total_steps` during which r = 1; at its end (after at least one step) L_ref = L̄.
        beta: decay of the moving average L̄, in [0, 1).
        epsilon: relative change of L̄ against L_ref beyond which r changes, in (0, 1).
        delta: relative change of r, in (0, 1).
        min_ratio: lower bound of r, in (0, 1].

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Example:
        >>> focus = LossAdaptiveFocus(total_steps=100, beta=0.0)
        >>> for loss in (2.0, 2.0, 2.0, 2.0, 2.0, 1.0):
        ...     focus.step(torch.tensor(loss))
        >>> round(focus.focus_ratio.item(), 2)
        0.95
    """

    focus_ratio: Tensor
    loss_ema: Tensor
    loss_reference: Tensor
    steps: Tensor

    def __init__(
        self,
        total_steps: int,
        *,
        warmup_ratio: float = 0.05,
        beta: float = 0.99,
        epsilon: float = 0.05,
        delta: float = 0.05,
        min_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        check_integer("total_steps", total_steps)
        if total_steps < 1:
            raise ValueError(f"total_steps must be the number of optimizer steps, at least 1, got {total_steps!r}")
        ranges: dict[str, tuple[float, Callable[[float], bool], str]] = {
            "warmup_ratio": (warmup_ratio, lambda x: 0.0 <= x <= 1.0, "in [0, 1]"),
            "beta": (beta, lambda x: 0.0 <= x < 1.0, "in [0, 1)"),
            "epsilon": (epsilon, lambda x: 0.0 < x < 1.0, "in (0, 1)"),
            "delta": (delta, lambda x: 0.0 < x < 1.0, "in (0, 1)"),
            "min_ratio": (min_ratio, lambda x: 0.0 < x <= 1.0, "in (0, 1]"),
        }
        for name, (value, fits, expected) in ranges.items():
            check_number(name, value)
            if not fits(value):
                raise ValueError(f"{name} must lie {expected}, got {value!r}")
        self.warmup_steps = max(1, math.ceil(warmup_ratio * total_steps))
        self.beta, self.epsilon, self.delta, self.min_ratio = beta, epsilon, delta, min_ratio
        self.register_buffer("focus_ratio", torch.ones((), dtype=torch.float64))
        self.register_buffer("loss_ema", torch.zeros((), dtype=torch.float64))
        self.register_buffer("loss_reference", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Take the loss L of (7) of one optimizer step, a 0-d tensor; call it once per optimizer step.

        A loss that is not finite (a skipped step of a gradient scaler) leaves the averages and r as they are.

        Raises:
            TypeError, ValueError: the loss is no tensor of one real number.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a 0-d tensor, got {type(loss).__name__}; pass torch.tensor(loss)")
        if loss.dim() != 0:
            raise ValueError(f"loss must be a 0-d tensor, got shape {tuple(loss.shape)}; pass its mean")
        if not loss.is_floating_point():
            raise TypeError(f"loss must be of a floating type, got {loss.dtype}")
        # The operator's module stands above this one, which is its reference.
        torch.ops.adakd.focus_step_(
            loss.detach().to(self.loss_ema.device), self.focus_ratio, self.loss_ema, self.loss_reference, self.steps,
            self.warmup_steps, self.beta, self.epsilon, self.delta, self.min_ratio,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"warmup_steps={self.warmup_steps}, beta={self.beta}, epsilon={self.epsilon}, delta={self.delta}, "
            f"min_ratio={self.min_ratio}"
        )


class ScheduledFocus(LossAdaptiveFocus):
    """A share r that does not follow the loss, for comparisons: it falls in a straight line.

    It is 1 in the warm-up, and `min_ratio` in the last step of the run. L̄ and L_ref of (8) and (9) are kept for the
    logs, without effect.

    Args:
        total_steps, warmup_ratio, beta, epsilon, delta, min_ratio: as in `LossAdaptiveFocus`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Example:
        >>> focus = ScheduledFocus(total_steps=5, warmup_ratio=0.2, min_ratio=0.4)
        >>> for _ in range(3):
        ...     focus.step(torch.tensor(1.0))
        >>> round(focus.focus_ratio.item(), 2)
        0.6
    """

    def __init__(self, total_steps: int, **options: float) -> None:
        super().__init__(total_steps, **options)
        self.total_steps = total_steps

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """As `LossAdaptiveFocus.step`; the next share depends on the number of steps alone."""
        super().step(loss)
        falling = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = ((self.steps - self.warmup_steps).to(self.focus_ratio) / falling).clamp(0.0, 1.0)
        self.focus_ratio.copy_(1.0 - (1.0 - self.min_ratio) * progress)
