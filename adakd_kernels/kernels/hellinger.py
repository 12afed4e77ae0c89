"""Squared Hellinger distance of two rows in one sweep, without cancellation (docs/maths.md, section 5)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .peak import TokenResult, find_peak, lane_with_peak, load_rest_of_lane
from .rows import Normalizers, below, edge_entries, edge_start, load_tile, lowest, shrink, whole_steps

# A sum over any entry is at least 1, the mass of the largest; one over none stands for so little that it adds nothing.
NONE = tl.constexpr(1.0e-12)


class HellingerSums(NamedTuple):
    """The running sums of every lane, (LANES,) each.

    a = 2^((s − m_s)/2τ·log2(e)) and b are the roots of unnormalised masses, and kappa = √(l_s/l_t).
    """

    m_s: tl.tensor  # running maxima
    m_t: tl.tensor
    l_s: tl.tensor  # Σa²
    l_t: tl.tensor  # Σb²
    distance: tl.tensor  # ½ Σ(a − kappa·b)², which is l_s·s²
    rcp: tl.tensor  # 1/kappa
    both: tl.tensor  # Σab


@triton.jit
def balance(l_s, l_t):
    """√(l_s/l_t) and √(l_t/l_s) from one root."""
    l_s = tl.maximum(l_s, NONE)
    l_t = tl.maximum(l_t, NONE)
    rcp = tl.rsqrt(l_s * l_t)
    return l_s * rcp, l_t * rcp


@triton.jit
def moved_distance(sums, f_s, f_t, kappa):
    """The distance of the entries so far, where their roots shrink by f_s and f_t and their balance becomes kappa."""
    step = f_t * (kappa * sums.rcp)
    apart = f_s - step
    # Every term is ≥ 0, so nothing cancels.
    return f_s * step * sums.distance + 0.5 * tl.maximum(sums.l_s, NONE) * (apart * apart)


@triton.jit
def fold_hellinger(rows, start, half, sums, EDGE: tl.constexpr):
    """`HellingerSums` after one more step, from two exponentials an entry; `half` is half of the rows' scale."""
    s = load_tile(rows.S, start, rows, EDGE)
    t = load_tile(rows.T, start, rows, EDGE)
    m_s = tl.maximum(sums.m_s, tl.max(s, 1))
    m_t = tl.maximum(sums.m_t, tl.max(t, 1))
    if rows.TILES == 2:
        s_2 = load_tile(rows.S, start + rows.LANES * rows.VEC, rows, EDGE)
        t_2 = load_tile(rows.T, start + rows.LANES * rows.VEC, rows, EDGE)
        m_s = tl.maximum(m_s, tl.max(s_2, 1))
        m_t = tl.maximum(m_t, tl.max(t_2, 1))
    # (LANES,) what the roots so far shrink by below the new maxima.
    f_s = tl.exp2(below(sums.m_s, m_s) * half)
    f_t = tl.exp2(below(sums.m_t, m_t) * half)
    a = tl.exp2(below(s, m_s[:, None]) * half)
    b = tl.exp2(below(t, m_t[:, None]) * half)
    l_s = sums.l_s * (f_s * f_s) + tl.sum(a * a, 1)
    l_t = sums.l_t * (f_t * f_t) + tl.sum(b * b, 1)
    both = sums.both * (f_s * f_t) + tl.sum(a * b, 1)
    if rows.TILES == 2:
        a_2 = tl.exp2(below(s_2, m_s[:, None]) * half)
        b_2 = tl.exp2(below(t_2, m_t[:, None]) * half)
        l_s += tl.sum(a_2 * a_2, 1)
        l_t += tl.sum(b_2 * b_2, 1)
        both += tl.sum(a_2 * b_2, 1)
    # The balance has to include this step before its differences are taken.
    kappa, rcp = balance(l_s, l_t)
    d = a - kappa[:, None] * b
    distance = moved_distance(sums, f_s, f_t, kappa) + 0.5 * tl.sum(d * d, 1)
    if rows.TILES == 2:
        d_2 = a_2 - kappa[:, None] * b_2
        distance += 0.5 * tl.sum(d_2 * d_2, 1)
    return HellingerSums(m_s, m_t, l_s, l_t, distance, rcp, both)


@triton.jit
def sweep_lanes(rows, half):
    """`HellingerSums` after the row. The compiler removes Σab where it is not used."""
    STEP: tl.constexpr = rows.TILES * rows.LANES * rows.VEC
    zero = tl.zeros((rows.LANES,), rows.scale.dtype)
    m = tl.full((rows.LANES,), lowest(rows.scale.dtype), rows.scale.dtype)
    sums = HellingerSums(m, m, zero, zero, zero, zero + 1.0, zero)
    for i in range(0, edge_entries(rows.V, rows.V, STEP, rows.SKEWED), STEP):
        sums = fold_hellinger(rows, edge_start(i, rows.V, STEP, rows.SKEWED), half, sums, True)
    for start in range(whole_steps(rows.V, STEP, rows.SKEWED)[0], whole_steps(rows.V, STEP, rows.SKEWED)[1], STEP):
        sums = fold_hellinger(rows, start, half, sums, False)
    return sums


@triton.jit
def row_distance(sums, f_s, f_t, l_s, l_t):
    """s² of a row from its lanes' sums, what their roots shrink by, and the row's l_s and l_t; 0 for an empty row."""
    kappa, _ = balance(l_s, l_t)
    distance = tl.sum(moved_distance(sums, f_s, f_t, kappa), 0) / tl.where(l_s == 0.0, 1.0, l_s)
    # By comparison, since a minimum would lose NaN.
    distance = tl.where(distance > 1.0, 1.0, distance)
    return tl.where((l_s == 0.0) | (l_t == 0.0), 0.0, distance)


@triton.jit
def sweep_distance(rows, rounding):
    """(`Normalizers`, s²) of a row; `rounding` is that of its scale."""
    half = 0.5 * rows.scale
    sums = sweep_lanes(rows, half)
    m_s = tl.max(sums.m_s, 0)
    m_t = tl.max(sums.m_t, 0)
    f_s = shrink(sums.m_s, m_s, half, rounding)
    f_t = shrink(sums.m_t, m_t, half, rounding)
    l_s = tl.sum(sums.l_s * (f_s * f_s), 0)
    l_t = tl.sum(sums.l_t * (f_t * f_t), 0)
    return Normalizers(m_s, l_s, m_t, l_t), row_distance(sums, f_s, f_t, l_s, l_t)


@triton.jit
def sweep_hellinger(rows, rounding):
    """(`Normalizers`, `TokenResult`) of a row; `rounding` is that of its scale."""
    half = 0.5 * rows.scale
    sums = sweep_lanes(rows, half)
    m_s, lane = lane_with_peak(sums.m_s, sums.l_s)
    m_t = tl.max(sums.m_t, 0)
    f_s = shrink(sums.m_s, m_s, half, rounding)
    f_t = shrink(sums.m_t, m_t, half, rounding)
    peak, t_peak = find_peak(rows, m_s, lane)
    # (LANES,) sums over the entries beside the peak: those of its lane are computed anew.
    other = tl.arange(0, rows.LANES) != lane
    tail_s = tl.where(other, sums.l_s * (f_s * f_s), 0.0)
    tail_t = tl.where(other, sums.l_t * (f_t * f_t), 0.0)
    both = tl.where(other, sums.both * (f_s * f_t), 0.0)
    start = lane * rows.WIDTH
    while start < rows.V + rows.skew:
        s, t = load_rest_of_lane(rows, start, peak)
        a = tl.exp2(below(s, m_s) * half)
        b = tl.exp2(below(t, m_t) * half)
        tail_s += tl.sum(a * a, 1)
        tail_t += tl.sum(b * b, 1)
        both += tl.sum(a * b, 1)
        start += rows.LANES * rows.LANES * rows.WIDTH
    b = shrink(t_peak, m_t, half, rounding)
    # −q·S of the peak with S = Σ (g + c·q) over the others, g = −½√(pq) and c = ½√(p/q) of the peak.
    both = tl.sum(both - b * tail_s, 0)
    tail_s = tl.sum(tail_s, 0)
    # The peak's unnormalised mass is 1; a student without finite entries has no mass.
    l_s = tail_s + tl.where(peak < rows.V + rows.skew, 1.0, 0.0)
    l_t = tl.sum(tail_t, 0) + b * b
    d = row_distance(sums, f_s, f_t, l_s, l_t)
    some_s = tl.where(l_s == 0.0, 1.0, l_s)
    norm = 0.5 * tl.rsqrt(some_s * tl.where(l_t == 0.0, 1.0, l_t))
    # Σg by Σ√(pq) of all entries, not by s², which has lost it where it is near 1.
    sum_g = -norm * (both + b * (tail_s + 1.0))
    return Normalizers(m_s, l_s, m_t, l_t), TokenResult(d, sum_g, peak, t_peak, norm * both / some_s)
