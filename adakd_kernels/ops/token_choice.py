"""`adakd::choose_tokens` and `adakd::focus_step_`: (3)-(6), and (8) with (9), of docs/maths.md in one kernel each.

The reference is in `adaptive.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adaptive import exact_dtype, focus_step, tensor_on, token_choice
from .backends import call, operator, register_fake, register_triton

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def choose_tokens(
    difficulty: Tensor,
    valid: Tensor,
    focus_ratio: float | Tensor,
    num_items: float | Tensor | None,
    temperature_scale: float,
    base_temperature: float,
) -> Four:
    """`adakd::choose_tokens`, whose two arguments for a number or a tensor are one here."""
    if torch.compiler.is_compiling():  # a graph would hold a number as a constant, and be compiled anew for the next
        exact, device = exact_dtype(difficulty.device), difficulty.device
        focus_ratio = tensor_on(focus_ratio, device, exact)
        num_items = None if num_items is None else tensor_on(num_items, device, exact)
    share, items = (x if isinstance(x, Tensor) else None for x in (focus_ratio, num_items))
    result: Four = call(
        _choose_tokens, difficulty, valid, share, 1.0 if isinstance(focus_ratio, Tensor) else focus_ratio,
        items, None if isinstance(num_items, Tensor) else num_items, temperature_scale, base_temperature,
    )  # fmt: skip
    return result


@operator("choose_tokens")
def _choose_tokens(
    difficulty: Tensor,
    valid: Tensor,
    share: Tensor | None,
    focus_ratio: float,
    items: Tensor | None,
    num_items: float | None,
    temperature_scale: float,
    base_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which tokens are selected, at which temperature, and what the sums of (7) are divided by.

    Args:
        difficulty: (...) of the accumulation type, no less than 0 up to rounding.
        valid: (...) bool.
        share, focus_ratio: the share r, a 0-d tensor or where this is None a number.
        items, num_items: number of valid tokens of the optimizer step, likewise; both None for the n that are here.
        temperature_scale, base_temperature: c and τ_base of (6).

    Returns:
        (selected, τ, n, k), (...) bool, (...), and 0-d, the last three in the type of the difficulty: τ is the base
        temperature where a token is not valid; n and k are the divisors, r·num_items in the place of ⌊r·n⌋ where
        num_items is given. None of them is 0.
    """
    return token_choice(
        difficulty,
        valid,
        focus_ratio if share is None else share,
        temperature_scale,
        base_temperature,
        num_items if items is None else items,
    )


@register_fake(_choose_tokens)
def _(difficulty: Tensor, valid: Tensor, *args: Any) -> Four:
    numbers = (torch.empty_like(difficulty), difficulty.new_empty(()), difficulty.new_empty(()))
    return torch.empty_like(valid), *numbers


@register_triton(_choose_tokens)
def _(
    difficulty: Tensor,
    valid: Tensor,
    share: Tensor | None,
    focus_ratio: float,
    items: Tensor | None,
    num_items: float | None,
    temperature_scale: float,
    base_temperature: float,
) -> Four:
    from ..kernels.token_choice import choose_tokens_fwd

    r, count = focus_ratio if share is None else share, num_items if items is None else items
    return choose_tokens_fwd(difficulty, valid, r, temperature_scale, base_temperature, count)


@torch.library.custom_op("adakd::focus_step_", mutates_args=("focus_ratio", "loss_ema", "loss_reference", "steps"))
def focus_step_(
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
) -> None:
    """Equations (8) and (9) over the state of `LossAdaptiveFocus`: 0-d tensors, in fp64 but the steps, in int64."""
    state = (focus_ratio, loss_ema, loss_reference, steps)
    for old, new in zip(state, focus_step(loss, *state, warmup_steps, beta, epsilon, delta, min_ratio), strict=True):
        old.copy_(new)


@focus_step_.register_fake
def _(*args: Any) -> None:
    return None


@register_triton(focus_step_)
def _(*args: Any) -> None:
    from ..kernels.token_choice import focus_step_over

    focus_step_over(*args)
