"""Forward and reverse KL of two rows, and their sum, in one sweep (docs/maths.md, section 5.2).

Logarithms are to base 2 until the results are returned.
"""

import triton
import triton.language as tl

from .rows import LN2, NEG, edge_entries, edge_start, load_tile, log2_mass, whole_steps


@triton.jit
def move_maxima(scale, m_s, m_t, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t):
    """The sums of `fold_kl` below new maxima: a gap moves by its mass times the change of the log-ratio."""
    f_s = tl.exp2((m_s - new_s) * scale)
    f_t = tl.exp2((m_t - new_t) * scale)
    shift = ((m_s - new_s) - (m_t - new_t)) * scale
    gap_s = (gap_s + keep_s * shift) * f_s
    gap_t = (gap_t - keep_t * shift) * f_t
    return l_s * f_s, l_t * f_t, keep_s * f_s, keep_t * f_t, gap_s, gap_t


@triton.jit
def add_kl(s, t, scale, m_s, m_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t):
    """The sums of `fold_kl` with those of a tile."""
    x = log2_mass(s, m_s[:, None], 0.0, scale)
    y = log2_mass(t, m_t[:, None], 0.0, scale)
    a = tl.exp2(x)
    b = tl.exp2(y)
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

    keep_s = Σ q and keep_t = Σ p over the entries that are −inf on no side, gap_s = Σ q·log2(q/p) and gap_t = Σ
    p·log2(p/q), all unnormalised. What is not used is not computed.
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
    l_s, l_t, keep_s, keep_t, gap_s, gap_t = move_maxima(
        scale, m_s, m_t, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t
    )
    l_s, l_t, keep_s, keep_t, gap_s, gap_t = add_kl(s, t, scale, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t)
    if TILES == 2:
        l_s, l_t, keep_s, keep_t, gap_s, gap_t = add_kl(
            s_2, t_2, scale, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t
        )
    return new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t


@triton.jit
def sweep_kl(
    S, T, skew, scale, V: tl.constexpr, SKEWED: tl.constexpr, DIVERGENCE: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(m_s, m_t, l_s, l_t, D, Σg) of a row in one sweep: forward KL, reverse KL or their sum."""
    STEP: tl.constexpr = TILES * LANES * VEC
    zero = tl.zeros((LANES,), ACC)
    m_s = tl.full((LANES,), NEG, ACC)
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
    new_s = tl.max(m_s, 0)
    new_t = tl.max(m_t, 0)
    l_s, l_t, keep_s, keep_t, gap_s, gap_t = move_maxima(
        scale, m_s, m_t, new_s, new_t, l_s, l_t, keep_s, keep_t, gap_s, gap_t
    )
    l_s = tl.sum(l_s, 0)
    l_t = tl.sum(l_t, 0)
    keep_s = tl.sum(keep_s, 0)
    keep_t = tl.sum(keep_t, 0)
    some_s = tl.where(l_s == 0.0, 1.0, l_s)
    some_t = tl.where(l_t == 0.0, 1.0, l_t)
    log_ratio = tl.log2(some_t) - tl.log2(some_s)
    reverse = (tl.sum(gap_s, 0) + keep_s * log_ratio) / some_s * LN2
    forward = (tl.sum(gap_t, 0) - keep_t * log_ratio) / some_t * LN2
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
    return new_s, new_t, l_s, l_t, d, sum_g
