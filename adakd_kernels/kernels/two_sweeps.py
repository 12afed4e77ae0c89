"""The divergences whose summands are not linear in the masses: normalisers first, then the terms (section 5.4)."""

import triton
import triton.language as tl

from .divergence_terms import divergence_terms
from .peak import find_peak, lane_of_peak, lane_rounds, load_rest_of_lane
from .rows import below, edge_entries, edge_start, finite, load_tile, log2_1p, log2_mass, lowest, whole_steps


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
    """(m_s, m_t, l_s − 1, l_t, log2 l_s, log2 l_t, peak) of a row: the first of two sweeps.

    The student's peak has unnormalised mass 1, so that its sum is that of the other entries, which it keeps exact, and 1;
    a student without finite entries has −1.
    """
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
    peak, t_peak = find_peak(S, T, m_s, l_s, skew, V, SKEWED, LANES, VEC, ACC)
    new_s = tl.max(m_s, 0)
    new_t = tl.max(m_t, 0)
    lane = lane_of_peak(peak, LANES, VEC)
    other = tl.arange(0, LANES) != lane
    l_s = tl.where(other, l_s * tl.exp2(below(m_s, new_s) * scale), 0.0)
    l_t = tl.where(other, l_t * tl.exp2(below(m_t, new_t) * scale), 0.0)
    for i in range(0, lane_rounds(V, LANES, VEC, SKEWED)):
        s, t = load_rest_of_lane(S, T, i, lane, peak, skew, V, SKEWED, LANES, VEC, ACC)
        l_s += tl.sum(tl.exp2(below(s, new_s) * scale), 1)
        l_t += tl.sum(tl.exp2(below(t, new_t) * scale), 1)
    tail_s = tl.sum(l_s, 0)
    tail_t = tl.sum(l_t, 0)
    b = tl.exp2(below(t_peak, new_t) * scale)
    l_t = tail_t + b
    c_t = tl.where(b == 1.0, log2_1p(tail_t), tl.log2(tl.where(l_t == 0.0, 1.0, l_t)))
    return new_s, new_t, tl.where(peak < V + skew, tail_s, -1.0), l_t, log2_1p(tail_s), c_t, peak


@triton.jit
def sweep_terms(
    S, T, skew, scale, m_s, m_t, tail_s, c_s, c_t, peak, V: tl.constexpr, SKEWED: tl.constexpr,
    DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(D, Σg, the peak's logit in t, τ·∂D/∂zˢ there) of a row from its normalisers: the second sweep, one tile a step.

    With c = −g/q of the peak, g + c·q is 0 there, and the gradient is −q·S, S = Σ (g + c·q) over the other entries.
    """
    STEP: tl.constexpr = LANES * VEC
    d = tl.zeros((LANES,), ACC)
    sum_g = d
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        start = edge_start(i, V, STEP, SKEWED)
        s = load_tile(S, start, skew, V, SKEWED, True, LANES, VEC, ACC)
        t = load_tile(T, start, skew, V, SKEWED, True, LANES, VEC, ACC)
        f, g = kept_terms(s, t, scale, m_s, m_t, c_s, c_t, DIVERGENCE, ALPHA, BETA)
        d += f
        sum_g += g
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        s = load_tile(S, start, skew, V, SKEWED, False, LANES, VEC, ACC)
        t = load_tile(T, start, skew, V, SKEWED, False, LANES, VEC, ACC)
        f, g = kept_terms(s, t, scale, m_s, m_t, c_s, c_t, DIVERGENCE, ALPHA, BETA)
        d += f
        sum_g += g
    # The sums over the entries beside the peak: those of its lane are taken anew.
    lane = lane_of_peak(peak, LANES, VEC)
    other = tl.arange(0, LANES) != lane
    d = tl.where(other, d, 0.0)
    sum_g = tl.where(other, sum_g, 0.0)
    for i in range(0, lane_rounds(V, LANES, VEC, SKEWED)):
        s, t = load_rest_of_lane(S, T, i, lane, peak, skew, V, SKEWED, LANES, VEC, ACC)
        f, g = kept_terms(s, t, scale, m_s, m_t, c_s, c_t, DIVERGENCE, ALPHA, BETA)
        d += f
        sum_g += g
    rest_d = tl.sum(d, 0)
    rest_g = tl.sum(sum_g, 0)
    found = peak < V + skew
    t_peak = tl.load(T + peak, mask=found, other=-float("inf")).to(ACC)
    counts = t_peak != -float("inf")
    f, g, q = divergence_terms(-c_s, log2_mass(t_peak, m_t, c_t, scale), DIVERGENCE, ALPHA, BETA)
    lost = tl.where(found, -q, 0.0) if DIVERGENCE == "skew_reverse_kl" else 0.0
    # The mass beside the peak is q·tail_s, so that c times it is −g·tail_s.
    grad = -q * (rest_g - g * tail_s)
    return finite(rest_d + tl.where(counts, f, 0.0)), finite(rest_g + tl.where(counts, g, lost)), t_peak, finite(grad)
