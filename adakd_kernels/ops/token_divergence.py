"""`adakd::token_divergence`, its backward (out of place and in place), and the autograd function over them.

Between forward and backward only per-token numbers live, next to the logits themselves: temperature, Σg, the
normalisers, and the gradient of the student's most likely entry. Probabilities are rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .. import reference
from ..divergences import Divergence, with_parameters
from ..reference import GradientCall
from .backends import operator, register_fake, register_triton
from .loss_sums import loss_sums, loss_weights, token_cross_entropy
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
    dtype = reference.accumulation_dtype(student, teacher)
    sums = reference.token_sums(
        student[mask], teacher[mask], temperature[mask], with_parameters(divergence, alpha, beta)
    )
    d, sum_g, peak_grad = (torch.zeros(mask.shape, dtype=dtype, device=mask.device) for _ in range(3))
    peak = torch.full(mask.shape, -1, device=mask.device)
    normalizers_tau = masked_normalizers(mask, dtype)
    d[mask], sum_g[mask], peak[mask], peak_grad[mask] = sums.d, sums.sum_g, sums.peak, sums.peak_grad
    normalizers_tau[:, mask] = torch.stack(sums.normalizers)
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
    """Where the gradient goes: contiguous on the CPU, elsewhere with rows apart as the student's modulo 8 entries.

    So both start alike, which the Triton kernels need for wide access (docs/gpu-kernels.md).
    """
    pad = 0 if student.device.type == "cpu" else (student.stride(-2) - student.shape[-1]) % 8
    shape = (*student.shape[:-1], student.shape[-1] + pad)
    return torch.empty(shape, dtype=student.dtype, device=student.device)[..., : student.shape[-1]]


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
    read = call.weight != 0
    if call.ce_weight is not None:
        read |= call.ce_weight != 0
    acc = reference.accumulation_dtype(call.student, call.teacher)
    grad = torch.zeros(call.student.shape, dtype=acc, device=call.student.device)
    grad[read] = reference.rebuilt_gradient(call.rows(read))
    return empty_gradient(call.student).copy_(grad)


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
    student.copy_(token_divergence_backward(student, *args))


@token_divergence_backward_.register_fake
def _(*args: Any) -> None:
    return None


@register_triton(token_divergence_backward_)
def _(student: Tensor, *args: Any) -> None:
    from ..kernels.token_divergence import token_divergence_bwd

    token_divergence_bwd(GradientCall(student, *args), student)


def token_losses(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    divergence: Divergence,
    *,
    labels: Tensor | None = None,
    ce_mask: Tensor | None = None,
    normalizers_1: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    sums: Callable[..., Sums] | None = None,
    inplace: bool = False,
    n: Tensor | None = None,
    k: Tensor | None = None,
    ce_weight: float = 0.0,
) -> tuple[Tensor, ...]:
    """Divergence or loss of every token, differentiable in the student's logits.

    Args:
        student, teacher, temperature, mask: as in `token_divergence`.
        divergence: which, with its parameters.
        labels, ce_mask, normalizers_1: (B, L) label, (B, L) tokens of the cross-entropy, (4, B, L) result of
            `token_stats`; all or none.
        cross_entropy: (B, L), where it is known already.
        sums: what gives D and the other results of `token_divergence`, from student, teacher, temperature, mask and
            divergence; by default the operator. The backward takes them as they are.
        inplace: the backward writes the gradient over the student's logits.
        n, k, ce_weight: as in `loss_sums`; without k there is no loss, and no cross-entropy either.

    Returns:
        ((B, L) divergence, 0 where `mask` is false), or with k the results of `loss_sums`, of which the last is a
        constant.
    """
    result: tuple[Tensor, ...] = TokenLosses.apply(  # type: ignore[no-untyped-call]
        student, teacher, temperature, mask, labels, ce_mask, normalizers_1, cross_entropy, n, k, ce_weight,
        divergence, sums, inplace,
    )  # fmt: skip
    return result


class TokenLosses(torch.autograd.Function):
    """The autograd function of `token_losses`."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: Tensor,
        mask: Tensor,
        labels: Tensor | None,
        ce_mask: Tensor | None,
        normalizers_1: Tensor | None,
        cross_entropy: Tensor | None,
        n: Tensor | None,
        k: Tensor | None,
        ce_weight: float,
        divergence: Divergence,
        sums: Callable[..., Sums] | None,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        name, (alpha, beta) = divergence.name, divergence.parameters
        if sums is None:
            d, *saved = token_divergence(student, teacher, temperature, mask, name, alpha, beta)
        else:
            d, *saved = sums(student, teacher, temperature, mask, divergence)
        if cross_entropy is None and labels is not None and ce_mask is not None and normalizers_1 is not None:
            cross_entropy = token_cross_entropy(student, teacher, labels, ce_mask, normalizers_1)
        results: tuple[Tensor, ...] = (d,)
        if k is not None:
            results = loss_sums(d, temperature, k, cross_entropy, n, ce_weight)
            ctx.mark_non_differentiable(results[2])
        tensors = (
            student, teacher, temperature, mask, *saved, labels, normalizers_1, ce_mask, cross_entropy, n, k
        )  # fmt: skip
        # What inference mode made cannot be saved, and has no version that would tell of a change: it is kept as it is.
        ctx.kept = {}
        if not torch.compiler.is_compiling():
            ctx.kept = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
        ctx.save_for_backward(*(None if i in ctx.kept else x for i, x in enumerate(tensors)))
        ctx.set_materialize_grads(False)
        ctx.op_args = (name, alpha, beta)
        ctx.ce_weight, ctx.inplace = ce_weight, inplace
        ctx.overwritten = False
        return results

    @staticmethod
    def backward(
        ctx: Any, of_token: Tensor | None, grad_loss: Tensor | None = None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0] or (of_token is None and grad_loss is None):
            return (None,) * 14
        if ctx.overwritten:
            raise RuntimeError(
                "the first backward wrote the gradient over the student's logits (inplace=True), so there is no second "
                "one; call the loss with inplace=False to use retain_graph=True"
            )
        tensors = [ctx.kept.get(i, x) for i, x in enumerate(ctx.saved_tensors)]
        student, teacher, temperature, mask, *saved, labels, normalizers_1, ce_mask, cross_entropy, n, k = tensors
        ce_weight = None
        if k is None:
            assert of_token is not None
            weight = of_token.where(mask, 0.0)
        else:
            weight, *of_ce = loss_weights(
                of_token, grad_loss, temperature, mask, k, cross_entropy, ce_mask, n, ctx.ce_weight
            ).unbind()
            ce_weight = of_ce[0] if of_ce else None
        args = (teacher, temperature, weight, *saved, labels, ce_weight, normalizers_1, *ctx.op_args)
        with torch.no_grad():
            ctx.overwritten = ctx.inplace
            if not teacher.shape[-1]:  # a shard without a common entry
                grad = student.zero_() if ctx.inplace else torch.zeros_like(student)
            elif ctx.inplace:
                token_divergence_backward_(student, *args)
                grad = student
            else:
                grad = token_divergence_backward(student, *args)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            upstream = [x for x in (of_token, grad_loss) if x is not None]
            grad = OnceDifferentiable.apply(grad, student, *upstream)  # type: ignore[no-untyped-call]
        return (grad,) + (None,) * 13


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
