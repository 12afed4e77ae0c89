"""The gradient of `token_divergence` in the student's logits: equation (10).

Rebuilds p and q from the normalisers; reads 2U of the rows with a weight, writes 1U, in place if asked. U is one pass
over an N x V tensor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence_terms import Parameters, divergence_terms, number
from .rows import (
    LOG2E,
    Rows,
    edge_entries,
    edge_start,
    entries_of_lane,
    exponent_scale,
    first_of_lanes,
    inside,
    load_normalizers,
    load_tile,
    log2_mass,
    lowest,
    part_of_row,
    row_start,
    store_zeros,
    tile_offsets,
    whole_steps,
)


class Token(NamedTuple):
    """The numbers of one token that its gradient needs."""

    weight: tl.tensor  # gradient of the loss in D, over τ
    sum_g: tl.tensor  # Σg
    m_s: tl.tensor  # maxima and c = log2 l at temperature τ
    c_s: tl.tensor
    m_t: tl.tensor
    c_t: tl.tensor
    peak: tl.tensor  # (LANES,) offset of the student's peak, less that of a lane's first entry in the first tile
    peak_grad: tl.tensor  # gradient there
    label: tl.tensor  # (LANES,) as the peak
    ce_weight: tl.tensor  # gradient of the loss in the cross-entropy
    m_1: tl.tensor  # the student's maximum and c at temperature 1
    c_1: tl.tensor


@triton.jit
def write_grad(
    Grad,  # pointer to the gradient's aligned entry at or before the row's first
    rows,
    start,
    token,
    VS,  # entries of the student's vocabulary, of a part those that it writes
    EDGE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    parameters,
    WITH_CE: tl.constexpr,
):
    """(10) for a tile: weight/τ·(g − q Σg), 0 where either side is −inf; plus the gradient of the cross-entropy.

    At the student's peak the difference may cancel, so that there the forward's own result takes its place.
    """
    offs_v = tile_offsets(start, rows.LANES, rows.VEC, rows.WIDTH)
    s = load_tile(rows.S, start, rows, EDGE)
    t = load_tile(rows.T, start, rows, EDGE)
    log_q = log2_mass(s, token.m_s, token.c_s, rows.scale)
    log_p = log2_mass(t, token.m_t, token.c_t, rows.scale)
    _, g, q = divergence_terms(log_q, log_p, DIVERGENCE, parameters)
    finite = (s != -float("inf")) & (t != -float("inf"))
    grad = tl.where(finite, token.weight * (g - q * token.sum_g), 0.0)
    entry = entries_of_lane(rows.LANES, rows.VEC, rows.WIDTH)
    at_peak = (token.peak - start)[:, None] == entry
    grad = tl.where(at_peak, token.peak_grad, grad)
    if WITH_CE:
        # A token without a weight of D has no normalisers at τ either, and what stands in their place may give NaN.
        grad = tl.where(token.weight != 0.0, grad, 0.0)
        q_1 = tl.exp2((s - token.m_1) * LOG2E - token.c_1)
        grad_ce = token.ce_weight * (q_1 - tl.where((token.label - start)[:, None] == entry, 1.0, 0.0))
        if EDGE:  # a weight that is NaN is seen in the common vocabulary, and nowhere else
            grad_ce = tl.where(inside(offs_v, rows.skew, rows.V, rows.SKEWED), grad_ce, 0.0)
        grad += grad_ce
    grad = grad.to(Grad.dtype.element_ty)
    if EDGE:
        tl.store(Grad + offs_v, grad, mask=inside(offs_v, rows.skew, VS, rows.SKEWED))
    else:
        tl.store(Grad + offs_v, grad)


@triton.jit
def write_row(
    Grad,  # as in `write_grad`
    rows,
    token,
    VS,
    DIVERGENCE: tl.constexpr,
    parameters,
    WITH_CE: tl.constexpr,
):
    """`write_grad` for every tile of a row of VS entries."""
    STEP: tl.constexpr = rows.LANES * rows.VEC
    for i in range(0, edge_entries(rows.V, VS, STEP, rows.SKEWED), STEP):
        start = edge_start(i, rows.V, STEP, rows.SKEWED)
        write_grad(Grad, rows, start, token, VS, True, DIVERGENCE, parameters, WITH_CE)
    for start in range(whole_steps(rows.V, STEP, rows.SKEWED)[0], whole_steps(rows.V, STEP, rows.SKEWED)[1], STEP):
        write_grad(Grad, rows, start, token, VS, False, DIVERGENCE, parameters, WITH_CE)


@triton.jit
def load_cross_entropy(
    Label,
    CeWeight,
    Normalizers1,
    n,
    first,
    V: tl.constexpr,
    WITH_CE: tl.constexpr,
    ACC: tl.constexpr,
):
    """(place of the label or −1, weight, m_1, c_1) of token n; `first` is the place of the row's first entry."""
    label = -1
    ce_weight = tl.full((), 0.0, ACC)
    m_1 = ce_weight
    c_1 = ce_weight
    if WITH_CE:
        label = tl.load(Label + n)
        label = tl.where((label >= 0) & (label < V), label + first, -1).to(tl.int32)
        ce_weight = tl.load(CeWeight + n)
        of_1 = load_normalizers(Normalizers1, n)
        # A token without a weight of the cross-entropy may have no normaliser: relative to the largest number in its
        # place, no logit has a mass.
        m_1 = tl.where(ce_weight != 0.0, of_1.m_s, -lowest(ACC))
        c_1 = tl.where(ce_weight != 0.0, tl.log2(of_1.l_s), -lowest(ACC))
    return label, ce_weight, m_1, c_1


@triton.jit(
    do_not_specialize=[
        "L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "stride_gb", "stride_gl", "lead", "of_p", "of_q"
    ]
)  # fmt: skip
def token_divergence_bwd_kernel(
    S,  # (B, L, Vs) logits
    T,  # (B, L, Vt)
    Grad,  # (B, L, Vs) result, may be S
    Tau,  # (B·L,) temperature, in ACC
    Weight,  # (B·L,) gradient of the loss in D, in ACC
    SumG,  # (B·L,) Σg, in ACC
    NormalizersTau,  # (4, B·L) at temperature τ, in ACC
    Peak,  # (B·L,) int64, place of the student's peak or −1
    PeakGrad,  # (B·L,) τ·∂D/∂zˢ there, in ACC
    Label,  # (B·L,), or None as the next two
    CeWeight,  # (B·L,) gradient of the loss in the cross-entropy, in ACC
    Normalizers1,  # (4, B·L) at temperature 1, in ACC
    L,
    stride_sb,  # distances of two batches and of two tokens, in units
    stride_sl,
    unit_s,  # entries
    stride_tb,
    stride_tl,
    unit_t,
    stride_gb,
    stride_gl,
    unit_g,
    lead,  # of all three tensors, see `row_start`
    PART,  # entries of a part, see `part_of_row`, or None
    of_p: tl.int64,  # the numbers of the divergence, see `launch.parameters`
    of_q: tl.int64,
    V: tl.constexpr,  # entries of the common vocabulary
    VS: tl.constexpr,  # entries of the student's
    SKEWED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LIGHT: tl.constexpr,  # see `Parameters`
    WITH_CE: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n, part = tl.program_id(0), tl.program_id(1)
    S, skew = row_start(S, n, L, stride_sb, stride_sl, unit_s, lead, SKEWED)
    T, _ = row_start(T, n, L, stride_tb, stride_tl, unit_t, lead, SKEWED)
    Grad, _ = row_start(Grad, n, L, stride_gb, stride_gl, unit_g, lead, SKEWED)
    entries = V
    written = VS
    first = skew  # place of the row's first entry from where the part begins
    if PART is not None:
        parts = tl.num_programs(1)
        start, own_skew, entries = part_of_row(part, PART, parts, skew, V, SKEWED)
        written = tl.where(part == parts - 1, skew + VS - start - own_skew, entries)
        first = skew - start
        skew = own_skew
        S += start
        T += start
        Grad += start
    weight = tl.load(Weight + n)
    label, ce_weight, m_1, c_1 = load_cross_entropy(Label, CeWeight, Normalizers1, n, first, V, WITH_CE, ACC)
    if (weight == 0.0) & (ce_weight == 0.0):
        store_zeros(
            Grad, skew, VS if PART is None else written, SKEWED if PART is None or not SKEWED else part == 0,
            LANES, VEC, WIDTH,
        )  # fmt: skip
        return
    tau = tl.load(Tau + n)
    scale = exponent_scale(tau)
    weight = weight / tau
    peak = tl.load(Peak + n)
    peak = tl.where(peak >= 0, peak + first, -1).to(tl.int32)
    of_tau = load_normalizers(NormalizersTau, n)
    # Relative to a lane's first entry of a tile, so that a lane compares places with constants.
    of_lane = first_of_lanes(LANES, WIDTH)
    token = Token(
        weight, tl.load(SumG + n), of_tau.m_s, tl.log2(of_tau.l_s), of_tau.m_t, tl.log2(of_tau.l_t),
        peak - of_lane, weight * tl.load(PeakGrad + n), label - of_lane, ce_weight, m_1, c_1,
    )  # fmt: skip
    write_row(
        Grad,
        Rows(S, T, skew, scale, V if PART is None else entries, SKEWED if PART is None or not SKEWED else part == 0, 1,
             LANES, VEC, WIDTH),
        token, VS if PART is None else written, DIVERGENCE, Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT),
        WITH_CE,
    )  # fmt: skip
