"""The gradient of `token_divergence` in the student's logits: equation (10).

Rebuilds p and q from the two normalisers; reads 2U of the rows that count, writes 1U, in place if asked. U is one pass
over an N x V tensor.
"""

import triton
import triton.language as tl

from .divergence_terms import divergence_terms
from .rows import (
    LOG2E,
    edge_entries,
    edge_start,
    exponent_scale,
    inside,
    load_normalizers,
    load_tile,
    log2_mass,
    lowest,
    row_start,
    store_zeros,
    tile_offsets,
    whole_steps,
)


@triton.jit
def write_grad(
    S, T, Grad, start, skew, scale, weight, sum_g, m_s, c_s, m_t, c_t, peak, peak_grad, label, ce_weight, ce_max, ce_c,
    V: tl.constexpr, VS: tl.constexpr, SKEWED: tl.constexpr, EDGE: tl.constexpr, DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, WITH_CE: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(10) for a tile: weight/τ·(g − q Σg), 0 where either side is −inf; plus the gradient of the cross-entropy.

    At the student's peak the difference may cancel, so that there the forward's own result takes its place.
    """
    offs_v = tile_offsets(start, LANES, VEC)
    s = load_tile(S, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
    t = load_tile(T, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
    log_q = log2_mass(s, m_s, c_s, scale)
    log_p = log2_mass(t, m_t, c_t, scale)
    _, g, q = divergence_terms(log_q, log_p, DIVERGENCE, ALPHA, BETA)
    kept = (s != -float("inf")) & (t != -float("inf"))
    grad = tl.where(kept, weight * (g - q * sum_g), 0.0)
    entry = tl.arange(0, VEC)[None, :]
    at_peak = (peak - start)[:, None] == entry
    grad = tl.where(at_peak, peak_grad, grad)
    if WITH_CE:
        grad = tl.where(weight != 0.0, grad, 0.0)  # the token may count for the cross-entropy alone
        q_1 = tl.exp2((s - ce_max) * LOG2E - ce_c)
        grad_ce = ce_weight * (q_1 - tl.where((label - start)[:, None] == entry, 1.0, 0.0))
        if EDGE:  # a weight that is NaN is seen in the common vocabulary, and nowhere else
            grad_ce = tl.where(inside(offs_v, skew, V, SKEWED), grad_ce, 0.0)
        grad += grad_ce
    grad = grad.to(Grad.dtype.element_ty)
    if EDGE:
        tl.store(Grad + offs_v, grad, mask=inside(offs_v, skew, VS, SKEWED))
    else:
        tl.store(Grad + offs_v, grad)


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "stride_gb", "stride_gl"])
def token_divergence_bwd_kernel(
    S, T, Grad,                              # (B, L, Vs), (B, L, Vt) logits; (B, L, Vs) result, may be S
    Tau, Weight, SumG,                       # (B·L,) temperature, upstream gradient of D, Σg, in ACC
    NormalizersTau,                          # (4, B·L) normalisers at temperature τ
    Peak, PeakGrad,                          # (B·L,) place of the student's peak or −1, τ·∂D/∂zˢ there
    Label, CeWeight, Normalizers1,           # (B·L,) label, upstream gradient of the cross-entropy; (4, B·L)
    L, stride_sb, stride_sl, unit_s, stride_tb, stride_tl, unit_t, stride_gb, stride_gl, unit_g,
    V: tl.constexpr, VS: tl.constexpr, SKEWED: tl.constexpr, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, WITH_CE: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    start_s, skew = row_start(n, L, stride_sb, stride_sl, unit_s, SKEWED)
    start_t, _ = row_start(n, L, stride_tb, stride_tl, unit_t, SKEWED)
    start_g, _ = row_start(n, L, stride_gb, stride_gl, unit_g, SKEWED)
    S += start_s
    T += start_t
    Grad += start_g
    STEP: tl.constexpr = LANES * VEC
    weight = tl.load(Weight + n)
    label = -1
    ce_weight = tl.full((), 0.0, ACC)
    ce_max = ce_weight
    ce_c = ce_weight
    if WITH_CE:
        label = tl.load(Label + n)
        label = tl.where((label >= 0) & (label < V), label + skew, -1).to(tl.int32)
        ce_weight = tl.load(CeWeight + n)
        # A token that does not count for the cross-entropy has no normaliser: below this one no logit has a mass.
        m_1, l_1, _, _ = load_normalizers(Normalizers1, n)
        ce_max = tl.where(ce_weight != 0.0, m_1, -lowest(ACC))
        ce_c = tl.where(ce_weight != 0.0, tl.log2(l_1), -lowest(ACC))
    if (weight == 0.0) & (ce_weight == 0.0):
        store_zeros(Grad, skew, VS, SKEWED, LANES, VEC)
        return
    tau = tl.load(Tau + n)
    scale = exponent_scale(tau)
    weight = weight / tau
    peak = tl.load(Peak + n)
    peak = tl.where(peak >= 0, peak + skew, -1).to(tl.int32)
    peak_grad = weight * tl.load(PeakGrad + n)
    sum_g = tl.load(SumG + n)
    m_s, l_s, m_t, l_t = load_normalizers(NormalizersTau, n)
    c_s = tl.log2(l_s)
    c_t = tl.log2(l_t)
    # Counted from a lane's first entry of a tile, so that those of its entries are constants to compare with.
    peak -= tl.arange(0, LANES) * VEC
    label -= tl.arange(0, LANES) * VEC
    for i in range(0, edge_entries(V, VS, STEP, SKEWED), STEP):
        start = edge_start(i, V, STEP, SKEWED)
        write_grad(
            S, T, Grad, start, skew, scale, weight, sum_g, m_s, c_s, m_t, c_t, peak, peak_grad,
            label, ce_weight, ce_max, ce_c, V, VS, SKEWED, True, DIVERGENCE, ALPHA, BETA, WITH_CE, LANES, VEC, ACC,
        )  # fmt: skip
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        write_grad(
            S, T, Grad, start, skew, scale, weight, sum_g, m_s, c_s, m_t, c_t, peak, peak_grad,
            label, ce_weight, ce_max, ce_c, V, VS, SKEWED, False, DIVERGENCE, ALPHA, BETA, WITH_CE, LANES, VEC, ACC,
        )  # fmt: skip
