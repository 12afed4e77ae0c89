"""Squared Hellinger distance of two rows in one sweep, without cancellation (docs/maths.md, section 5)."""

import triton
import triton.language as tl

from .rows import NEG, load_tile


@triton.jit
def fold_hellinger(s, t, scale, m_s, m_t, l_s, l_t, h):
    """Normalisers and s² = 1 − Σ√(pq) from two exponentials an entry (docs/maths.md, section 5).

    `scale` is log2(e)/(2τ): a = 2^((s − m_s)·scale) and b are roots of unnormalised masses, l_s = Σa², l_t = Σb², and h
    is s² of the entries so far. Those keep the shares u² of the student's and w² of the teacher's mass.
    """
    new_s = tl.maximum(m_s, tl.max(s, 0))
    new_t = tl.maximum(m_t, tl.max(t, 0))
    a = tl.exp2((s - new_s) * scale)
    b = tl.exp2((t - new_t) * scale)
    root_s = tl.sqrt(l_s) * tl.exp2((m_s - new_s) * scale)
    root_t = tl.sqrt(l_t) * tl.exp2((m_t - new_t) * scale)
    l_s = root_s * root_s + tl.sum(a * a, 0)
    l_t = root_t * root_t + tl.sum(b * b, 0)
    rcp_s = 1.0 / tl.sqrt(tl.where(l_s == 0.0, 1.0, l_s))
    rcp_t = 1.0 / tl.sqrt(tl.where(l_t == 0.0, 1.0, l_t))
    u = root_s * rcp_s
    w = root_t * rcp_t
    d = a * rcp_s - b * rcp_t
    h = u * w * h + 0.5 * ((u - w) * (u - w) + tl.sum(d * d, 0))
    return new_s, new_t, l_s, l_t, h


@triton.jit
def sweep_hellinger(S, T, scale, V: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr):
    """(m_s, m_t, l_s, l_t, s²) of a row; `scale` is log2(e)/τ."""
    FULL: tl.constexpr = V // BLOCK_V * BLOCK_V
    half = 0.5 * scale
    zero = tl.full((), 0.0, ACC)
    m_s = tl.full((), NEG, ACC)
    m_t = m_s
    l_s = zero
    l_t = zero
    h = zero
    if FULL < V:
        s = load_tile(S, FULL, V, BLOCK_V, True, ACC)
        t = load_tile(T, FULL, V, BLOCK_V, True, ACC)
        m_s, m_t, l_s, l_t, h = fold_hellinger(s, t, half, m_s, m_t, l_s, l_t, h)
    for start in range(0, FULL, BLOCK_V):
        s = load_tile(S, start, V, BLOCK_V, False, ACC)
        t = load_tile(T, start, V, BLOCK_V, False, ACC)
        m_s, m_t, l_s, l_t, h = fold_hellinger(s, t, half, m_s, m_t, l_s, l_t, h)
    h = tl.where(h > 1.0, 1.0, h)
    return m_s, m_t, l_s, l_t, tl.where((l_s == 0.0) | (l_t == 0.0), 0.0, h)
