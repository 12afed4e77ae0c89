"""`token_divergence`: D(p^τ, q^τ) of every token and its gradient in the student's logits (equations (1), (7), (10)).

Forward: reads 2U (two sweeps: 4U) of the rows that count, and 3/LANES of 1U again (two sweeps: 5/LANES) for the sums
beside the student's most likely entry (`peak.py`); writes eight numbers a token. U is one pass over an N x V tensor,
LANES the threads of a program, 256 where a row is long. The backward is in `gradient.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import GradientCall
from .gradient import token_divergence_bwd_kernel
from .hellinger import sweep_hellinger
from .kl import sweep_kl
from .launch import acc_type, launch_config, on_device, row_strides, skewed, sweeps
from .peak import store_peak
from .rows import exponent_rounding, exponent_scale, row_start, store_normalizers
from .two_sweeps import sweep_normalizers, sweep_terms


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl"])
def token_divergence_fwd_kernel(
    S, T, Tau, Mask,                         # (B, L, Vs), (B, L, Vt) logits; (B·L,) temperature in ACC, bool
    D, SumG, NormalizersTau,                 # (B·L,), (B·L,), (4, B·L) results, in ACC
    Peak, PeakGrad,                          # (B·L,) int64 place of the student's peak, gradient there in ACC
    L, stride_sb, stride_sl, unit_s, stride_tb, stride_tl, unit_t,
    V: tl.constexpr, SKEWED: tl.constexpr, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    ACC: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    if tl.load(Mask + n) == 0:
        tl.store(D + n, 0.0)
        tl.store(SumG + n, 0.0)
        store_normalizers(NormalizersTau, n, 0.0, 1.0, 0.0, 1.0)
        store_peak(Peak, PeakGrad, n, 0, 0, False, 0.0)
        return
    start_s, skew = row_start(n, L, stride_sb, stride_sl, unit_s, SKEWED)
    start_t, _ = row_start(n, L, stride_tb, stride_tl, unit_t, SKEWED)
    S += start_s
    T += start_t
    ONE_SWEEP: tl.constexpr = sweeps(DIVERGENCE) == 1
    tau = tl.load(Tau + n)
    scale = exponent_scale(tau)
    if DIVERGENCE == "hellinger":
        m_s, m_t, l_s, l_t, d, sum_g, peak, t_peak, grad = sweep_hellinger(
            S, T, skew, scale, exponent_rounding(tau), V, SKEWED, TILES, LANES, VEC, ACC
        )
    elif ONE_SWEEP:
        m_s, m_t, l_s, l_t, d, sum_g, peak, t_peak, grad = sweep_kl(
            S, T, skew, scale, exponent_rounding(tau), V, SKEWED, DIVERGENCE, TILES, LANES, VEC, ACC
        )
    else:
        m_s, m_t, l_s, l_t, tail_s, peak, gap = sweep_normalizers(S, T, skew, scale, V, SKEWED, TILES, LANES, VEC, ACC)
        # The normalisers are stored between the sweeps, so that the second one need not hold them.
        store_normalizers(NormalizersTau, n, m_s, l_s, m_t, l_t)
        d, sum_g, t_peak, grad = sweep_terms(
            S, T, Tau + n, skew, scale, m_s, m_t, l_s, l_t, tail_s, peak, gap,
            V, SKEWED, DIVERGENCE, ALPHA, BETA, LANES, VEC, ACC,
        )  # fmt: skip
    tl.store(D + n, d)  # 0 for an empty row: none of its entries counts
    tl.store(SumG + n, sum_g)
    store_peak(Peak, PeakGrad, n, peak, skew, t_peak != -float("inf"), grad)
    if ONE_SWEEP:
        store_normalizers(NormalizersTau, n, m_s, l_s, m_t, l_t)


def token_divergence_fwd(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: str, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, L, Vs), (B, L, Vt), (B, L), (B, L) bool -> D, Σg, (4, B, L) normalisers, peak, gradient there."""
    dtype, acc = acc_type(student, teacher)
    d, sum_g, peak_grad = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(3))
    normalizers_tau = torch.empty(4, mask.numel(), dtype=dtype, device=mask.device)
    peak = torch.empty(mask.shape, dtype=torch.int64, device=mask.device)
    vocab = min(student.shape[-1], teacher.shape[-1])
    if mask.numel():
        with on_device(student):
            token_divergence_fwd_kernel[(mask.numel(),)](
                student, teacher, temperature.to(dtype).contiguous(), mask.contiguous(),
                d, sum_g, normalizers_tau, peak, peak_grad,
                mask.shape[1], *row_strides(student), *row_strides(teacher),
                V=vocab, SKEWED=skewed(vocab, student, teacher), DIVERGENCE=divergence, ALPHA=alpha, BETA=beta, ACC=acc,
                **launch_config("forward", divergence, vocab, student, teacher),
            )  # fmt: skip
    return d, sum_g, normalizers_tau.view(4, *mask.shape), peak, peak_grad


def token_divergence_bwd(call: GradientCall, out: Tensor) -> None:
    """Write weight·∂D/∂zˢ, plus ce_weight·∂CE/∂zˢ where labels are given, to `out`, which may be the student."""
    student, teacher = call.student, call.teacher
    dtype, acc = acc_type(student, teacher)

    def numbers(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous()

    def bundle(x: Tensor | None) -> Tensor | None:
        """(4, B·L)"""
        return None if x is None else x.contiguous().flatten(1)

    vocab = min(student.shape[-1], teacher.shape[-1])
    if call.weight.numel():
        with on_device(student):
            token_divergence_bwd_kernel[(call.weight.numel(),)](
                student, teacher, out, numbers(call.temperature), numbers(call.weight), call.sum_g,
                bundle(call.normalizers_tau), call.peak, call.peak_grad,
                None if call.labels is None else call.labels.contiguous(), numbers(call.ce_weight),
                bundle(call.normalizers_1),
                call.weight.shape[1], *row_strides(student), *row_strides(teacher), *row_strides(out),
                V=vocab, VS=student.shape[-1], SKEWED=skewed(vocab, student, teacher, out), DIVERGENCE=call.divergence,
                ALPHA=call.alpha, BETA=call.beta, WITH_CE=call.labels is not None, ACC=acc,
                **launch_config("backward", call.divergence, vocab, student, teacher, out),
            )  # fmt: skip
