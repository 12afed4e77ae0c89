"""`adakd::token_divergence` and its backward, out of place and in place.

Between forward and backward only per-token numbers live, next to the logits themselves: temperature, Σg, the
normalisers, and the gradient of the student's most likely entry. Probabilities are rebuilt.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor

from .. import reference
from ..divergences import with_parameters
from ..reference import GradientCall, TokenSums
from .backends import operator, register_fake, register_triton
from .row_chunks import joined, row_chunks, rows_at, set_rows
from .token_stats import masked_normalizers

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("token_divergence")
def token_divergence(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: str, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """D(p^τ, q^τ) of every token, and what its gradient needs.

    Args:
        student: (B, L, Vˢ) logits.
        teacher: (B, L, Vᵗ) logits; the common vocabulary is the first min(Vˢ, Vᵗ) entries.
        temperature: (B, L) τ > 0, a constant for the gradient.
        mask: (B, L) bool; other tokens give (0, 0, (0, 1, 0, 1), −1, 0) and their rows are not read.
        divergence: a name of `DIVERGENCES`; alpha and beta are its parameters.

    Returns:
        (D, Σg, normalizers_tau, peak, peak_grad): equations (1), (7) and (10). All are (B, L) but the `Normalizers` at
        temperature τ, which are (4, B, L), and in the accumulation type but `peak`, which is int64: the student's most
        likely entry or −1. `peak_grad` is τ·∂D/∂zˢ at it, which the backward takes instead of (10): where the token is
        confident, (10) cancels there (docs/maths.md, section 4).
    """
    div, found = with_parameters(divergence, alpha, beta), []
    for where, (tau,) in row_chunks(mask, student.shape[-1], temperature):
        found.append(flat(reference.token_sums(rows_at(student, where), rows_at(teacher, where), tau, div)))
    return everywhere(mask, joined(found))


def flat(sums: TokenSums) -> Sums:
    """The sums of some rows in the order in which the operator returns them."""
    return sums.d, sums.sum_g, torch.stack(sums.normalizers), sums.peak, sums.peak_grad


def everywhere(mask: Tensor, found: list[Tensor]) -> Sums:
    """The results of the tokens in the mask, and what the others give."""
    of_mask = found[0]
    d, sum_g, peak_grad = (torch.zeros(mask.shape, dtype=of_mask.dtype, device=mask.device) for _ in range(3))
    normalizers_tau, peak = masked_normalizers(mask, of_mask.dtype), torch.full(mask.shape, -1, device=mask.device)
    d[mask], sum_g[mask], normalizers_tau[:, mask], peak[mask], peak_grad[mask] = found
    return d, sum_g, normalizers_tau, peak, peak_grad


@register_fake(token_divergence)
def _(student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, *args: Any) -> Sums:
    dtype = reference.accumulation_dtype(student, teacher)
    d, sum_g, peak_grad = (torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(3))
    normalizers_tau = torch.empty(4, *mask.shape, dtype=dtype, device=mask.device)
    return d, sum_g, normalizers_tau, torch.empty(mask.shape, dtype=torch.int64, device=mask.device), peak_grad


@register_triton(token_divergence)
def _(*args: Any) -> Sums:
    from ..kernels.token_divergence import token_divergence_fwd

    return token_divergence_fwd(*args)


def empty_gradient(student: Tensor) -> Tensor:
    """Where the gradient goes: contiguous on the CPU, elsewhere as in `empty_alike`."""
    if student.is_cpu:
        return torch.empty(student.shape, dtype=student.dtype, device=student.device)
    return empty_alike(student)


def empty_alike(logits: Tensor) -> Tensor:
    """A tensor of the shape (B, L, V), each row of which starts where that of the logits starts, modulo 8 entries.

    The Triton kernels need this for wide access (docs/gpu-kernels.md). It is contiguous where the logits are. Of a view
    that leaves tokens out, each of the B has up to 7 unused rows behind it, or none if they were above 1/16 of L, and
    it starts off an aligned entry where the view does: a graph of Inductor expects no more of an operator's result.
    """
    batch, length, vocab = logits.shape
    of_batch, of_token = logits.stride()[:2]
    first, apart = logits.storage_offset() % 8, vocab + (of_token - vocab) % 8
    unused = (of_batch // of_token - length) % 8 if batch > 1 and length > 1 and of_token else 0
    rows = length + (unused if 16 * unused <= length else 0)
    memory = torch.empty(first + batch * rows * apart, dtype=logits.dtype, device=logits.device)
    return memory.as_strided(logits.shape, (rows * apart, apart, 1), first)


# The schema of both backwards: the fields of `GradientCall` in their order.
_SCHEMA_TYPES: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", float: "float"}
_FIELDS = get_type_hints(GradientCall).items()
_GRADIENT_ARGUMENTS = ", ".join(f"{_SCHEMA_TYPES[type_]} {name}" for name, type_ in _FIELDS)
_OVER_STUDENT = _GRADIENT_ARGUMENTS.replace("Tensor student", "Tensor(student!) student")


@operator("token_divergence_backward", f"({_GRADIENT_ARGUMENTS}) -> Tensor")
def token_divergence_backward(*args: Any) -> Tensor:
    """Equation (10): weight·∂D/∂zˢ, plus ce_weight·∂CE/∂zˢ where labels are given.

    Args:
        args: the fields of `GradientCall`; Σg, normalizers_tau and peak are results of `token_divergence`,
            normalizers_1 one of `token_stats`.

    Returns:
        Gradient in the student's shape and type; 0 beyond the common vocabulary.
    """
    call = GradientCall(*args)
    grad = empty_gradient(call.student)
    write_gradient(call, grad, read_rows(call))
    return grad


def read_rows(call: GradientCall) -> Tensor:
    """(B, L) bool, the tokens with a weight; the gradient of the others is 0."""
    read = call.weight != 0
    return read if call.ce_weight is None else read | (call.ce_weight != 0)


def write_gradient(call: GradientCall, grad: Tensor, rows: Tensor) -> None:
    """Write the gradient of the tokens in `rows`, (B, L) bool, and zeros for those that `read_rows` leaves out.

    `grad` may be the student's logits: a chunk of rows has been read before it is written.
    """
    student, teacher, *numbers = call[:-3]
    for where, of_rows in row_chunks(rows, student.shape[-1], *numbers):
        some = GradientCall._make([rows_at(student, where), rows_at(teacher, where), *of_rows, *call[-3:]])
        set_rows(grad, where, reference.rebuilt_gradient(some))
    for where, _ in row_chunks(~read_rows(call), call.student.shape[-1]):
        grad[where] = 0.0


@register_fake(token_divergence_backward)
def _(student: Tensor, *args: Any) -> Tensor:
    return empty_gradient(student)


@register_triton(token_divergence_backward)
def _(*args: Any) -> Tensor:
    from ..kernels.token_divergence import token_divergence_bwd

    call = GradientCall(*args)
    grad = empty_gradient(call.student)
    token_divergence_bwd(call, grad)
    return grad


@torch.library.custom_op(
    "adakd::token_divergence_backward_", mutates_args={"student"}, schema=f"({_OVER_STUDENT}) -> ()"
)
def token_divergence_backward_(student: Tensor, *args: Any) -> None:
    """`token_divergence_backward` with the gradient written over the student's logits."""
    call = GradientCall(student, *args)
    write_gradient(call, student, read_rows(call))


@token_divergence_backward_.register_fake
def _(*args: Any) -> None:
    return None


@register_triton(token_divergence_backward_)
def _(student: Tensor, *args: Any) -> None:
    from ..kernels.token_divergence import token_divergence_bwd

    token_divergence_bwd(GradientCall(student, *args), student)


class OnceDifferentiable(torch.autograd.Function):
    """Passes a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the loss has no second derivative: its kernels compute the gradient only; differentiate "
            "adakd_kernels.reference.token_divergence twice, or call backward without create_graph=True"
        )
