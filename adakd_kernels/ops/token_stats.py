"""`adakd::token_stats`: difficulty and log-normalisers of every token at temperature 1 (equations (1), (2))."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .backends import register_triton

Stats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("adakd::token_stats", mutates_args=())
def token_stats(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Squared Hellinger distance of every token, and Σ exp(z) of both rows as maximum and sum relative to it.

    Args:
        student: (B, L, Vˢ) logits.
        teacher: (B, L, Vᵗ) logits; the first min(Vˢ, Vᵗ) entries of both count.
        mask: (B, L) bool; other tokens give (0, 0, 1, 0, 1) and their rows are not read.

    Returns:
        (s², max_s, sum_s, max_t, sum_t), each (B, L) in the accumulation type. A row of nothing but −inf has
        maximum −inf, sum 0 and s² = 0.
    """
    dtype = reference.accumulation_dtype(student, teacher)
    out = [torch.full(mask.shape, fill, dtype=dtype, device=mask.device) for fill in (0.0, 0.0, 1.0, 0.0, 1.0)]
    sums = reference.token_sums(student[mask], teacher[mask], 1.0, "hellinger")
    for result, value in zip(out, (sums.d, *sums.of_student, *sums.of_teacher), strict=True):
        result[mask] = value
    return out[0], out[1], out[2], out[3], out[4]


@token_stats.register_fake
def _(student: Tensor, teacher: Tensor, mask: Tensor) -> Stats:
    dtype = reference.accumulation_dtype(student, teacher)
    h, max_s, sum_s, max_t, sum_t = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(5))
    return h, max_s, sum_s, max_t, sum_t


@register_triton(token_stats)
def _(student: Tensor, teacher: Tensor, mask: Tensor) -> Stats:
    from ..kernels.token_stats import token_stats_fwd

    return token_stats_fwd(student, teacher, mask)
