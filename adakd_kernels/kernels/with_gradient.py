"""`token_divergence` and its gradient in one kernel: equations (1), (7) and (10) of a row while it is in the cache.

Reads 2U (two sweeps: 4U) of the selected rows and 2U of those with a weight; only the first look at a row comes from
memory, where the rows that are read at a time fit the last cache (`launch.with_gradient_config`). Writes 1U, in place
if asked, and eight numbers a token. U is one pass over an N x V tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import GradientCall
from .divergence_terms import Parameters, number
from .gradient import Token, load_cross_entropy, write_row
from .launch import acc_type, on_device, parameters, row_strides, sweeps, with_gradient_config
from .peak import store_peak
from .rows import (
    Normalizers,
    Rows,
    exponent_scale,
    row_start,
    store_normalizers,
    store_zeros,
)
from .token_divergence import sweep_rows, token_divergence_bwd, token_divergence_fwd
from .two_sweeps import LogMass


@triton.jit(
    do_not_specialize=[
        "L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "stride_gb", "stride_gl", "lead", "of_p", "of_q"
    ]
)  # fmt: skip
def token_divergence_with_gradient_kernel(
    S,  # (B, L, Vs) logits
    T,  # (B, L, Vt)
    Grad,  # (B, L, Vs) result, may be S
    Tau,  # (B·L,) temperature, in ACC
    Mask,  # (B·L,) bool
    Weight,  # (B·L,) gradient of the loss in D, in ACC
    Label,  # (B·L,), or None as the next two
    CeWeight,  # (B·L,) gradient of the loss in the cross-entropy, in ACC
    Normalizers1,  # (4, B·L) at temperature 1, in ACC
    D,  # (B·L,) result, in ACC
    SumG,  # (B·L,) result Σg, in ACC
    NormalizersTau,  # (4, B·L) result, in ACC
    Peak,  # (B·L,) result, int64: place of the student's peak or −1
    PeakGrad,  # (B·L,) result τ·∂D/∂zˢ there, in ACC
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
    of_p: tl.int64,  # the numbers of the divergence, see `launch.parameters`
    of_q: tl.int64,
    V: tl.constexpr,  # entries of the common vocabulary
    VS: tl.constexpr,  # entries of the student's
    SKEWED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LIGHT: tl.constexpr,  # see `Parameters`
    WITH_CE: tl.constexpr,
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    S, skew = row_start(S, n, L, stride_sb, stride_sl, unit_s, lead, SKEWED)
    T, _ = row_start(T, n, L, stride_tb, stride_tl, unit_t, lead, SKEWED)
    scale = exponent_scale(tl.load(Tau + n))
    d = tl.full((), 0.0, ACC)
    sum_g = d
    nothing = tl.zeros((LANES, 1), ACC) if sweeps(DIVERGENCE) == 2 else d  # of the shape that `sweep_rows` gives
    of = LogMass(nothing, nothing, nothing, nothing)
    peak = tl.full((), -1, tl.int32)
    peak_grad = d
    if tl.load(Mask + n) != 0:
        of, found = sweep_rows(
            Rows(S, T, skew, scale, V, SKEWED, TILES, LANES, VEC, WIDTH),
            Tau + n, NormalizersTau, n, DIVERGENCE, Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT, False),
        )  # fmt: skip
        d = found.d  # 0 for an empty row, which has no finite entry
        sum_g = found.sum_g
        finite = found.t_peak != -float("inf")
        peak = tl.where(finite, found.peak, -1)
        peak_grad = tl.where(finite, found.peak_grad, 0.0)
    else:
        store_normalizers(NormalizersTau, n, Normalizers(0.0, 1.0, 0.0, 1.0))
    tl.store(D + n, d)
    tl.store(SumG + n, sum_g)
    store_peak(Peak, PeakGrad, n, peak, skew, peak >= 0, peak_grad)
    # What the gradient alone needs is read here, so that the sweeps need not hold it.
    Grad, _ = row_start(Grad, n, L, stride_gb, stride_gl, unit_g, lead, SKEWED)
    weight = tl.load(Weight + n)
    label, ce_weight, m_1, c_1 = load_cross_entropy(Label, CeWeight, Normalizers1, n, skew, V, WITH_CE, ACC)
    if (weight == 0.0) & (ce_weight == 0.0):
        store_zeros(Grad, skew, VS, SKEWED, LANES, VEC, WIDTH)
        return
    # In place: whatever a thread read of other threads' entries above has a part in sums over all threads, which none
    # of them passes before the last has read; below, a thread reads its own entries alone.
    weight = weight / tl.load(Tau + n)
    token = Token(
        weight, sum_g, of.m_s, of.c_s, of.m_t, of.c_t,
        peak, weight * peak_grad, label, ce_weight, m_1, c_1,
    )  # fmt: skip
    write_row(
        Grad, Rows(S, T, skew, scale, V, SKEWED, 1, LANES, VEC, WIDTH), token,
        VS, DIVERGENCE, Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT, WIDTH == 1), WITH_CE,
    )  # fmt: skip


def token_divergence_with_gradient_over(
    out: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    divergence: str,
    alpha: float,
    beta: float,
    weight: Tensor,
    labels: Tensor | None,
    ce_weight: Tensor | None,
    normalizers_1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `token_divergence_fwd`; the gradient goes to `out`, which may be the student."""
    vocab = min(student.shape[-1], teacher.shape[-1])
    config = with_gradient_config(divergence, vocab, student, teacher, out)
    if config is None:
        found = token_divergence_fwd(student, teacher, temperature, mask, divergence, alpha, beta)
        token_divergence_bwd(
            GradientCall(
                student, teacher, temperature, weight, *found[1:], labels, ce_weight, normalizers_1,
                divergence, alpha, beta,
            ),
            out,
        )  # fmt: skip
        return found
    dtype, acc = acc_type(student, teacher)
    size = mask.numel()
    d, sum_g, peak_grad = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(3))
    normalizers_tau = torch.empty(4, *mask.shape, dtype=dtype, device=mask.device)
    peak = torch.empty(mask.shape, dtype=torch.int64, device=mask.device)
    if size:
        with on_device(student):
            token_divergence_with_gradient_kernel[(size,)](
                student, teacher, out, temperature.to(dtype).contiguous(), mask.contiguous(),
                weight.to(dtype).contiguous(), None if labels is None else labels.contiguous(),
                None if ce_weight is None else ce_weight.to(dtype).contiguous(),
                None if normalizers_1 is None else normalizers_1.contiguous().flatten(1),
                d, sum_g, normalizers_tau.flatten(1), peak, peak_grad,
                mask.shape[1], *row_strides(student), *row_strides(teacher), *row_strides(out),
                V=vocab, VS=student.shape[-1], DIVERGENCE=divergence,
                WITH_CE=labels is not None, ACC=acc, **parameters(divergence, alpha, beta, dtype), **config,
            )  # fmt: skip
    return d, sum_g, normalizers_tau, peak, peak_grad
