"""`choose_tokens` and `focus_step_`: selection and temperatures of a batch ((3)-(6)), and a step of r ((8), (9)).

One program each. The selection looks for the k-th hardest token, and for the median of those, bit by bit: a sweep over
one number a token for each bit. These numbers stay in the caches; beside them it reads and writes ten bytes a token.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adaptive import clamped, exact_dtype, loss_temperature
from .launch import FUSED, on_device

MOST_ENTRIES = 4096


@triton.jit
def difficulty_key(difficulty, BITS: tl.constexpr, KEY: tl.constexpr, INT: tl.constexpr):
    """A number without sign that orders as the difficulty does: NaN is the largest, −0 is 0, and none is 0."""
    bits = tl.where(difficulty == 0.0, 0.0, difficulty).to(INT, bitcast=True)
    key = bits.to(KEY, bitcast=True)
    key = tl.where(bits < 0, key ^ tl.full((), 2**BITS - 1, KEY), key | tl.full((), 2 ** (BITS - 1), KEY))
    return tl.where(difficulty != difficulty, tl.full((), 2**BITS - 1, KEY), key)


@triton.jit
def difficulty_of_key(key, BITS: tl.constexpr, KEY: tl.constexpr, FLOAT: tl.constexpr):
    """The difficulty; the largest key of all gives NaN."""
    top = tl.full((), 2 ** (BITS - 1), KEY)
    return tl.where(key >= top, key ^ top, key ^ tl.full((), 2**BITS - 1, KEY)).to(FLOAT, bitcast=True)


@triton.jit(do_not_specialize=["N"])
def choose_tokens_kernel(
    Difficulty,  # (N,) in ACC
    Valid,  # (N,) bool
    Key,  # (N,) memory for keys of the difficulties
    FocusRatio,  # 0-d share r, or None for the number
    NumItems,  # 0-d, or None for the number
    Selected,  # (N,) result, bool
    Temperature,  # (N,) result, in ACC
    Items,  # 0-d results n and k, in ACC
    Count,
    N,
    focus_ratio: tl.float64,
    num_items: tl.float64,
    scale: tl.float64,  # c
    base: tl.float64,  # τ_base of a valid token, before τ is kept in its range
    other: tl.float64,  # τ of the other tokens
    ITEMS_GIVEN: tl.constexpr,
    LOWEST: tl.constexpr,  # range of τ
    HIGHEST: tl.constexpr,
    LARGE: tl.constexpr,  # what stands for an infinite difficulty
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,  # of ACC
    ACC: tl.constexpr,
):
    KEY: tl.constexpr = tl.uint32 if BITS == 32 else tl.uint64
    INT: tl.constexpr = tl.int32 if BITS == 32 else tl.int64
    of_n = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        inside = offs_n < N
        valid = inside & (tl.load(Valid + offs_n, mask=inside, other=0) != 0)
        key = difficulty_key(tl.load(Difficulty + offs_n, mask=inside, other=0.0), BITS, KEY, INT)
        tl.store(Key + offs_n, tl.where(valid, key, tl.full((), 0, KEY)), mask=inside)
        of_n += valid.to(tl.int32)
    n = tl.sum(of_n)
    tl.debug_barrier()  # the keys of one thread are read by others

    if FocusRatio is not None:
        r = tl.load(FocusRatio).to(tl.float64)
    else:
        r = tl.full((), focus_ratio, tl.float64)
    # The product in fp64: in fp32, 0.29·100 rounds up to 29. A share of NaN selects one token.
    k = tl.floor(r * n.to(tl.float64))
    k = tl.where(k > 1.0, k, 1.0)
    taken = tl.minimum(k, n.to(tl.float64)).to(tl.int32)
    if ITEMS_GIVEN:
        if NumItems is not None:
            items = tl.load(NumItems).to(tl.float64)
        else:
            items = tl.full((), num_items, tl.float64)
        items = tl.where(items == 0.0, 1.0, items)
        k = items * r
    else:
        items = tl.maximum(n, 1).to(tl.float64)
    tl.store(Items, items.to(ACC))
    tl.store(Count, k.to(ACC))

    # The keys of the token at place `taken`, and at place ⌊taken/2⌋ + 1: each the largest number that so many reach.
    middle = taken // 2 + 1
    bit = tl.full((), 2 ** (BITS - 1), KEY)
    last = tl.full((), 0, KEY)
    median = tl.full((), 0, KEY)
    above = tl.full((), 0, tl.int32)  # tokens that are harder than the one at place `taken`
    for _ in range(BITS):
        # Both counts in one number, so that the threads wait for one another once a bit.
        counts = tl.full((BLOCK,), 0, tl.int64)
        for start in range(0, N, BLOCK):
            offs_n = start + tl.arange(0, BLOCK)
            key = tl.load(Key + offs_n, mask=offs_n < N, other=0)
            counts += (key >= (last | bit)).to(tl.int64) + ((key >= (median | bit)).to(tl.int64) << 32)
        counts = tl.sum(counts)
        reach = counts.to(tl.int32)
        above = tl.where(reach >= taken, above, reach)
        last = tl.where(reach >= taken, last | bit, last)
        median = tl.where((counts >> 32).to(tl.int32) >= middle, median | bit, median)
        bit = bit >> 1

    # Of the tokens as hard as the last one, the first ones are selected.
    room = taken - above
    large = tl.full((), LARGE, ACC)
    zero = tl.full((), 0.0, ACC)
    lowest = tl.full((), LOWEST, ACC)
    highest = tl.full((), HIGHEST, ACC)
    m = within(difficulty_of_key(median, BITS, KEY, ACC), zero, large)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        inside = offs_n < N
        key = tl.load(Key + offs_n, mask=inside, other=0)
        valid = key != 0
        tied = (valid & (key == last)).to(tl.int32)
        selected = valid & ((key > last) | ((tied != 0) & (tl.cumsum(tied) <= room)))
        room -= tl.sum(tied)
        tl.store(Selected + offs_n, selected, mask=inside)
        s = within(tl.load(Difficulty + offs_n, mask=inside, other=0.0), zero, large)
        relative = tl.where(s + m == 0.0, 0.0, (s - m) / (s + m))
        tau = tl.full((), base, tl.float64).to(ACC) * tl.exp(-tl.full((), scale, tl.float64).to(ACC) * relative)
        tau = tl.where(valid, within(tau, lowest, highest), tl.full((), other, tl.float64).to(ACC))
        tl.store(Temperature + offs_n, tau, mask=inside)


@triton.jit
def within(x, low, high):
    """x, no less than `low` and no more than `high`; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


def choose_tokens_fwd(
    difficulty: Tensor,
    valid: Tensor,
    focus_ratio: float | Tensor,
    temperature_scale: float,
    base_temperature: float,
    num_items: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(...), (...) bool -> (...) selected and τ, and 0-d n and k."""
    dtype, size = difficulty.dtype, difficulty.numel()
    limits, bits = torch.finfo(dtype), 8 * difficulty.element_size()
    selected, temperature = (torch.empty(valid.shape, dtype=x.dtype, device=x.device) for x in (valid, difficulty))
    key = torch.empty(size, dtype=torch.uint64 if bits == 64 else torch.uint32, device=difficulty.device)
    items, count = (torch.empty((), dtype=dtype, device=difficulty.device) for _ in range(2))
    # A 0-d tensor may lie on the CPU.
    share, given = (x.to(difficulty.device) if isinstance(x, Tensor) else None for x in (focus_ratio, num_items))
    block = min(MOST_ENTRIES, max(128, triton.next_power_of_2(size)))
    with on_device(difficulty):
        choose_tokens_kernel[(1,)](
            difficulty.contiguous(), valid.contiguous(), key, share, given, selected, temperature, items, count, size,
            1.0 if isinstance(focus_ratio, Tensor) else float(focus_ratio),
            1.0 if num_items is None or isinstance(num_items, Tensor) else float(num_items),
            float(clamped(temperature_scale, -limits.max, limits.max, dtype)),
            float(clamped(base_temperature, limits.tiny, limits.max, dtype)),
            float(loss_temperature(base_temperature, dtype)),
            ITEMS_GIVEN=num_items is not None, LOWEST=math.sqrt(limits.tiny), HIGHEST=math.sqrt(limits.max),
            LARGE=0.25 * limits.max, BLOCK=block, BITS=bits, ACC=tl.float64 if bits == 64 else tl.float32,
            num_warps=max(1, block // 256), **FUSED,
        )  # fmt: skip
    return selected, temperature, items, count


@triton.jit
def focus_step_kernel(
    Loss,  # 0-d
    FocusRatio,  # 0-d state, fp64 but the steps, which are int64
    LossEma,
    LossReference,
    Steps,
    warmup_steps,
    beta: tl.float64,
    epsilon: tl.float64,
    delta: tl.float64,
    min_ratio: tl.float64,
):
    loss = tl.load(Loss).to(tl.float64)
    old = tl.load(FocusRatio)
    ema = tl.load(LossEma)
    reference = tl.load(LossReference)
    steps = tl.load(Steps)
    one = tl.full((), 1.0, tl.float64)
    beta = tl.full((), beta, tl.float64)
    epsilon = tl.full((), epsilon, tl.float64)
    delta = tl.full((), delta, tl.float64)
    # A loss that is not finite leaves everything as it is.
    if tl.abs(loss) < float("inf"):
        ema = tl.where(steps == 0, loss, beta * ema + (one - beta) * loss)
        steps += 1
        ratio = old
        if steps > warmup_steps:
            if ema < reference * (one - epsilon):
                ratio = tl.maximum(old * (one - delta), tl.full((), min_ratio, tl.float64))
            elif ema > reference * (one + epsilon):
                ratio = tl.minimum(old * (one + delta), one)
        if (steps == warmup_steps) | (ratio != old):
            tl.store(LossReference, ema)
        tl.store(FocusRatio, ratio)
        tl.store(LossEma, ema)
        tl.store(Steps, steps)


def focus_step_over(
    loss: Tensor, focus_ratio: Tensor, loss_ema: Tensor, loss_reference: Tensor, steps: Tensor, *options: float
) -> None:
    """A step of the state, with `warmup_steps`, beta, epsilon, delta and `min_ratio`."""
    assert loss_ema.dtype == exact_dtype(loss.device)
    with on_device(loss):
        focus_step_kernel[(1,)](loss, focus_ratio, loss_ema, loss_reference, steps, *options, num_warps=1, **FUSED)
