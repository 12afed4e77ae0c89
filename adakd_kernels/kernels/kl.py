"""Forward and reverse KL of two rows, and their sum, in one sweep (docs/maths.md, section 5.2).

Logarithms are to base 2 until the results are returned.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .peak import TokenResult, find_peak, lane_with_peak, load_rest_of_lane
from .rows import (
    LN2,
    UNIT,
    Normalizers,
    Rows,
    below,
    edge_entries,
    edge_start,
    load_tile,
    log2_1p,
    log2_mass,
    lowest,
    saturated,
    shrink,
    whole_steps,
)


class KlSums(NamedTuple):
    """The running sums of every lane for both KL divergences, (LANES,) each, unnormalised.

    x and y are the differences of a logit to its row's maximum, by `below`.
    """

    l_s: tl.tensor  # Σ 2^(x·scale)
    l_t: tl.tensor  # Σ 2^(y·scale)
    keep_s: tl.tensor  # Σ q over the finite entries
    keep_t: tl.tensor  # Σ p over them
    gap_s: tl.tensor  # Σ q·(x − y)
    gap_t: tl.tensor  # Σ p·(y − x)
    lost_s: tl.tensor  # Σ q over the entries at which the teacher has −inf


class KlResult(NamedTuple):
    """What a sweep finds of a row for both KL divergences, not yet cut off at the type's range."""

    forward: tl.tensor  # KL(p‖q)
    kept: tl.tensor  # Σ p over the finite entries
    reverse: tl.tensor  # KL(q‖p)
    lost: tl.tensor  # Σ q over the entries that are not finite
    peak: tl.tensor  # offset of the student's peak from the row's aligned start
    t_peak: tl.tensor  # the teacher's logit there
    forward_rest: tl.tensor  # −τ·∂D/∂zˢ there
    reverse_rest: tl.tensor


@triton.jit
def move_maxima(f_s, f_t, m_s, m_t, new_s, new_t, sums):
    """`KlSums` below new maxima, where masses shrink by f: a gap moves by its mass times the change of x − y."""
    moved = below(m_s, new_s) - below(m_t, new_t)
    gap_s = (sums.gap_s + sums.keep_s * moved) * f_s
    gap_t = (sums.gap_t - sums.keep_t * moved) * f_t
    return KlSums(sums.l_s * f_s, sums.l_t * f_t, sums.keep_s * f_s, sums.keep_t * f_t, gap_s, gap_t, sums.lost_s * f_s)


@triton.jit
def add_kl(s, t, scale, m_s, m_t, sums, GUARDED: tl.constexpr):
    """`KlSums` with those of a tile, below maxima that broadcast with it.

    Without guards, an entry at −inf on either side leaves neither gap finite.
    """
    x = below(s, m_s)
    y = below(t, m_t)
    a = tl.exp2(x * scale)
    b = tl.exp2(y * scale)
    # (LANES, VEC) masses of the finite entries: a is 0 where s is −inf already.
    a_kept = a
    b_kept = b
    if GUARDED:
        # Lower than any finite difference: 0·(x − y) is 0 where an entry is −inf.
        FLOOR: tl.constexpr = 2.0 * UNIT * lowest(s.dtype)
        x = tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        y = tl.maximum(y, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        a_kept = tl.where(t != -float("inf"), a, 0.0)
        b_kept = tl.where(s != -float("inf"), b, 0.0)
    return KlSums(
        sums.l_s + tl.sum(a, 1),
        sums.l_t + tl.sum(b, 1),
        sums.keep_s + tl.sum(a_kept, 1),
        sums.keep_t + tl.sum(b_kept, 1),
        sums.gap_s + tl.sum(a_kept * (x - y), 1),
        sums.gap_t + tl.sum(b_kept * (y - x), 1),
        sums.lost_s + tl.sum(tl.where(t != -float("inf"), 0.0, a), 1),
    )


@triton.jit
def fold_kl(rows, start, m_s, m_t, sums, EDGE: tl.constexpr, GUARDED: tl.constexpr):
    """(m_s, m_t, `KlSums`) after one more step. The compiler removes sums that the kernel does not use."""
    s = load_tile(rows.S, start, rows, EDGE)
    t = load_tile(rows.T, start, rows, EDGE)
    new_s = tl.maximum(m_s, tl.max(s, 1))
    new_t = tl.maximum(m_t, tl.max(t, 1))
    if rows.TILES == 2:
        s_2 = load_tile(rows.S, start + rows.LANES * rows.VEC, rows, EDGE)
        t_2 = load_tile(rows.T, start + rows.LANES * rows.VEC, rows, EDGE)
        new_s = tl.maximum(new_s, tl.max(s_2, 1))
        new_t = tl.maximum(new_t, tl.max(t_2, 1))
    f_s = tl.exp2(below(m_s, new_s) * rows.scale)
    f_t = tl.exp2(below(m_t, new_t) * rows.scale)
    sums = move_maxima(f_s, f_t, m_s, m_t, new_s, new_t, sums)
    sums = add_kl(s, t, rows.scale, new_s[:, None], new_t[:, None], sums, GUARDED)
    if rows.TILES == 2:
        sums = add_kl(s_2, t_2, rows.scale, new_s[:, None], new_t[:, None], sums, GUARDED)
    return new_s, new_t, sums


@triton.jit
def only(chosen, sums):
    """`KlSums` of the chosen lanes, 0 in the others."""
    return KlSums(
        tl.where(chosen, sums.l_s, 0.0),
        tl.where(chosen, sums.l_t, 0.0),
        tl.where(chosen, sums.keep_s, 0.0),
        tl.where(chosen, sums.keep_t, 0.0),
        tl.where(chosen, sums.gap_s, 0.0),
        tl.where(chosen, sums.gap_t, 0.0),
        tl.where(chosen, sums.lost_s, 0.0),
    )


@triton.jit
def sweep_lanes(rows, GUARDED: tl.constexpr):
    """(m_s, m_t, `KlSums`) of every lane after the row.

    Without guards, nothing counts as lost, and no gap is finite in a lane that has met an entry at −inf.
    """
    STEP: tl.constexpr = rows.TILES * rows.LANES * rows.VEC
    first, end = whole_steps(rows.V, STEP, rows.SKEWED)
    zero = tl.zeros((rows.LANES,), rows.scale.dtype)
    m_s = tl.full((rows.LANES,), lowest(rows.scale.dtype), rows.scale.dtype)
    m_t = m_s
    sums = KlSums(zero, zero, zero, zero, zero, zero, zero)
    for i in range(0, edge_entries(rows.V, rows.V, STEP, rows.SKEWED), STEP):
        start = edge_start(i, rows.V, STEP, rows.SKEWED)
        m_s, m_t, sums = fold_kl(rows, start, m_s, m_t, sums, True, True)
    if GUARDED:
        for start in range(first, end, STEP):
            m_s, m_t, sums = fold_kl(rows, start, m_s, m_t, sums, False, True)
    else:
        clean = (sums.lost_s == 0.0) & (sums.l_t == sums.keep_t)
        l_s = sums.l_s
        l_t = sums.l_t
        gap_s = tl.where(clean, sums.gap_s, float("nan"))
        gap_t = tl.where(clean, sums.gap_t, float("nan"))
        for start in range(first, end, STEP):
            sums = KlSums(l_s, l_t, l_s, l_t, gap_s, gap_t, zero)
            m_s, m_t, sums = fold_kl(rows, start, m_s, m_t, sums, False, False)
            l_s = sums.l_s
            l_t = sums.l_t
            gap_s = sums.gap_s
            gap_t = sums.gap_t
        sums = KlSums(l_s, l_t, l_s, l_t, gap_s, gap_t, zero)
    return m_s, m_t, sums


@triton.jit
def sweep_both(rows, rounding, DIVERGENCE: tl.constexpr, LOST: tl.constexpr):
    """(`Normalizers`, `KlResult`) of a row; `rounding` is that of its scale.

    LOST: the lost mass has a sum of its own. As the difference l_s − keep_s it would lose its digits where it is small.
    """
    lane_m_s, lane_m_t, sums = sweep_lanes(rows, False)
    # The gap that this divergence needs anyway.
    gap = tl.sum(sums.gap_t if DIVERGENCE == "forward_kl" else sums.gap_s, 0)
    if gap - gap != 0.0:
        # One tile a step takes fewer registers.
        lane_m_s, lane_m_t, sums = sweep_lanes(
            Rows(rows.S, rows.T, rows.skew, rows.scale, rows.V, rows.SKEWED, 1, rows.LANES, rows.VEC, rows.WIDTH), True
        )
    if LOST:  # so that the loop has as many sums as without
        sums = KlSums(
            sums.keep_s + sums.lost_s, sums.l_t, sums.keep_s, sums.keep_t, sums.gap_s, sums.gap_t, sums.lost_s
        )
    m_s, lane = lane_with_peak(lane_m_s, sums.l_s)
    m_t = tl.max(lane_m_t, 0)
    f_s = shrink(lane_m_s, m_s, rows.scale, rounding)
    f_t = shrink(lane_m_t, m_t, rows.scale, rounding)
    sums = move_maxima(f_s, f_t, lane_m_s, lane_m_t, m_s, m_t, sums)
    peak, t_peak = find_peak(rows, m_s, lane)
    # From here on the sums are over the entries beside the peak: those of its lane are computed anew.
    sums = only(tl.arange(0, rows.LANES) != lane, sums)
    start = lane * rows.WIDTH
    while start < rows.V + rows.skew:
        s, t = load_rest_of_lane(rows, start, peak)
        sums = add_kl(s, t, rows.scale, m_s, m_t, sums, True)
        start += rows.LANES * rows.LANES * rows.WIDTH
    finite = t_peak != -float("inf")
    y = tl.maximum(below(t_peak, m_t), 2.0 * UNIT * lowest(rows.scale.dtype), propagate_nan=tl.PropagateNan.ALL)
    b = shrink(t_peak, m_t, rows.scale, rounding)
    y = tl.where(finite, y, 0.0)
    # With c = −g/q of the peak, g + c·q is 0 there, and the gradient is −q·S, S = Σ (g + c·q) over the others. What
    # cancels in S does so in every lane, before the lanes' sums are rounded.
    gap_s = tl.sum(sums.gap_s + sums.keep_s * y, 0)
    gap_t = tl.sum(sums.gap_t, 0)
    forward_rest = tl.sum(b * sums.l_s - sums.keep_t, 0)
    tail_s = tl.sum(sums.l_s, 0)
    tail_t = tl.sum(sums.l_t, 0)
    keep_s = tl.sum(sums.keep_s, 0)
    keep_t = tl.sum(sums.keep_t, 0)
    # A student without finite entries has no mass; the peak of any other one has unnormalised mass 1.
    found = peak < rows.V + rows.skew
    l_s = tail_s + tl.where(found, 1.0, 0.0)
    l_t = tail_t + b
    some_s = tl.where(l_s == 0.0, 1.0, l_s)
    some_t = tl.where(l_t == 0.0, 1.0, l_t)
    q = tl.where(finite, 1.0 / some_s, 0.0)
    log_ratio = tl.where(b == 1.0, log2_1p(tail_t), tl.log2(some_t)) - log2_1p(tail_s)
    gap = log_ratio - log2_mass(t_peak, m_t, 0.0, rows.scale)  # log2(q/p) of the peak
    gap = tl.where(finite, gap, log_ratio)
    # Multiplied by the scale last: a difference times a small mass may be in the type's range where it alone is not.
    q_kept = keep_s / some_s + q
    reverse = LN2 * ((gap_s / some_s - y * q_kept) * rows.scale + log_ratio * q_kept)
    reverse_rest = LN2 * (gap_s / some_s * q * rows.scale)
    forward = LN2 * (gap_t / some_t * rows.scale - keep_t / some_t * log_ratio - b / some_t * gap)
    tail_lost = tl.sum(sums.lost_s, 0) if LOST else tail_s - keep_s
    # Where the teacher has −inf at the peak, the peak is the only entry of l_s beside tail_s.
    q_lost = tail_lost / some_s + tl.where(found & (t_peak == -float("inf")), 1.0 / some_s, 0.0)
    p_kept = (keep_t + b) / some_t
    reverse_rest -= (LN2 * gap + 1.0) * (q_lost * q)
    forward_rest *= q / some_t
    return Normalizers(m_s, l_s, m_t, l_t), KlResult(
        forward, p_kept, reverse, q_lost, peak, t_peak, forward_rest, reverse_rest
    )


@triton.jit
def sweep_kl(rows, rounding, DIVERGENCE: tl.constexpr):
    """(`Normalizers`, `TokenResult`) of a row: forward KL, reverse KL or their sum; `rounding` is that of its scale."""
    normalizers, both = sweep_both(rows, rounding, DIVERGENCE, False)
    if DIVERGENCE == "forward_kl":
        d = both.forward
        sum_g = -both.kept
        rest_g = both.forward_rest
    elif DIVERGENCE == "reverse_kl":
        d = both.reverse
        sum_g = both.reverse - both.lost
        rest_g = both.reverse_rest
    else:
        tl.static_assert(DIVERGENCE == "jeffreys", "a divergence of one sweep needs a fold of its own")
        d = both.forward + both.reverse
        sum_g = both.reverse - both.lost - both.kept
        rest_g = both.reverse_rest + both.forward_rest
    # Where D leaves the type's range, Σg stops where the backward's log-ratios do, so that the two cancel there too.
    sum_g = tl.minimum(saturated(sum_g), -LN2 * lowest(rows.scale.dtype), propagate_nan=tl.PropagateNan.ALL)
    return normalizers, TokenResult(saturated(d), sum_g, both.peak, both.t_peak, saturated(-rest_g))
