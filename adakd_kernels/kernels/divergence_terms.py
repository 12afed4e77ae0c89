"""The nine divergences inside a kernel: the one-sweep fold of the KL family, and the terms f and g of an entry.

Logarithms are to base 2 until a result is stored. `docs/maths.md`, sections 3 and 5, derives every line.
"""

import triton
import triton.language as tl

from .rows import LN2, NEG, fold_normalizer, load_tile, log2_mass


@triton.jit
def fold_kl(s, t, scale, m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t):
    """Normalisers, and for both KL divergences the mass and the summed log-ratio over entries that are −inf on no side.

    keep_s = Σ q and keep_t = Σ p over those entries, gap_s = Σ q·log2(q/p) and gap_t = Σ p·log2(p/q), all unnormalised;
    when the maxima move, a gap moves by its mass times the change of the log-ratio. What is not used is not computed.
    """
    new_s = tl.maximum(m_s, tl.max(s, 0))
    new_t = tl.maximum(m_t, tl.max(t, 0))
    f_s = tl.exp2((m_s - new_s) * scale)
    f_t = tl.exp2((m_t - new_t) * scale)
    shift = ((m_s - new_s) - (m_t - new_t)) * scale
    x = log2_mass(s, new_s, scale)
    y = log2_mass(t, new_t, scale)
    a = tl.exp2(x)
    b = tl.exp2(y)
    a_kept = tl.where(t != -float("inf"), a, 0.0)
    b_kept = tl.where(s != -float("inf"), b, 0.0)
    gap_s = (gap_s + keep_s * shift) * f_s + tl.sum(a_kept * (x - y), 0)
    gap_t = (gap_t - keep_t * shift) * f_t + tl.sum(b_kept * (y - x), 0)
    keep_s = keep_s * f_s + tl.sum(a_kept, 0)
    keep_t = keep_t * f_t + tl.sum(b_kept, 0)
    l_s = l_s * f_s + tl.sum(a, 0)
    l_t = l_t * f_t + tl.sum(b, 0)
    return new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t


@triton.jit
def sweep_kl(S, T, scale, V: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr):
    """(m_s, m_t, l_s, l_t, D, Σg) of a row in one sweep: forward KL, reverse KL or their sum."""
    FULL: tl.constexpr = V // BLOCK_V * BLOCK_V
    zero = tl.full((), 0.0, ACC)
    m_s = tl.full((), NEG, ACC)
    m_t = m_s
    l_s = zero
    l_t = zero
    keep_s = zero
    keep_t = zero
    gap_s = zero
    gap_t = zero
    if FULL < V:
        s = load_tile(S, FULL, V, BLOCK_V, True, ACC)
        t = load_tile(T, FULL, V, BLOCK_V, True, ACC)
        m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t = fold_kl(
            s, t, scale, m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t
        )
    for start in range(0, FULL, BLOCK_V):
        s = load_tile(S, start, V, BLOCK_V, False, ACC)
        t = load_tile(T, start, V, BLOCK_V, False, ACC)
        m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t = fold_kl(
            s, t, scale, m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t
        )
    some_s = tl.where(l_s == 0.0, 1.0, l_s)
    some_t = tl.where(l_t == 0.0, 1.0, l_t)
    log_ratio = tl.log2(some_t) - tl.log2(some_s)
    reverse = (gap_s + keep_s * log_ratio) / some_s * LN2
    forward = (gap_t - keep_t * log_ratio) / some_t * LN2
    p_kept = keep_t / some_t
    q_lost = (l_s - keep_s) / some_s
    if DIVERGENCE == "forward_kl":
        d = forward
        sum_g = -p_kept
    elif DIVERGENCE == "reverse_kl":
        d = reverse
        sum_g = reverse - q_lost
    else:
        tl.static_assert(DIVERGENCE == "jeffreys")
        d = forward + reverse
        sum_g = reverse - q_lost - p_kept
    return m_s, m_t, l_s, l_t, d, sum_g


@triton.jit
def divergence_terms(x, y, c_s, c_t, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """(f, g, q) of every entry, from log2 q = x − c_s and log2 p = y − c_t; f only where a second sweep needs it.

    The larger of p and q is taken out of every mixture, so that log-ratios of masses that underflow stay finite and
    every divergence is exactly 0 where x − y = c_s − c_t.
    """
    gap = (x - y) - (c_s - c_t)
    log_q = x - c_s
    log_p = y - c_t
    if DIVERGENCE == "forward_kl":
        return 0.0, -tl.exp2(log_p), tl.exp2(log_q)
    elif DIVERGENCE == "reverse_kl":
        q = tl.exp2(log_q)
        return 0.0, q * gap * LN2, q
    elif DIVERGENCE == "jeffreys":
        q = tl.exp2(log_q)
        return 0.0, q * gap * LN2 - tl.exp2(log_p), q
    elif DIVERGENCE == "hellinger":
        root_q = tl.exp2(0.5 * log_q)
        return 0.0, -0.5 * root_q * tl.exp2(0.5 * log_p), root_q * root_q
    elif DIVERGENCE == "alpha_beta":
        q_above = gap > 0.0
        scale = tl.exp2((ALPHA + BETA) * tl.where(q_above, log_q, log_p))
        low = tl.exp2(-(ALPHA + BETA) * tl.abs(gap))
        mixed = tl.exp2(tl.where(q_above, -ALPHA * gap, BETA * gap))
        p_ab = tl.where(q_above, low, 1.0)
        q_ab = tl.where(q_above, 1.0, low)
        f = scale * (ALPHA * (p_ab - mixed) + BETA * (q_ab - mixed)) * (1.0 / (ALPHA * BETA * (ALPHA + BETA)))
        return f, scale * (q_ab - mixed) * (1.0 / ALPHA), tl.exp2(log_q)
    else:
        q_above = gap > 0.0
        top = tl.exp2(tl.where(q_above, log_q, log_p))
        low = tl.exp2(-tl.abs(gap))
        r_p = tl.where(q_above, low, 1.0)
        r_q = tl.where(q_above, 1.0, low)
        q = top * r_q
        if DIVERGENCE == "total_variation":
            half = 0.5 * top * (1.0 - low)
            sign = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, -1.0, 0.0))
            return half, 0.5 * q * sign, q
        elif DIVERGENCE == "jensen_shannon":
            log_mix = tl.log2(BETA * r_p + (1.0 - BETA) * r_q)
            p_term = tl.minimum(-gap, 0.0) - log_mix
            q_term = ((1.0 - BETA) * LN2) * q * (tl.minimum(gap, 0.0) - log_mix)
            return (BETA * LN2) * top * r_p * p_term + q_term, q_term, q
        elif DIVERGENCE == "skew_forward_kl":
            mix = ALPHA * r_p + (1.0 - ALPHA) * r_q
            p = top * r_p
            return LN2 * p * (tl.minimum(-gap, 0.0) - tl.log2(mix)), -(1.0 - ALPHA) * p * (r_q / mix), q
        else:
            tl.static_assert(DIVERGENCE == "skew_reverse_kl")
            mix = ALPHA * r_q + (1.0 - ALPHA) * r_p
            f = LN2 * q * (tl.minimum(gap, 0.0) - tl.log2(mix))
            return f, f - ALPHA * q * (r_q / mix), q


@triton.jit
def kept_terms(s, t, scale, m_s, m_t, c_s, c_t, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """(f, g) of every entry that counts, else 0; skew reverse KL leaves q out of g, see `reference.py`."""
    x = log2_mass(s, m_s, scale)
    y = log2_mass(t, m_t, scale)
    f, g, q = divergence_terms(x, y, c_s, c_t, DIVERGENCE, ALPHA, BETA)
    kept = (s != -float("inf")) & (t != -float("inf"))
    lost = -q if DIVERGENCE == "skew_reverse_kl" else 0.0
    return tl.where(kept, f, 0.0), tl.where(kept, g, lost)


@triton.jit
def sweep_normalizers(S, T, scale, V: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr):
    """(m_s, m_t, l_s, l_t) of a row: the first of two sweeps."""
    FULL: tl.constexpr = V // BLOCK_V * BLOCK_V
    l_s = tl.full((), 0.0, ACC)
    l_t = l_s
    m_s = tl.full((), NEG, ACC)
    m_t = m_s
    if FULL < V:
        m_s, l_s = fold_normalizer(load_tile(S, FULL, V, BLOCK_V, True, ACC), scale, m_s, l_s)
        m_t, l_t = fold_normalizer(load_tile(T, FULL, V, BLOCK_V, True, ACC), scale, m_t, l_t)
    for start in range(0, FULL, BLOCK_V):
        m_s, l_s = fold_normalizer(load_tile(S, start, V, BLOCK_V, False, ACC), scale, m_s, l_s)
        m_t, l_t = fold_normalizer(load_tile(T, start, V, BLOCK_V, False, ACC), scale, m_t, l_t)
    return m_s, m_t, l_s, l_t


@triton.jit
def sweep_terms(
    S, T, scale, m_s, m_t, l_s, l_t, V: tl.constexpr, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(D, Σg) of a row from its normalisers: the second sweep.

    It takes half a block at a time and keeps one sum a lane, so that its loop has no reduction.
    """
    HALF: tl.constexpr = BLOCK_V // 2
    HALVES: tl.constexpr = V // HALF * HALF
    c_s = tl.log2(tl.where(l_s == 0.0, 1.0, l_s))
    c_t = tl.log2(tl.where(l_t == 0.0, 1.0, l_t))
    f_lanes = tl.zeros((HALF,), ACC)
    g_lanes = f_lanes
    if HALVES < V:
        s = load_tile(S, HALVES, V, HALF, True, ACC)
        t = load_tile(T, HALVES, V, HALF, True, ACC)
        f_lanes, g_lanes = kept_terms(s, t, scale, m_s, m_t, c_s, c_t, DIVERGENCE, ALPHA, BETA)
    for start in range(0, HALVES, HALF):
        s = load_tile(S, start, V, HALF, False, ACC)
        t = load_tile(T, start, V, HALF, False, ACC)
        f, g = kept_terms(s, t, scale, m_s, m_t, c_s, c_t, DIVERGENCE, ALPHA, BETA)
        f_lanes += f
        g_lanes += g
    return tl.sum(f_lanes, 0), tl.sum(g_lanes, 0)
