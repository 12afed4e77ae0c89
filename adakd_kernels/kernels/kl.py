"""Forward and reverse KL of two rows, and their sum, in one sweep (docs/maths.md, section 5.2).

Logarithms are to base 2 until the results are returned.
"""

import triton
import triton.language as tl

from .peak import find_peak, lane_with_peak, load_rest_of_lane
from .rows import (
    LN2,
    UNIT,
    below,
    edge_entries,
    edge_start,
    finite,
    load_tile,
    log2_1p,
    log2_mass,
    lowest,
    shrink,
    whole_steps,
)


@triton.jit
def move_maxima(f_s, f_t, m_s, m_t, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t):
    """The sums of `fold_kl` below new maxima, where masses shrink by f: a gap moves by its mass times that of x − y."""
    moved = below(m_s, new_s) - below(m_t, new_t)
    gap_s = (gap_s + keep_s * moved) * f_s
    gap_t = (gap_t - keep_t * moved) * f_t
    return l_s * f_s, l_t * f_t, keep_s * f_s, keep_t * f_t, gap_s, gap_t


@triton.jit
def add_kl(s, t, scale, m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t):
    """The sums of `fold_kl` with those of a tile, below maxima that broadcast with it."""
    x = below(s, m_s)
    y = below(t, m_t)
    a = tl.exp2(x * scale)
    b = tl.exp2(y * scale)
    # Lower than any finite difference: 0·(x − y) is 0 where an entry is −inf.
    FLOOR: tl.constexpr = 2.0 * UNIT * lowest(s.dtype)
    x = tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(y, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    a_kept = tl.where(t != -float("inf"), a, 0.0)
    b_kept = tl.where(s != -float("inf"), b, 0.0)
    gap_s += tl.sum(a_kept * (x - y), 1)
    gap_t += tl.sum(b_kept * (y - x), 1)
    keep_s += tl.sum(a_kept, 1)
    keep_t += tl.sum(b_kept, 1)
    return l_s + tl.sum(a, 1), l_t + tl.sum(b, 1), keep_s, keep_t, gap_s, gap_t


@triton.jit
def fold_kl(
    S, T, start, skew, scale, m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t, V: tl.constexpr, SKEWED: tl.constexpr,
    EDGE: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A step of every lane's normalisers and, for both KL divergences, mass and summed log-ratio of what counts.

    keep_s = Σ q and keep_t = Σ p over the entries that are −inf on no side, gap_s = Σ q·(x − y) and gap_t = Σ p·(y −
    x), all unnormalised, x and y the logits' differences to their maxima by `below`. The compiler removes the sums that
    DIVERGENCE does not use.
    """
    s = load_tile(S, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
    t = load_tile(T, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
    new_s = tl.maximum(m_s, tl.max(s, 1))
    new_t = tl.maximum(m_t, tl.max(t, 1))
    if TILES == 2:
        s_2 = load_tile(S, start + LANES * VEC, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
        t_2 = load_tile(T, start + LANES * VEC, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
        new_s = tl.maximum(new_s, tl.max(s_2, 1))
        new_t = tl.maximum(new_t, tl.max(t_2, 1))
    f_s = tl.exp2(below(m_s, new_s) * scale)
    f_t = tl.exp2(below(m_t, new_t) * scale)
    l_s, l_t, keep_s, keep_t, gap_s, gap_t = move_maxima(
        f_s, f_t, m_s, m_t, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t
    )
    l_s, l_t, keep_s, keep_t, gap_s, gap_t = add_kl(
        s, t, scale, new_s[:, None], new_t[:, None], l_s, l_t, keep_s, keep_t, gap_s, gap_t
    )
    if TILES == 2:
        l_s, l_t, keep_s, keep_t, gap_s, gap_t = add_kl(
            s_2, t_2, scale, new_s[:, None], new_t[:, None], l_s, l_t, keep_s, keep_t, gap_s, gap_t
        )
    return new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t


@triton.jit
def sweep_kl(
    S, T, skew, scale, share, V: tl.constexpr, SKEWED: tl.constexpr, DIVERGENCE: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(m_s, m_t, l_s, l_t, D, Σg, peak, its logit in t, gradient there): forward KL, reverse KL or their sum."""
    STEP: tl.constexpr = TILES * LANES * VEC
    zero = tl.zeros((LANES,), ACC)
    m_s = tl.full((LANES,), lowest(ACC), ACC)
    m_t = m_s
    l_s = zero
    l_t = zero
    keep_s = zero
    keep_t = zero
    gap_s = zero
    gap_t = zero
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t = fold_kl(
            S, T, edge_start(i, V, STEP, SKEWED), skew, scale, m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t,
            V, SKEWED, True, TILES, LANES, VEC, ACC,
        )  # fmt: skip
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t = fold_kl(
            S, T, start, skew, scale, m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t,
            V, SKEWED, False, TILES, LANES, VEC, ACC,
        )  # fmt: skip
    new_s, lane = lane_with_peak(m_s, l_s)
    new_t = tl.max(m_t, 0)
    f_s = shrink(m_s, new_s, scale, share)
    f_t = shrink(m_t, new_t, scale, share)
    l_s, l_t, keep_s, keep_t, gap_s, gap_t = move_maxima(
        f_s, f_t, m_s, m_t, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t
    )
    # From here on the sums are over the entries beside the peak: those of its lane are taken anew.
    peak, t_peak = find_peak(S, T, new_s, lane, skew, V, SKEWED, LANES, VEC, ACC)
    other = tl.arange(0, LANES) != lane
    l_s = tl.where(other, l_s, 0.0)
    l_t = tl.where(other, l_t, 0.0)
    keep_s = tl.where(other, keep_s, 0.0)
    keep_t = tl.where(other, keep_t, 0.0)
    gap_s = tl.where(other, gap_s, 0.0)
    gap_t = tl.where(other, gap_t, 0.0)
    start = lane * VEC
    while start < V + skew:
        s, t = load_rest_of_lane(S, T, start, peak, skew, V, SKEWED, LANES, VEC, ACC)
        l_s, l_t, keep_s, keep_t, gap_s, gap_t = add_kl(
            s, t, scale, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t
        )
        start += LANES * LANES * VEC
    # With c = −g/q of the peak, g + c·q is 0 there, and the gradient is −q·S, S = Σ (g + c·q) over the others. What
    # cancels in S does so in every lane, before the lanes' sums are rounded.
    counts = t_peak != -float("inf")
    y = tl.maximum(below(t_peak, new_t), 2.0 * UNIT * lowest(ACC), propagate_nan=tl.PropagateNan.ALL)
    b = shrink(t_peak, new_t, scale, share)
    y = tl.where(counts, y, 0.0)
    gap_s = tl.sum(gap_s + keep_s * y, 0)
    gap_t = tl.sum(gap_t, 0)
    forward_rest = tl.sum(b * l_s - keep_t, 0)
    tail_s = tl.sum(l_s, 0)
    tail_t = tl.sum(l_t, 0)
    keep_s = tl.sum(keep_s, 0)
    keep_t = tl.sum(keep_t, 0)
    # A student without finite entries has no mass; the peak of any other one has unnormalised mass 1.
    found = peak < V + skew
    l_s = tail_s + tl.where(found, 1.0, 0.0)
    l_t = tail_t + b
    some_s = tl.where(l_s == 0.0, 1.0, l_s)
    some_t = tl.where(l_t == 0.0, 1.0, l_t)
    q = tl.where(counts, 1.0 / some_s, 0.0)
    log_ratio = tl.where(b == 1.0, log2_1p(tail_t), tl.log2(some_t)) - log2_1p(tail_s)
    gap = log_ratio - log2_mass(t_peak, new_t, 0.0, scale)  # log2(q/p) of the peak
    gap = tl.where(counts, gap, log_ratio)
    # Multiplied by the scale last: a difference times a small mass may be in the type's range where it alone is not.
    q_kept = keep_s / some_s + q
    reverse = LN2 * ((gap_s / some_s - y * q_kept) * scale + log_ratio * q_kept)
    reverse_rest = LN2 * (gap_s / some_s * q * scale)
    forward = LN2 * (gap_t / some_t * scale - keep_t / some_t * log_ratio - b / some_t * gap)
    # Where the peak does not count, it is the only entry of l_s beside tail_s.
    q_lost = (tail_s - keep_s) / some_s + tl.where(found & (t_peak == -float("inf")), 1.0 / some_s, 0.0)
    p_kept = (keep_t + b) / some_t
    reverse_rest -= (LN2 * gap + 1.0) * (q_lost * q)
    forward_rest *= q / some_t
    if DIVERGENCE == "forward_kl":
        d = forward
        sum_g = -p_kept
        rest_g = forward_rest
    elif DIVERGENCE == "reverse_kl":
        d = reverse
        sum_g = reverse - q_lost
        rest_g = reverse_rest
    else:
        tl.static_assert(DIVERGENCE == "jeffreys", "a divergence of one sweep needs a fold of its own")
        d = forward + reverse
        sum_g = reverse - q_lost - p_kept
        rest_g = reverse_rest + forward_rest
    # Where D leaves the type's range, Σg stops where the backward's log-ratios do, so that the two cancel there too.
    sum_g = tl.minimum(finite(sum_g), -LN2 * lowest(ACC), propagate_nan=tl.PropagateNan.ALL)
    return new_s, new_t, l_s, l_t, finite(d), sum_g, peak, t_peak, finite(-rest_g)
