"""The backward of `token_divergence`: equation (10) of a row, or of a part of one, from what the forward stored."""

import triton
import triton.language as tl

from .divergence_terms import Parameters, number
from .gradient import Token, load_cross_entropy, write_row
from .rows import Rows, exponent_scale, load_normalizers, part_of_row, row_start, store_zeros


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
    token = Token(
        weight, tl.load(SumG + n), of_tau.m_s, tl.log2(of_tau.l_s), of_tau.m_t, tl.log2(of_tau.l_t),
        peak, weight * tl.load(PeakGrad + n), label, ce_weight, m_1, c_1,
    )  # fmt: skip
    write_row(
        Grad,
        Rows(S, T, skew, scale, V if PART is None else entries, SKEWED if PART is None or not SKEWED else part == 0, 1,
             LANES, VEC, WIDTH),
        token, VS if PART is None else written, DIVERGENCE,
        Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT, WIDTH == 1), WITH_CE,
    )  # fmt: skip
