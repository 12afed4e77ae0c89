"""`spread_statistics`: statistics of the labelled tokens, as those of their batch, and their cross-entropy.

A few numbers a token. Each token of the batch looks for itself among the places of the labelled ones, so one launch
writes every token, and none twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, on_device

# A token for each thread: whatever the types are, no value moves between threads.
BLOCK = 128


@triton.jit(do_not_specialize=["N", "batch", "steps", "vocab"])
def spread_statistics_kernel(
    Difficulty,  # (N,)
    Normalizers1,  # (4, N), in ACC
    Position,  # (N,) int64, ascending
    Label,  # (N,) int64, or None as the next
    LabelLogit,  # (N,) logits
    Everywhere,  # (batch,) result, in ACC
    Valid,  # (batch,) result, bool
    ValidHere,  # (N,) result, bool
    CrossEntropy,  # (N,) result, in ACC, where there are labels
    N,
    batch,
    steps,  # of the search: digits of N in base 2
    vocab,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Each lane is a token of the batch, and looks for itself among the positions.
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < batch
    low = tl.full((BLOCK,), 0, tl.int32)
    high = tl.full((BLOCK,), 0, tl.int32) + N
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(Position + middle, mask=low < high, other=0) < token
        searched = low < high
        low, high = tl.where(searched & before, middle + 1, low), tl.where(searched & (before == 0), middle, high)
    n = low
    here = inside & (n < N)
    here = here & (tl.load(Position + n, mask=here, other=0) == token)
    l_s = tl.load(Normalizers1 + N + n, mask=here, other=0.0)
    l_t = tl.load(Normalizers1 + 3 * N + n, mask=here, other=0.0)
    valid = here & (l_s != 0.0) & (l_t != 0.0)  # a sum of NaN is not 0
    tl.store(Everywhere + token, tl.load(Difficulty + n, mask=here, other=0.0), mask=inside)
    tl.store(Valid + token, valid, mask=inside)
    tl.store(ValidHere + n, valid, mask=here)
    if Label is not None:
        label = tl.load(Label + n, mask=here, other=0)
        known = (label >= 0) & (label < vocab)
        logit = tl.load(LabelLogit + n, mask=valid, other=0.0).to(ACC)
        m_s = tl.load(Normalizers1 + n, mask=valid, other=0.0)
        ce = tl.where(known, m_s - logit + tl.log(tl.where(valid, l_s, 1.0)), float("nan"))
        tl.store(CrossEntropy + n, tl.where(valid, ce, 0.0), mask=here)


def spread_statistics_fwd(
    difficulty: Tensor, normalizers_1: Tensor, positions: Tensor, batch: int, label_logits: Tensor | None,
    labels: Tensor | None, vocab: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(1, n), (4, 1, n), (n,) int64 -> difficulty and valid (1, batch), valid and cross-entropy (1, n)."""
    size, dtype, device = len(positions), difficulty.dtype, difficulty.device
    everywhere = torch.empty(1, batch, dtype=dtype, device=device)
    valid, valid_here = (torch.empty(1, length, dtype=torch.bool, device=device) for length in (batch, size))
    cross_entropy = torch.empty(1, 0 if labels is None else size, dtype=dtype, device=device)
    if batch:
        with on_device(difficulty):
            spread_statistics_kernel[(triton.cdiv(batch, BLOCK),)](
                difficulty.contiguous(), normalizers_1.contiguous(), positions.contiguous(),
                None if labels is None else labels.contiguous(),
                None if label_logits is None else label_logits.contiguous(), everywhere, valid, valid_here,
                cross_entropy, size, batch, size.bit_length(), vocab,
                ACC=tl.float64 if dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4, **FUSED,
            )  # fmt: skip
    return everywhere, valid, valid_here, cross_entropy
