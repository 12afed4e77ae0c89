"""Squared Hellinger distance of two rows in one sweep, without cancellation (docs/maths.md, section 5)."""

import triton
import triton.language as tl

from .peak import find_peak, lane_with_peak, load_rest_of_lane
from .rows import below, edge_entries, edge_start, load_tile, lowest, shrink, whole_steps

# A sum over any entry is at least 1, the mass of the largest; one over none stands for so little that it adds nothing.
NONE = tl.constexpr(1.0e-12)


@triton.jit
def balance(l_s, l_t):
    """√(l_s/l_t) and √(l_t/l_s) from one root."""
    l_s = tl.maximum(l_s, NONE)
    l_t = tl.maximum(l_t, NONE)
    rcp = tl.rsqrt(l_s * l_t)
    return l_s * rcp, l_t * rcp


@triton.jit
def moved_distance(l_s, h, f_s, f_t, kappa, rcp_old):
    """l_s·s² of entries whose roots shrink by f_s and f_t and whose balance becomes kappa, from 1/kappa before."""
    step = f_t * (kappa * rcp_old)
    apart = f_s - step
    return f_s * step * h + 0.5 * tl.maximum(l_s, NONE) * (apart * apart)


@triton.jit
def fold_hellinger(
    S, T, start, skew, scale, m_s, m_t, l_s, l_t, h, rcp, both, V: tl.constexpr, SKEWED: tl.constexpr,
    EDGE: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A step of every lane's normalisers and l_s·s², s² = 1 − Σ√(pq), from two exponentials an entry.

    `scale` is that of half the logits: a = 2^((s − m_s)/2τ·log2(e)) and b are roots of unnormalised masses, l_s = Σa²,
    l_t = Σb², kappa = √(l_s/l_t), h = ½ Σ(a − kappa·b)² and rcp = 1/kappa (docs/maths.md, section 5), both = Σab.
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
    a = tl.exp2(below(s, new_s[:, None]) * scale)
    b = tl.exp2(below(t, new_t[:, None]) * scale)
    new_l_s = l_s * (f_s * f_s) + tl.sum(a * a, 1)
    new_l_t = l_t * (f_t * f_t) + tl.sum(b * b, 1)
    both = both * (f_s * f_t) + tl.sum(a * b, 1)
    if TILES == 2:
        a_2 = tl.exp2(below(s_2, new_s[:, None]) * scale)
        b_2 = tl.exp2(below(t_2, new_t[:, None]) * scale)
        new_l_s += tl.sum(a_2 * a_2, 1)
        new_l_t += tl.sum(b_2 * b_2, 1)
        both += tl.sum(a_2 * b_2, 1)
    kappa, new_rcp = balance(new_l_s, new_l_t)
    d = a - kappa[:, None] * b
    h = moved_distance(l_s, h, f_s, f_t, kappa, rcp) + 0.5 * tl.sum(d * d, 1)
    if TILES == 2:
        d_2 = a_2 - kappa[:, None] * b_2
        h += 0.5 * tl.sum(d_2 * d_2, 1)
    return new_s, new_t, new_l_s, new_l_t, h, new_rcp, both


@triton.jit
def sweep_lanes(
    S, T, skew, scale, V: tl.constexpr, SKEWED: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What `fold_hellinger` carries, after the row. The compiler removes Σab where it is not used."""
    STEP: tl.constexpr = TILES * LANES * VEC
    m_s = tl.full((LANES,), lowest(ACC), ACC)
    m_t = m_s
    l_s = tl.zeros((LANES,), ACC)
    l_t = l_s
    h = l_s
    both = l_s
    rcp = tl.full((LANES,), 1.0, ACC)
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        start = edge_start(i, V, STEP, SKEWED)
        m_s, m_t, l_s, l_t, h, rcp, both = fold_hellinger(
            S, T, start, skew, scale, m_s, m_t, l_s, l_t, h, rcp, both, V, SKEWED, True, TILES, LANES, VEC, ACC
        )
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        m_s, m_t, l_s, l_t, h, rcp, both = fold_hellinger(
            S, T, start, skew, scale, m_s, m_t, l_s, l_t, h, rcp, both, V, SKEWED, False, TILES, LANES, VEC, ACC
        )
    return m_s, m_t, l_s, l_t, h, rcp, both


@triton.jit
def row_distance(l_s, l_t, h, rcp, f_s, f_t, sum_s, sum_t):
    """s² of a row from its lanes' sums, what their roots shrink by, and the row's normalisers; 0 for an empty row."""
    kappa, _ = balance(sum_s, sum_t)
    h = tl.sum(moved_distance(l_s, h, f_s, f_t, kappa, rcp), 0) / tl.where(sum_s == 0.0, 1.0, sum_s)
    h = tl.where(h > 1.0, 1.0, h)
    return tl.where((sum_s == 0.0) | (sum_t == 0.0), 0.0, h)


@triton.jit
def sweep_distance(
    S, T, skew, scale, share, V: tl.constexpr, SKEWED: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(m_s, m_t, l_s, l_t, s²) of a row."""
    half = 0.5 * scale
    m_s, m_t, l_s, l_t, h, rcp, _ = sweep_lanes(S, T, skew, half, V, SKEWED, TILES, LANES, VEC, ACC)
    new_s = tl.max(m_s, 0)
    new_t = tl.max(m_t, 0)
    f_s = shrink(m_s, new_s, half, share)
    f_t = shrink(m_t, new_t, half, share)
    sum_s = tl.sum(l_s * (f_s * f_s), 0)
    sum_t = tl.sum(l_t * (f_t * f_t), 0)
    return new_s, new_t, sum_s, sum_t, row_distance(l_s, l_t, h, rcp, f_s, f_t, sum_s, sum_t)


@triton.jit
def sweep_hellinger(
    S, T, skew, scale, share, V: tl.constexpr, SKEWED: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(m_s, m_t, l_s, l_t, s², Σg, peak, its logit in t, gradient there) of a row."""
    half = 0.5 * scale
    m_s, m_t, l_s, l_t, h, rcp, both = sweep_lanes(S, T, skew, half, V, SKEWED, TILES, LANES, VEC, ACC)
    new_s, lane = lane_with_peak(m_s, l_s)
    new_t = tl.max(m_t, 0)
    f_s = shrink(m_s, new_s, half, share)
    f_t = shrink(m_t, new_t, half, share)
    # The sums over the entries beside the peak: those of its lane are taken anew.
    peak, t_peak = find_peak(S, T, new_s, lane, skew, V, SKEWED, LANES, VEC, ACC)
    other = tl.arange(0, LANES) != lane
    tail_s = tl.where(other, l_s * (f_s * f_s), 0.0)
    tail_t = tl.where(other, l_t * (f_t * f_t), 0.0)
    both = tl.where(other, both * (f_s * f_t), 0.0)
    start = lane * VEC
    while start < V + skew:
        s, t = load_rest_of_lane(S, T, start, peak, skew, V, SKEWED, LANES, VEC, ACC)
        a = tl.exp2(below(s, new_s) * half)
        b = tl.exp2(below(t, new_t) * half)
        tail_s += tl.sum(a * a, 1)
        tail_t += tl.sum(b * b, 1)
        both += tl.sum(a * b, 1)
        start += LANES * LANES * VEC
    b = shrink(t_peak, new_t, half, share)
    # −q·S of the peak with S = Σ (g + c·q) over the others, g = −½√(pq) and c = ½√(p/q) of the peak.
    both = tl.sum(both - b * tail_s, 0)
    tail_s = tl.sum(tail_s, 0)
    sum_s = tail_s + tl.where(peak < V + skew, 1.0, 0.0)
    sum_t = tl.sum(tail_t, 0) + b * b
    h = row_distance(l_s, l_t, h, rcp, f_s, f_t, sum_s, sum_t)
    some_s = tl.where(sum_s == 0.0, 1.0, sum_s)
    norm = 0.5 * tl.rsqrt(some_s * tl.where(sum_t == 0.0, 1.0, sum_t))
    # Σg by Σ√(pq) of all entries, not by s², which has lost it where it is near 1.
    sum_g = -norm * (both + b * (tail_s + 1.0))
    return new_s, new_t, sum_s, sum_t, h, sum_g, peak, t_peak, norm * both / some_s
