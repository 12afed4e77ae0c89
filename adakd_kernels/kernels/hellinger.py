"""Squared Hellinger distance of two rows in one sweep, without cancellation (docs/maths.md, section 5)."""

import triton
import triton.language as tl

from .rows import NEG, edge_entries, edge_start, load_tile, whole_steps

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
    S, T, start, skew, scale, m_s, m_t, l_s, l_t, h, rcp, V: tl.constexpr, SKEWED: tl.constexpr, EDGE: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A step of every lane's normalisers and l_s·s², s² = 1 − Σ√(pq), from two exponentials an entry.

    `scale` is log2(e)/(2τ): a = 2^((s − m_s)·scale) and b are roots of unnormalised masses, l_s = Σa², l_t = Σb²,
    kappa = √(l_s/l_t), h = ½ Σ(a − kappa·b)² and rcp = 1/kappa (docs/maths.md, section 5).
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
    f_s = tl.exp2((m_s - new_s) * scale)
    f_t = tl.exp2((m_t - new_t) * scale)
    a = tl.exp2((s - new_s[:, None]) * scale)
    b = tl.exp2((t - new_t[:, None]) * scale)
    new_l_s = l_s * (f_s * f_s) + tl.sum(a * a, 1)
    new_l_t = l_t * (f_t * f_t) + tl.sum(b * b, 1)
    if TILES == 2:
        a_2 = tl.exp2((s_2 - new_s[:, None]) * scale)
        b_2 = tl.exp2((t_2 - new_t[:, None]) * scale)
        new_l_s += tl.sum(a_2 * a_2, 1)
        new_l_t += tl.sum(b_2 * b_2, 1)
    kappa, new_rcp = balance(new_l_s, new_l_t)
    d = a - kappa[:, None] * b
    h = moved_distance(l_s, h, f_s, f_t, kappa, rcp) + 0.5 * tl.sum(d * d, 1)
    if TILES == 2:
        d_2 = a_2 - kappa[:, None] * b_2
        h += 0.5 * tl.sum(d_2 * d_2, 1)
    return new_s, new_t, new_l_s, new_l_t, h, new_rcp


@triton.jit
def sweep_hellinger(
    S, T, skew, scale, V: tl.constexpr, SKEWED: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(m_s, m_t, l_s, l_t, s²) of a row; `scale` is log2(e)/τ."""
    STEP: tl.constexpr = TILES * LANES * VEC
    half = 0.5 * scale
    m_s = tl.full((LANES,), NEG, ACC)
    m_t = m_s
    l_s = tl.zeros((LANES,), ACC)
    l_t = l_s
    h = l_s
    rcp = tl.full((LANES,), 1.0, ACC)
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        start = edge_start(i, V, STEP, SKEWED)
        m_s, m_t, l_s, l_t, h, rcp = fold_hellinger(
            S, T, start, skew, half, m_s, m_t, l_s, l_t, h, rcp, V, SKEWED, True, TILES, LANES, VEC, ACC
        )
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        m_s, m_t, l_s, l_t, h, rcp = fold_hellinger(
            S, T, start, skew, half, m_s, m_t, l_s, l_t, h, rcp, V, SKEWED, False, TILES, LANES, VEC, ACC
        )
    new_s = tl.max(m_s, 0)
    new_t = tl.max(m_t, 0)
    f_s = tl.exp2((m_s - new_s) * half)
    f_t = tl.exp2((m_t - new_t) * half)
    sum_s = tl.sum(l_s * (f_s * f_s), 0)
    sum_t = tl.sum(l_t * (f_t * f_t), 0)
    kappa, _ = balance(sum_s, sum_t)
    h = tl.sum(moved_distance(l_s, h, f_s, f_t, kappa, rcp), 0) / tl.where(sum_s == 0.0, 1.0, sum_s)
    h = tl.where(h > 1.0, 1.0, h)
    return new_s, new_t, sum_s, sum_t, tl.where((sum_s == 0.0) | (sum_t == 0.0), 0.0, h)
