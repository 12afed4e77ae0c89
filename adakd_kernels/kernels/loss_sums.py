"""`token_cross_entropy`, `loss_sums` and its backward `loss_weights`: per-token numbers between the large kernels.

Each reads and writes a few numbers a token; the cross-entropy reads one logit of each. The sums are one program's, in
fp64, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adaptive import exact_dtype
from .launch import FUSED, on_device, row_strides

BLOCK = 1024


@triton.jit(do_not_specialize=["L", "N", "stride_sb", "stride_sl"])
def token_cross_entropy_kernel(
    S,  # (B, L, Vs) logits
    Label,  # (B·L,) int64
    Mask,  # (B·L,) bool
    Normalizers1,  # (4, B·L), in ACC
    CrossEntropy,  # (B·L,) result, in ACC
    L,
    N,
    stride_sb,  # distances of two batches and of two tokens, in units
    stride_sl,
    unit_s,  # entries
    V: tl.constexpr,  # entries of the common vocabulary
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    mask = inside & (tl.load(Mask + n, mask=inside, other=0) != 0)
    label = tl.load(Label + n, mask=mask, other=0)
    known = (label >= 0) & (label < V)
    row = ((n // L).to(tl.int64) * stride_sb + (n % L).to(tl.int64) * stride_sl) * unit_s
    logit = tl.load(S + row + label, mask=mask & known, other=0.0).to(ACC)
    m_s = tl.load(Normalizers1 + n, mask=mask, other=0.0)
    l_s = tl.load(Normalizers1 + N + n, mask=mask, other=1.0)
    ce = tl.where(known, m_s - logit + tl.log(l_s), float("nan"))
    tl.store(CrossEntropy + n, tl.where(mask, ce, 0.0), mask=inside)


def token_cross_entropy_fwd(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, normalizers_1: Tensor
) -> Tensor:
    """(B, L, Vs), (B, L, Vt), (B, L) int64, (B, L) bool, (4, B, L) -> (B, L)"""
    result = torch.empty(mask.shape, dtype=normalizers_1.dtype, device=mask.device)
    if mask.numel():
        with on_device(student):
            token_cross_entropy_kernel[(triton.cdiv(mask.numel(), BLOCK),)](
                student, labels.contiguous(), mask.contiguous(), normalizers_1.contiguous().flatten(1), result,
                mask.shape[1], mask.numel(), *row_strides(student), V=min(student.shape[-1], teacher.shape[-1]),
                ACC=tl.float64 if result.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4, **FUSED,
            )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["N", "batch"])
def loss_sums_kernel(
    D,  # (N,) divergences
    Tau,  # (N,) temperatures
    CrossEntropy,  # (N,), or None
    K,  # 0-d divisors
    Items,  # or None
    Position,  # (N,) int64 places of the tokens in a batch of more, or None
    TokenLoss,  # (N,) result, or (batch,)
    Loss,  # 0-d result
    Distillation,  # 0-d result, fp64
    N,
    batch,
    ce_weight: tl.float64,
    BLOCK: tl.constexpr,
):
    if Position is not None:
        for start in range(0, batch, BLOCK):
            token = start + tl.arange(0, BLOCK)
            tl.store(TokenLoss + token, tl.zeros((BLOCK,), TokenLoss.dtype.element_ty), mask=token < batch)
        tl.debug_barrier()  # the zeros of one thread are overwritten by others
    total = tl.zeros((BLOCK,), tl.float64)
    total_ce = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < N
        tau = tl.load(Tau + n, mask=inside, other=0.0)
        token_loss = tau * tau * tl.load(D + n, mask=inside, other=0.0)
        place = n
        if Position is not None:
            place = tl.load(Position + n, mask=inside, other=0)
        tl.store(TokenLoss + place, token_loss, mask=inside)
        total += token_loss.to(tl.float64)
        if CrossEntropy is not None:
            total_ce += tl.load(CrossEntropy + n, mask=inside, other=0.0).to(tl.float64)
    distillation = tl.sum(total) / tl.load(K).to(tl.float64)
    tl.store(Distillation, distillation)
    loss = distillation
    if CrossEntropy is not None:
        a = tl.full((), ce_weight, tl.float64)
        loss = (1.0 - a) * distillation + a * (tl.sum(total_ce) / tl.load(Items).to(tl.float64))
    tl.store(Loss, loss.to(Loss.dtype.element_ty))


def loss_sums_fwd(
    d: Tensor,
    temperature: Tensor,
    k: Tensor,
    cross_entropy: Tensor | None,
    n: Tensor | None,
    ce_weight: float,
    positions: Tensor | None = None,
    batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L), (B, L), 0-d, (B, L) or None, 0-d or None -> τ²·D (B, L) or (1, batch), and 0-d loss and L."""
    token_loss = torch.empty(d.shape if positions is None else (1, batch), dtype=d.dtype, device=d.device)
    loss = torch.empty((), dtype=d.dtype, device=d.device)
    distillation = torch.empty((), dtype=exact_dtype(d.device), device=d.device)
    with on_device(d):
        loss_sums_kernel[(1,)](
            d.contiguous(), temperature.to(d.dtype).contiguous(),
            None if cross_entropy is None else cross_entropy.contiguous(), k, n,
            None if positions is None else positions.contiguous(), token_loss, loss, distillation, d.numel(), batch,
            float(ce_weight), BLOCK=BLOCK, num_warps=8, **FUSED,
        )  # fmt: skip
    return token_loss, loss, distillation


@triton.jit(do_not_specialize=["N"])
def loss_weights_kernel(
    GradTokenLoss,  # (N,), or None
    GradLoss,  # 0-d, or None; without either, the gradient of the loss is 1
    Tau,  # (N,) temperatures
    Mask,  # (N,) bool
    K,  # 0-d
    CrossEntropy,  # (N,), or None as the next two
    CeMask,  # (N,) bool
    Items,  # 0-d
    Weight,  # (1, N) or (2, N) result
    N,
    ce_weight: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    weight = tl.zeros((BLOCK,), ACC)
    of_loss = tl.full((), 0.0, ACC)
    a = tl.full((), ce_weight, tl.float64).to(ACC)
    if (GradLoss is not None) | (GradTokenLoss is None):
        of_loss = tl.full((), 1.0, ACC) if GradLoss is None else tl.load(GradLoss).to(ACC)
        weight += of_loss * (1.0 - a) / tl.load(K).to(ACC)
    if GradTokenLoss is not None:
        weight += tl.load(GradTokenLoss + n, mask=inside, other=0.0).to(ACC)
    tau = tl.load(Tau + n, mask=inside, other=0.0).to(ACC)
    weight = tl.where(tl.load(Mask + n, mask=inside, other=0) != 0, weight * (tau * tau), 0.0)
    if CrossEntropy is not None:
        labelled = tl.load(CeMask + n, mask=inside, other=0) != 0
        of_ce = tl.where(labelled, of_loss * a / tl.load(Items).to(ACC), 0.0)
        ce = tl.load(CrossEntropy + n, mask=inside, other=0.0)
        # The weight of D carries the NaN: it reaches the entries of the common vocabulary, and no other.
        lost = (ce != ce) & (of_ce != 0.0)
        weight = tl.where(lost, float("nan"), weight)
        tl.store(Weight + N + n, tl.where(lost, 0.0, of_ce), mask=inside)
    tl.store(Weight + n, weight, mask=inside)


def loss_weights_fwd(
    grad_token_loss: Tensor | None,
    grad_loss: Tensor | None,
    temperature: Tensor,
    mask: Tensor,
    k: Tensor,
    cross_entropy: Tensor | None,
    ce_mask: Tensor | None,
    n: Tensor | None,
    ce_weight: float,
) -> Tensor:
    """The arguments of `adakd::loss_weights` -> (1, B, L), or with a cross-entropy (2, B, L)."""

    def contiguous(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    dtype, size = temperature.dtype, mask.numel()
    result = torch.empty((1 if cross_entropy is None else 2, *mask.shape), dtype=dtype, device=mask.device)
    if size:
        with on_device(mask):
            loss_weights_kernel[(triton.cdiv(size, BLOCK),)](
                contiguous(grad_token_loss), grad_loss, contiguous(temperature), contiguous(mask), k,
                contiguous(cross_entropy), contiguous(ce_mask), n, result.flatten(1), size,
                0.0 if cross_entropy is None else float(ce_weight),
                ACC=tl.float64 if dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4, **FUSED,
            )  # fmt: skip
    return result
