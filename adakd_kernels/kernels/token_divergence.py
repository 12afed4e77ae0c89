"""`token_divergence`: D(p^τ, q^τ) of every token and its gradient in the student's logits (equations (1), (7), (10)).

Forward: reads 2U (two sweeps: 4U) of the selected rows, and 3/LANES of 1U again (two sweeps: 5/LANES) for the sums
beside the student's most likely entry (`peak.py`); writes eight numbers a token. U is one pass over an N x V tensor,
LANES the threads of a program, 256 where a row is long. The backward is in `gradient_kernel.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import GradientCall
from .divergence_terms import Parameters, number
from .gradient_kernel import token_divergence_bwd_kernel
from .hellinger import sweep_hellinger
from .kl import sweep_kl
from .launch import acc_type, launch_config, on_device, parameters, row_parts, row_strides, sweeps
from .peak import store_peak
from .rows import Normalizers, Rows, exponent_rounding, exponent_scale, row_start, store_normalizers
from .split import split_divergence
from .two_sweeps import LogMass, sweep_normalizers, sweep_terms


@triton.jit
def sweep_rows(
    rows,
    Tau,  # pointer to the token's temperature
    NormalizersTau,  # (4, B·L)
    n,
    DIVERGENCE: tl.constexpr,
    parameters,
):
    """(`LogMass`, `TokenResult`) of token n; its normalisers are stored."""
    if sweeps(DIVERGENCE) == 1:
        if DIVERGENCE == "hellinger":
            normalizers, found = sweep_hellinger(rows, exponent_rounding(tl.load(Tau)))
        else:
            normalizers, found = sweep_kl(rows, exponent_rounding(tl.load(Tau)), DIVERGENCE)
        store_normalizers(NormalizersTau, n, normalizers)
        own = 0.0
    else:
        # Without the scale's rounding error: the second sweep computes its masses with the rounded scale, and they are
        # added to these.
        normalizers, first = sweep_normalizers(rows, 0.0)
        # Stored between the sweeps, so that the second one need not hold all of them.
        store_normalizers(NormalizersTau, n, normalizers)
        found = sweep_terms(rows, Tau, normalizers, first, DIVERGENCE, parameters)
        # (LANES, 1) The same numbers as in the second sweep, which holds them already.
        own = (0.0 * first.tail_s)[:, None]
    c_s = tl.log2(tl.where(normalizers.l_s == 0.0, 1.0, normalizers.l_s))
    c_t = tl.log2(tl.where(normalizers.l_t == 0.0, 1.0, normalizers.l_t))
    return LogMass(normalizers.m_s + own, c_s + own, normalizers.m_t + own, c_t + own), found


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "lead", "of_p", "of_q"])
def token_divergence_fwd_kernel(
    S,  # (B, L, Vs) logits
    T,  # (B, L, Vt)
    Tau,  # (B·L,) temperature, in ACC
    Mask,  # (B·L,) bool
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
    lead,  # of all logits, see `row_start`
    of_p: tl.int64,  # the numbers of the divergence, see `launch.parameters`
    of_q: tl.int64,
    V: tl.constexpr,  # entries of the common vocabulary
    SKEWED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LIGHT: tl.constexpr,  # see `Parameters`
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    if tl.load(Mask + n) == 0:
        tl.store(D + n, 0.0)
        tl.store(SumG + n, 0.0)
        store_normalizers(NormalizersTau, n, Normalizers(0.0, 1.0, 0.0, 1.0))
        store_peak(Peak, PeakGrad, n, 0, 0, False, 0.0)
        return
    S, skew = row_start(S, n, L, stride_sb, stride_sl, unit_s, lead, SKEWED)
    T, _ = row_start(T, n, L, stride_tb, stride_tl, unit_t, lead, SKEWED)
    scale = exponent_scale(tl.load(Tau + n))
    _, found = sweep_rows(
        Rows(S, T, skew, scale, V, SKEWED, TILES, LANES, VEC, WIDTH),
        Tau + n, NormalizersTau, n, DIVERGENCE, Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT, False),
    )  # fmt: skip
    tl.store(D + n, found.d)  # 0 for an empty row, which has no finite entry
    tl.store(SumG + n, found.sum_g)
    store_peak(Peak, PeakGrad, n, found.peak, skew, found.t_peak != -float("inf"), found.peak_grad)


def token_divergence_fwd(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: str, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, L, Vs), (B, L, Vt), (B, L), (B, L) bool -> D, Σg, (4, B, L) normalisers, peak, gradient there."""
    dtype, acc = acc_type(student, teacher)
    d, sum_g, peak_grad = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(3))
    normalizers_tau = torch.empty(4, mask.numel(), dtype=dtype, device=mask.device)
    peak = torch.empty(mask.shape, dtype=torch.int64, device=mask.device)
    vocab = min(student.shape[-1], teacher.shape[-1])
    temperature, mask = temperature.to(dtype).contiguous(), mask.contiguous()
    if mask.numel():
        config = launch_config("forward", divergence, vocab, student, teacher)
        results = (d, sum_g, normalizers_tau, peak, peak_grad)
        with on_device(student):
            if row_parts(config, mask.numel(), vocab, student.device)[0] > 1:
                split_divergence(student, teacher, temperature, mask, divergence, alpha, beta, results, config)
            else:
                token_divergence_fwd_kernel[(mask.numel(),)](
                    student, teacher, temperature, mask, *results,
                    mask.shape[1], *row_strides(student), *row_strides(teacher),
                    V=vocab, DIVERGENCE=divergence, ACC=acc, **parameters(divergence, alpha, beta, dtype), **config,
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
        config = launch_config("backward", call.divergence, vocab, student, teacher, out)
        parts, part = row_parts(config, call.weight.numel(), vocab, student.device)
        with on_device(student):
            token_divergence_bwd_kernel[(call.weight.numel(), parts)](
                student, teacher, out, numbers(call.temperature), numbers(call.weight), call.sum_g,
                bundle(call.normalizers_tau), call.peak, call.peak_grad,
                None if call.labels is None else call.labels.contiguous(), numbers(call.ce_weight),
                bundle(call.normalizers_1),
                call.weight.shape[1], *row_strides(student), *row_strides(teacher), *row_strides(out),
                PART=part, V=vocab, VS=student.shape[-1], DIVERGENCE=call.divergence,
                WITH_CE=call.labels is not None, ACC=acc,
                **parameters(call.divergence, call.alpha, call.beta, dtype), **config,
            )  # fmt: skip
