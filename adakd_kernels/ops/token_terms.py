"""`adakd::token_terms`: the second of two sweeps over a part of every row, from the normalisers of the whole row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..divergences import DIVERGENCES, with_parameters
from ..reference import Normalizers
from .backends import operator, register_fake, register_triton
from .row_chunks import joined, row_chunks, rows_at


def check_two_sweeps(divergence: str) -> None:
    """Every backend of the operator refuses the divergences of one sweep, in these words.

    Raises:
        RuntimeError: the divergence takes one sweep.
    """
    if DIVERGENCES[divergence].sweeps != 2:
        raise RuntimeError(f"adakd::token_terms takes divergences of two sweeps, and {divergence!r} takes one")


@operator("token_terms")
def token_terms(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    normalizers_tau: Tensor,
    constant: Tensor,
    peak: Tensor,
    divergence: str,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Σ f and Σ (g + c·q) over a part of the vocabulary, without the row's peak (docs/maths.md, section 9).

    Args:
        student: (B, L, Vˢ) logits of the part.
        teacher: (B, L, Vᵗ) logits of the part; its common vocabulary is the first min(Vˢ, Vᵗ) entries.
        temperature: (B, L) τ > 0.
        mask: (B, L) bool; other tokens give 0 and their rows are not read.
        normalizers_tau: (4, B, L) `Normalizers` of the whole row at temperature τ, in the accumulation type. Where a
            sum is 0 the row is empty, and both results are 0.
        constant: (B, L) c, in the accumulation type.
        peak: (B, L) int64, the entry of the part that is left out, or −1.
        divergence: a name of `DIVERGENCES` that takes two sweeps; alpha and beta are its parameters.

    Returns:
        (Σ f, Σ (g + c·q)), (B, L) in the accumulation type; f and g as in docs/maths.md, section 3. An entry
        that is not finite adds (c − 1)·q to the second where g leaves out a term q (`skew_reverse_kl`), else c·q.
    """
    check_two_sweeps(divergence)
    dtype, div = reference.accumulation_dtype(student, teacher), with_parameters(divergence, alpha, beta)
    found = []
    for where, (tau, of, c, at) in row_chunks(mask, student.shape[-1], temperature, normalizers_tau, constant, peak):
        s, t = rows_at(student, where), rows_at(teacher, where)
        found.append(reference.token_terms(s, t, tau, Normalizers.of(of), c, at, div))
    f, g = (torch.zeros(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))
    f[mask], g[mask] = joined(found)
    return f, g


@register_fake(token_terms)
def _(student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(student, teacher)
    f, g = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))
    return f, g


@register_triton(token_terms)
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.token_terms import token_terms_fwd

    check_two_sweeps(args[-3])
    return token_terms_fwd(*args)
