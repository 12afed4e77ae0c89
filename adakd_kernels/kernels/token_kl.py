"""`token_kl`: both KL divergences of every token in one sweep, for rows that are split over the vocabulary.

Reads 2U of the selected rows, and 3/LANES of 1U again, as Jeffreys' forward (`token_divergence.py`); writes eleven
numbers a token. U is one pass over an N x V tensor. The equations are those of `kl.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kl import sweep_both
from .launch import acc_type, launch_config, on_device, row_strides
from .peak import store_peak
from .rows import Normalizers, Rows, exponent_rounding, exponent_scale, row_start, saturated, store_normalizers


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "lead"])
def token_kl_fwd_kernel(
    S,  # (B, L, Vs) logits
    T,  # (B, L, Vt)
    Tau,  # (B·L,) temperature, in ACC
    Mask,  # (B·L,) bool
    Forward,  # (B·L,) result KL(p‖q), in ACC
    Kept,  # (B·L,) result Σ p over the finite entries, in ACC
    Reverse,  # (B·L,) result KL(q‖p), in ACC
    Lost,  # (B·L,) result Σ q over the other entries, in ACC
    NormalizersTau,  # (4, B·L) result, in ACC
    Peak,  # (B·L,) result, int64: place of the student's peak or −1
    ForwardGrad,  # (B·L,) result τ·∂D/∂zˢ there of the forward KL, in ACC
    ReverseGrad,  # (B·L,) result, of the reverse KL
    L,
    stride_sb,  # distances of two batches and of two tokens, in units
    stride_sl,
    unit_s,  # entries
    stride_tb,
    stride_tl,
    unit_t,
    lead,  # of all logits, see `row_start`
    V: tl.constexpr,  # entries of the common vocabulary
    SKEWED: tl.constexpr,
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    if tl.load(Mask + n) == 0:
        tl.store(Forward + n, 0.0)
        tl.store(Kept + n, 0.0)
        tl.store(Reverse + n, 0.0)
        tl.store(Lost + n, 0.0)
        store_normalizers(NormalizersTau, n, Normalizers(0.0, 1.0, 0.0, 1.0))
        store_peak(Peak, ForwardGrad, n, 0, 0, False, 0.0)
        tl.store(ReverseGrad + n, 0.0)
        return
    S, skew = row_start(S, n, L, stride_sb, stride_sl, unit_s, lead, SKEWED)
    T, _ = row_start(T, n, L, stride_tb, stride_tl, unit_t, lead, SKEWED)
    tau = tl.load(Tau + n)
    normalizers, found = sweep_both(
        Rows(S, T, skew, exponent_scale(tau), V, SKEWED, TILES, LANES, VEC, WIDTH),
        exponent_rounding(tau), "jeffreys", True,
    )  # fmt: skip
    finite = found.t_peak != -float("inf")
    tl.store(Forward + n, saturated(found.forward))
    tl.store(Kept + n, found.kept)
    tl.store(Reverse + n, saturated(found.reverse))
    tl.store(Lost + n, found.lost)
    store_normalizers(NormalizersTau, n, normalizers)
    store_peak(Peak, ForwardGrad, n, found.peak, skew, finite, saturated(-found.forward_rest))
    tl.store(ReverseGrad + n, tl.where(finite, saturated(-found.reverse_rest), 0.0))


def token_kl_fwd(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, L, Vs), (B, L, Vt), (B, L), (B, L) bool -> the results of `adakd::token_kl`."""
    dtype, acc = acc_type(student, teacher)
    forward, kept, reverse, lost, forward_grad, reverse_grad = (
        torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(6)
    )
    normalizers_tau = torch.empty(4, mask.numel(), dtype=dtype, device=mask.device)
    peak = torch.empty(mask.shape, dtype=torch.int64, device=mask.device)
    vocab = min(student.shape[-1], teacher.shape[-1])
    if mask.numel():
        with on_device(student):
            token_kl_fwd_kernel[(mask.numel(),)](
                student, teacher, temperature.to(dtype).contiguous(), mask.contiguous(),
                forward, kept, reverse, lost, normalizers_tau, peak, forward_grad, reverse_grad,
                mask.shape[1], *row_strides(student), *row_strides(teacher),
                V=vocab, ACC=acc,
                **launch_config("forward", "jeffreys", vocab, student, teacher),
            )  # fmt: skip
    return forward, kept, reverse, lost, normalizers_tau.view(4, *mask.shape), peak, forward_grad, reverse_grad
