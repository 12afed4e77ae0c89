"""The divergences whose summands are not linear in the masses: normalisers first, then the terms (section 5.4)."""

import triton
import triton.language as tl

from .divergence_terms import divergence_terms
from .launch import sweeps
from .rows import NEG, edge_entries, edge_start, load_tile, log2_mass, whole_steps


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
    l = l * tl.exp2((m - new_m) * scale) + tl.sum(tl.exp2((z - new_m[:, None]) * scale), 1)
    if TILES == 2:
        l += tl.sum(tl.exp2((z_2 - new_m[:, None]) * scale), 1)
    return new_m, l


@triton.jit
def merge_normalizer(scale, m, l):
    """The lanes' normalisers to that of the row."""
    new_m = tl.max(m, 0)
    return new_m, tl.sum(l * tl.exp2((m - new_m) * scale), 0)


@triton.jit
def kept_terms(
    S, T, start, skew, scale, m_s, m_t, c_s, c_t, V: tl.constexpr, SKEWED: tl.constexpr, EDGE: tl.constexpr,
    DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(Σf, Σg) of every lane over the entries that count; skew reverse KL leaves q out of g, see `reference.py`."""
    s = load_tile(S, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
    t = load_tile(T, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
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
    """(m_s, m_t, l_s, l_t) of a row: the first of two sweeps."""
    STEP: tl.constexpr = TILES * LANES * VEC
    m_s = tl.full((LANES,), NEG, ACC)
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
    m_s, l_s = merge_normalizer(scale, m_s, l_s)
    m_t, l_t = merge_normalizer(scale, m_t, l_t)
    return m_s, m_t, l_s, l_t


@triton.jit
def sweep_terms(
    S, T, skew, scale, m_s, m_t, l_s, l_t, V: tl.constexpr, SKEWED: tl.constexpr,
    DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(D, Σg) of a row from its normalisers: the second sweep, one tile a step."""
    tl.static_assert(sweeps(DIVERGENCE) == 2, "a divergence of one sweep needs a fold of its own")
    STEP: tl.constexpr = LANES * VEC
    c_s = tl.log2(tl.where(l_s == 0.0, 1.0, l_s))
    c_t = tl.log2(tl.where(l_t == 0.0, 1.0, l_t))
    d = tl.zeros((LANES,), ACC)
    sum_g = d
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        f, g = kept_terms(
            S, T, edge_start(i, V, STEP, SKEWED), skew, scale, m_s, m_t, c_s, c_t, V, SKEWED, True,
            DIVERGENCE, ALPHA, BETA, LANES, VEC, ACC,
        )  # fmt: skip
        d += f
        sum_g += g
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        f, g = kept_terms(
            S, T, start, skew, scale, m_s, m_t, c_s, c_t, V, SKEWED, False,
            DIVERGENCE, ALPHA, BETA, LANES, VEC, ACC,
        )  # fmt: skip
        d += f
        sum_g += g
    return tl.sum(d, 0), tl.sum(sum_g, 0)
