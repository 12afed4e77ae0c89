"""The divergences whose summands are not linear in the masses: normalisers first, then the terms (section 5.4)."""

import triton
import triton.language as tl

from .divergence_terms import divergence_terms, peak_terms
from .peak import find_peak, lane_of_peak, lane_with_peak, load_rest_of_lane
from .rows import (
    below,
    edge_entries,
    edge_start,
    exponent_rounding,
    finite,
    load_tile,
    log2_1p,
    log2_mass,
    lowest,
    shrink,
    whole_steps,
)


@triton.jit
def fold_normalizer(
    Row, start, skew, scale, m, l, V: tl.constexpr, SKEWED: tl.constexpr, EDGE: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A step of every lane's running maximum m and l = Σ 2^((z − m)·scale)."""
    z = load_tile(Row, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
    new_m = tl.maximum(m, tl.max(z, 1))
    if TILES == 2:
        z_2 = load_tile(Row, start + LANES * VEC, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
        new_m = tl.maximum(new_m, tl.max(z_2, 1))
    l = l * tl.exp2(below(m, new_m) * scale) + tl.sum(tl.exp2(below(z, new_m[:, None]) * scale), 1)
    if TILES == 2:
        l += tl.sum(tl.exp2(below(z_2, new_m[:, None]) * scale), 1)
    return new_m, l


@triton.jit
def kept_terms(s, t, scale, m_s, m_t, c_s, c_t, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """(Σf, Σg) of every lane over the entries that count; skew reverse KL leaves q out of g, see `reference.py`."""
    log_q = log2_mass(s, m_s, c_s, scale)
    log_p = log2_mass(t, m_t, c_t, scale)
    f, g, q = divergence_terms(log_q, log_p, DIVERGENCE, ALPHA, BETA)
    kept = (s != -float("inf")) & (t != -float("inf"))
    lost = -q if DIVERGENCE == "skew_reverse_kl" else 0.0
    return tl.sum(tl.where(kept, f, 0.0), 1), tl.sum(tl.where(kept, g, lost), 1)


@triton.jit
def sweep_normalizers(
    S, T, skew, scale, V: tl.constexpr, SKEWED: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(m_s, m_t, l_s, l_t, l_s of every lane without the peak, peak, log2(q/p) there): the first sweep."""
    STEP: tl.constexpr = TILES * LANES * VEC
    m_s = tl.full((LANES,), lowest(ACC), ACC)
    m_t = m_s
    l_s = tl.zeros((LANES,), ACC)
    l_t = l_s
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        start = edge_start(i, V, STEP, SKEWED)
        m_s, l_s = fold_normalizer(S, start, skew, scale, m_s, l_s, V, SKEWED, True, TILES, LANES, VEC, ACC)
        m_t, l_t = fold_normalizer(T, start, skew, scale, m_t, l_t, V, SKEWED, True, TILES, LANES, VEC, ACC)
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        m_s, l_s = fold_normalizer(S, start, skew, scale, m_s, l_s, V, SKEWED, False, TILES, LANES, VEC, ACC)
        m_t, l_t = fold_normalizer(T, start, skew, scale, m_t, l_t, V, SKEWED, False, TILES, LANES, VEC, ACC)
    new_s, lane = lane_with_peak(m_s, l_s)
    new_t = tl.max(m_t, 0)
    # The second sweep takes its masses with the rounded scale, and these are added to them.
    l_s *= shrink(m_s, new_s, scale, 0.0)
    l_t *= shrink(m_t, new_t, scale, 0.0)
    peak, t_peak = find_peak(S, T, new_s, lane, skew, V, SKEWED, LANES, VEC, ACC)
    other = tl.arange(0, LANES) != lane
    l_s = tl.where(other, l_s, 0.0)
    l_t = tl.where(other, l_t, 0.0)
    start = lane * VEC
    while start < V + skew:
        s, t = load_rest_of_lane(S, T, start, peak, skew, V, SKEWED, LANES, VEC, ACC)
        l_s += tl.sum(tl.exp2(below(s, new_s) * scale), 1)
        l_t += tl.sum(tl.exp2(below(t, new_t) * scale), 1)
        start += LANES * LANES * VEC
    tail_s = tl.sum(l_s, 0)
    tail_t = tl.sum(l_t, 0)
    more_t = tl.sum(l_t - l_s, 0)
    # A student without finite entries has no mass; the peak of any other one has unnormalised mass 1.
    sum_s = tail_s + tl.where(peak < V + skew, 1.0, 0.0)
    b = shrink(t_peak, new_t, scale, 0.0)
    sum_t = tail_t + b
    some_t = tl.where(sum_t == 0.0, 1.0, sum_t)
    # Where the peaks are one and the masses nearly equal, so is the sign of their difference right.
    gap = tl.where(b == 1.0, log2_1p(more_t / sum_s), tl.log2(some_t) - log2_1p(tail_s))
    gap -= log2_mass(t_peak, new_t, 0.0, scale)
    return new_s, new_t, sum_s, sum_t, l_s, peak, gap


@triton.jit
def sweep_terms(
    S, T, Tau, skew, scale, m_s, m_t, l_s, l_t, tail_s, peak, gap, V: tl.constexpr, SKEWED: tl.constexpr,
    DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(D, Σg, the peak's logit in t, τ·∂D/∂zˢ there) of a row from its normalisers: the second sweep, one tile a step.

    With c = −g/q of the peak, g + c·q is 0 there, and the gradient is −q·S, S = Σ (g + c·q) over the other entries.
    """
    STEP: tl.constexpr = LANES * VEC
    # As in the backward, so that both find the same sign of q − p.
    c_s = tl.log2(tl.where(l_s == 0.0, 1.0, l_s))
    c_t = tl.log2(tl.where(l_t == 0.0, 1.0, l_t))
    # To the compiler, each lane's own numbers: two that all lanes share are no operands of one instruction.
    own = (0.0 * tail_s)[:, None]
    m_s_lane = m_s + own
    m_t_lane = m_t + own
    c_s_lane = c_s + own
    c_t_lane = c_t + own
    d = tl.zeros((LANES,), ACC)
    sum_g = d
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        start = edge_start(i, V, STEP, SKEWED)
        s = load_tile(S, start, skew, V, SKEWED, True, LANES, VEC, ACC)
        t = load_tile(T, start, skew, V, SKEWED, True, LANES, VEC, ACC)
        f, g = kept_terms(s, t, scale, m_s_lane, m_t_lane, c_s_lane, c_t_lane, DIVERGENCE, ALPHA, BETA)
        d += f
        sum_g += g
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        s = load_tile(S, start, skew, V, SKEWED, False, LANES, VEC, ACC)
        t = load_tile(T, start, skew, V, SKEWED, False, LANES, VEC, ACC)
        f, g = kept_terms(s, t, scale, m_s_lane, m_t_lane, c_s_lane, c_t_lane, DIVERGENCE, ALPHA, BETA)
        d += f
        sum_g += g
    # The sums over the entries beside the peak: those of its lane are taken anew.
    lane = lane_of_peak(peak, LANES, VEC)
    other = tl.arange(0, LANES) != lane
    d = tl.where(other, d, 0.0)
    sum_g = tl.where(other, sum_g, 0.0)
    start = lane * VEC
    while start < V + skew:
        s, t = load_rest_of_lane(S, T, start, peak, skew, V, SKEWED, LANES, VEC, ACC)
        f, g = kept_terms(s, t, scale, m_s, m_t, c_s, c_t, DIVERGENCE, ALPHA, BETA)
        d += f
        sum_g += g
        start += LANES * LANES * VEC
    found = peak < V + skew
    t_peak = tl.load(T + peak, mask=found, other=-float("inf")).to(ACC)
    counts = t_peak != -float("inf")
    # Where the peak has less than half of the mass, nothing cancels, and c is the sweep's with its own roundings.
    confident = c_s < 1.0
    gap = tl.where(confident, gap, -c_s - log2_mass(t_peak, m_t, c_t, scale))
    f, c, q = peak_terms(c_s, gap, DIVERGENCE, ALPHA, BETA)
    # What cancels does so in every lane, before the lanes' sums are rounded.
    rest = tl.sum(sum_g + c * q * tail_s, 0)
    # Where a row is confident, the rounding of the scale takes the same factor off all masses but the peak's; the share
    # q of it does not cancel with the normaliser's.
    typical = tl.maximum(tl.log2(tl.sum(tail_s, 0) * (1.0 / V)), -64.0)
    rest *= tl.exp2(q * typical * exponent_rounding(tl.load(Tau)))
    lost = tl.where(found, -q, 0.0) if DIVERGENCE == "skew_reverse_kl" else 0.0
    d = tl.sum(d, 0) + tl.where(counts, f, 0.0)
    sum_g = tl.sum(sum_g, 0) + tl.where(counts, -c * q, lost)
    return finite(d), finite(sum_g), t_peak, finite(-q * tl.where(confident, rest, sum_g + c))
