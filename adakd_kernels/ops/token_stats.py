"""`adakd::token_stats`: difficulty and log-normalisers of every token at temperature 1 (equations (1), (2))."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .backends import operator, register_fake, register_triton
from .row_chunks import joined, row_chunks, rows_at


class TokenStatistics(NamedTuple):
    """What is known of every token from its logits at temperature 1.

    Attributes:
        difficulty: (B, L), 0 for tokens that are not valid.
        valid: (B, L) bool, the tokens in the mask whose rows have a finite entry on both sides.
        normalizers_1: (4, B, L) `Normalizers` at temperature 1.
        cross_entropy: (B, L), NaN for a label beyond the vocabulary; of rows that are split over it, else None.
        maxima: (2, ranks, B, L) maxima of all shards of both rows; of rows that are split, else None.
    """

    difficulty: Tensor
    valid: Tensor
    normalizers_1: Tensor
    cross_entropy: Tensor | None = None
    maxima: Tensor | None = None


def masked_normalizers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(4, B, L) `Normalizers` of tokens that are not read: maximum 0 and sum 1 on both sides."""
    bundle = torch.zeros(4, *mask.shape, dtype=dtype, device=mask.device)
    bundle[1::2] = 1.0
    return bundle


@operator("token_stats")
def token_stats(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Squared Hellinger distance of every token, and Σ exp(z) of both rows as maximum and sum relative to it.

    Args:
        student: (B, L, Vˢ) logits.
        teacher: (B, L, Vᵗ) logits; the common vocabulary is the first min(Vˢ, Vᵗ) entries.
        mask: (B, L) bool; other tokens give (0, (0, 1, 0, 1)) and their rows are not read.

    Returns:
        (difficulty s², normalizers_1), (B, L) and (4, B, L) `Normalizers`, contiguous, in the accumulation type. A row
        of nothing but −inf has maximum −inf, sum 0 and s² = 0.
    """
    dtype = reference.accumulation_dtype(student, teacher)
    found = []
    for where, _ in row_chunks(mask, student.shape[-1]):
        d, normalizers = reference.token_stats(rows_at(student, where), rows_at(teacher, where))
        found.append((d, torch.stack(normalizers)))
    difficulty = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    normalizers_1 = masked_normalizers(mask, dtype)
    difficulty[mask], normalizers_1[:, mask] = joined(found)
    return difficulty, normalizers_1


@register_fake(token_stats)
def _(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(student, teacher)
    bundle = torch.empty(4, *mask.shape, dtype=dtype, device=mask.device)
    return torch.empty(mask.shape, dtype=dtype, device=mask.device), bundle


@register_triton(token_stats)
def _(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels.token_stats import token_stats_fwd

    return token_stats_fwd(student, teacher, mask)
