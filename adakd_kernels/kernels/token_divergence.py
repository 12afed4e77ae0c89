"""`token_divergence`: D(p^τ, q^τ) of every token and its gradient in the student's logits (equations (1), (7), (10)).

Forward: reads 2U (two sweeps: 4U) of the rows that count and writes six numbers a token. Backward: rebuilds p and q
from the two normalisers, reads 2U of the rows that count, writes 1U, in place if asked. U is one pass over an N x V
tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergence_terms import divergence_terms
from .hellinger import sweep_hellinger
from .kl import sweep_kl
from .launch import acc_type, launch_config, on_device, row_strides, skewed
from .rows import (
    LOG2E,
    NEG,
    edge_entries,
    edge_start,
    inside,
    load_tile,
    log2_mass,
    row_start,
    store_normalizer,
    store_zeros,
    tile_offsets,
    whole_steps,
)
from .two_sweeps import sweep_normalizers, sweep_terms


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl"])
def token_divergence_fwd_kernel(
    S, T, Tau, Mask,                         # (B, L, Vs), (B, L, Vt) logits; (B·L,) temperature in ACC, bool
    D, SumG, MaxS, SumS, MaxT, SumT,         # (B·L,) results, in ACC
    L, stride_sb, stride_sl, unit_s, stride_tb, stride_tl, unit_t,
    V: tl.constexpr, SKEWED: tl.constexpr, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    ACC: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    if tl.load(Mask + n) == 0:
        tl.store(D + n, 0.0)
        tl.store(SumG + n, 0.0)
        store_normalizer(MaxS, SumS, n, 0.0, 1.0)
        store_normalizer(MaxT, SumT, n, 0.0, 1.0)
        return
    start_s, skew = row_start(n, L, stride_sb, stride_sl, unit_s, SKEWED)
    start_t, _ = row_start(n, L, stride_tb, stride_tl, unit_t, SKEWED)
    S += start_s
    T += start_t
    scale = LOG2E / tl.load(Tau + n)
    if DIVERGENCE == "hellinger":
        m_s, m_t, l_s, l_t, d = sweep_hellinger(S, T, skew, scale, V, SKEWED, TILES, LANES, VEC, ACC)
        sum_g = 0.5 * d - 0.5
    elif DIVERGENCE == "forward_kl" or DIVERGENCE == "reverse_kl" or DIVERGENCE == "jeffreys":
        m_s, m_t, l_s, l_t, d, sum_g = sweep_kl(S, T, skew, scale, V, SKEWED, DIVERGENCE, TILES, LANES, VEC, ACC)
    else:
        # The normalisers are stored between the sweeps, so that the second one need not hold them.
        m_s, m_t, l_s, l_t = sweep_normalizers(S, T, skew, scale, V, SKEWED, TILES, LANES, VEC, ACC)
        store_normalizer(MaxS, SumS, n, m_s, l_s)
        store_normalizer(MaxT, SumT, n, m_t, l_t)
        d, sum_g = sweep_terms(
            S, T, skew, scale, m_s, m_t, l_s, l_t, V, SKEWED, DIVERGENCE, ALPHA, BETA, LANES, VEC, ACC
        )
        tl.store(D + n, d)
        tl.store(SumG + n, sum_g)
        return
    tl.store(D + n, d)  # 0 for an empty row: none of its entries counts
    tl.store(SumG + n, sum_g)
    store_normalizer(MaxS, SumS, n, m_s, l_s)
    store_normalizer(MaxT, SumT, n, m_t, l_t)


@triton.jit
def write_grad(
    S, T, Grad, start, skew, scale, weight, sum_g, m_s, c_s, m_t, c_t, label, ce_weight, ce_max, ce_c,
    V: tl.constexpr, VS: tl.constexpr, SKEWED: tl.constexpr, EDGE: tl.constexpr, DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, WITH_CE: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(10) for a tile: weight/τ·(g − q Σg), 0 where either side is −inf; plus the gradient of the cross-entropy."""
    s = load_tile(S, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
    t = load_tile(T, start, skew, V, SKEWED, EDGE, LANES, VEC, ACC)
    log_q = log2_mass(s, m_s, c_s, scale)
    log_p = log2_mass(t, m_t, c_t, scale)
    _, g, q = divergence_terms(log_q, log_p, DIVERGENCE, ALPHA, BETA)
    kept = (s != -float("inf")) & (t != -float("inf"))
    grad = tl.where(kept, weight * (g - q * sum_g), 0.0)
    if WITH_CE:
        grad = tl.where(weight != 0.0, grad, 0.0)  # the token may count for the cross-entropy alone
        q_1 = tl.exp2((s - ce_max) * LOG2E - ce_c)
        grad += ce_weight * (q_1 - tl.where(tile_offsets(start, LANES, VEC) == label, 1.0, 0.0))
    grad = grad.to(Grad.dtype.element_ty)
    offs_v = tile_offsets(start, LANES, VEC)
    if EDGE:
        tl.store(Grad + offs_v, grad, mask=inside(offs_v, skew, VS, SKEWED))
    else:
        tl.store(Grad + offs_v, grad)


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "stride_gb", "stride_gl"])
def token_divergence_bwd_kernel(
    S, T, Grad,                              # (B, L, Vs), (B, L, Vt) logits; (B, L, Vs) result, may be S
    Tau, Weight, SumG,                       # (B·L,) temperature, upstream gradient of D, Σg, in ACC
    MaxS, SumS, MaxT, SumT,                  # (B·L,) normalisers at temperature τ
    Label, CeWeight, CeMax, CeSum,           # (B·L,) label, upstream gradient of the cross-entropy, normaliser at 1
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
        label = tl.where((label >= 0) & (label < VS), label + skew, -1).to(tl.int32)
        ce_weight = tl.load(CeWeight + n)
        ce_max = tl.load(CeMax + n)
        # A token that does not count for the cross-entropy has no normaliser: without mass, nothing overflows.
        ce_c = tl.where(ce_weight != 0.0, tl.log2(tl.load(CeSum + n)), -NEG)
    if (weight == 0.0) & (ce_weight == 0.0):
        store_zeros(Grad, skew, VS, SKEWED, LANES, VEC)
        return
    tau = tl.load(Tau + n)
    scale = LOG2E / tau
    weight = weight / tau
    sum_g = tl.load(SumG + n)
    m_s = tl.load(MaxS + n)
    m_t = tl.load(MaxT + n)
    c_s = tl.log2(tl.load(SumS + n))
    c_t = tl.log2(tl.load(SumT + n))
    for i in range(0, edge_entries(V, VS, STEP, SKEWED), STEP):
        start = edge_start(i, V, STEP, SKEWED)
        write_grad(
            S, T, Grad, start, skew, scale, weight, sum_g, m_s, c_s, m_t, c_t, label, ce_weight, ce_max, ce_c,
            V, VS, SKEWED, True, DIVERGENCE, ALPHA, BETA, WITH_CE, LANES, VEC, ACC,
        )  # fmt: skip
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        write_grad(
            S, T, Grad, start, skew, scale, weight, sum_g, m_s, c_s, m_t, c_t, label, ce_weight, ce_max, ce_c,
            V, VS, SKEWED, False, DIVERGENCE, ALPHA, BETA, WITH_CE, LANES, VEC, ACC,
        )  # fmt: skip


def token_divergence_fwd(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: str, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, L, Vs), (B, L, Vt), (B, L), (B, L) bool -> D, Σg, and max and sum of student and teacher, each (B, L)."""
    dtype, acc = acc_type(student, teacher)
    d, sum_g, max_s, sum_s, max_t, sum_t = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(6))
    vocab = min(student.shape[-1], teacher.shape[-1])
    if mask.numel():
        with on_device(student):
            token_divergence_fwd_kernel[(mask.numel(),)](
                student, teacher, temperature.to(dtype).contiguous(), mask.contiguous(),
                d, sum_g, max_s, sum_s, max_t, sum_t,
                mask.shape[1], *row_strides(student), *row_strides(teacher),
                V=vocab, SKEWED=skewed(vocab, student, teacher), DIVERGENCE=divergence, ALPHA=alpha, BETA=beta, ACC=acc,
                **launch_config("forward", divergence, vocab, student, teacher),
            )  # fmt: skip
    return d, sum_g, max_s, sum_s, max_t, sum_t


def token_divergence_bwd(
    student: Tensor, teacher: Tensor, out: Tensor, temperature: Tensor, weight: Tensor, sum_g: Tensor,
    max_s: Tensor, sum_s: Tensor, max_t: Tensor, sum_t: Tensor,
    labels: Tensor | None, ce_weight: Tensor | None, ce_max: Tensor | None, ce_sum: Tensor | None,
    divergence: str, alpha: float, beta: float,
) -> None:  # fmt: skip
    """Write weight·∂D/∂zˢ, plus ce_weight·∂CE/∂zˢ where labels are given, to `out`, which may be the student."""
    dtype, acc = acc_type(student, teacher)
    vocab = min(student.shape[-1], teacher.shape[-1])
    if weight.numel():
        with on_device(student):
            token_divergence_bwd_kernel[(weight.numel(),)](
                student, teacher, out, temperature.to(dtype).contiguous(), weight.to(dtype).contiguous(), sum_g,
                max_s, sum_s, max_t, sum_t,
                None if labels is None else labels.contiguous(),
                None if ce_weight is None else ce_weight.to(dtype).contiguous(), ce_max, ce_sum,
                weight.shape[1], *row_strides(student), *row_strides(teacher), *row_strides(out),
                V=vocab, VS=student.shape[-1], SKEWED=skewed(vocab, student, teacher, out), DIVERGENCE=divergence,
                ALPHA=alpha, BETA=beta, WITH_CE=labels is not None, ACC=acc,
                **launch_config("backward", divergence, vocab, student, teacher),
            )  # fmt: skip
