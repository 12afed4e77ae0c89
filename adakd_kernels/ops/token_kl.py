"""`adakd::token_kl`: both KL divergences over a part of the vocabulary as if it were the row, in one sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .backends import operator, register_fake, register_triton
from .row_chunks import joined, row_chunks, rows_at
from .token_stats import masked_normalizers

Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("token_kl")
def token_kl(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What both KL divergences of a whole row need of a part of it (docs/maths.md, section 9).

    Args:
        student: (B, L, Vˢ) logits of the part.
        teacher: (B, L, Vᵗ) logits of the part; its common vocabulary is the first min(Vˢ, Vᵗ) entries.
        temperature: (B, L) τ > 0.
        mask: (B, L) bool; other tokens give (0, 0, 0, 0, (0, 1, 0, 1), −1, 0, 0) and their rows are not read.

    Returns:
        (forward, kept, reverse, lost, normalizers_tau, peak, forward_grad, reverse_grad), with p and q of the part:
        KL(p‖q); Σ p over the finite entries; KL(q‖p); Σ q over the entries that are not finite; the (4, B, L)
        `Normalizers` at temperature τ; and, as in `token_divergence`, the student's most likely entry or −1, and
        τ·∂D/∂zˢ there of either divergence. All are (B, L) in the accumulation type but the normalisers and `peak`,
        which is int64. `kept` and `lost` are relatively exact: no small difference of other results. `lost` is exactly
        0 where every entry is finite. Of a row that is empty on one side, the normalisers and the student's mass, which
        is lost, are the only results other than 0 and −1.
    """
    dtype = reference.accumulation_dtype(student, teacher)
    found = []
    for where, (tau,) in row_chunks(mask, student.shape[-1], temperature):
        sums = reference.kl_sums(rows_at(student, where), rows_at(teacher, where), tau)
        found.append([*sums[:4], torch.stack(sums.normalizers), *sums[5:]])
    forward, kept, reverse, lost, forward_grad, reverse_grad = (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device) for _ in range(6)
    )
    normalizers_tau, peak = masked_normalizers(mask, dtype), torch.full(mask.shape, -1, device=mask.device)
    results = (forward, kept, reverse, lost, normalizers_tau, peak, forward_grad, reverse_grad)
    for everywhere, of_mask in zip(results, joined(found), strict=True):
        everywhere[..., mask] = of_mask
    return results


@register_fake(token_kl)
def _(student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor) -> Eight:
    dtype = reference.accumulation_dtype(student, teacher)
    forward, kept, reverse, lost, forward_grad, reverse_grad = (
        torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(6)
    )
    normalizers_tau = torch.empty(4, *mask.shape, dtype=dtype, device=mask.device)
    peak = torch.empty(mask.shape, dtype=torch.int64, device=mask.device)
    return forward, kept, reverse, lost, normalizers_tau, peak, forward_grad, reverse_grad


@register_triton(token_kl)
def _(*args: Tensor) -> Eight:
    from ..kernels.token_kl import token_kl_fwd

    return token_kl_fwd(*args)
