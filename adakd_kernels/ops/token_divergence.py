"""`adakd::token_divergence`, its backward (out of place and in place), and the autograd function over them.

Between forward and backward only per-token numbers live, next to the logits themselves: temperature, Σg, the two
normalisers, and the gradient of the student's most likely entry. Probabilities are rebuilt.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..divergences import DIVERGENCES, Divergence
from .backends import register_triton


def _divergence(name: str, alpha: float, beta: float) -> Divergence:
    """The instance that an op's name and parameters stand for."""
    cls = DIVERGENCES[name]
    given = {"alpha": alpha, "beta": beta}
    return cls(**{field.name: given[field.name] for field in dataclasses.fields(cls)})


Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("adakd::token_divergence", mutates_args=())
def token_divergence(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: str, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """D(p^τ, q^τ) of every token, and what its gradient needs.

    Args:
        student: (B, L, Vˢ) logits.
        teacher: (B, L, Vᵗ) logits; the first min(Vˢ, Vᵗ) entries of both count.
        temperature: (B, L) τ > 0, a constant for the gradient.
        mask: (B, L) bool; other tokens give (0, 0, 0, 1, 0, 1, −1, 0) and their rows are not read.
        divergence: a name of `DIVERGENCES`; alpha and beta are its parameters.

    Returns:
        (D, Σg, max_s, sum_s, max_t, sum_t, peak, peak_grad), each (B, L) in the accumulation type: equations (1), (7)
        and (10). `peak` is int64, the student's most likely entry or −1, and `peak_grad` is τ·∂D/∂zˢ at it, which the
        backward takes instead of (10): where the token is confident, (10) cancels there (docs/maths.md, section 4).
    """
    dtype = reference.accumulation_dtype(student, teacher)
    fills = (0.0, 0.0, 0.0, 1.0, 0.0, 1.0, -1, 0.0)
    dtypes = [dtype] * 6 + [torch.int64, dtype]
    out = [torch.full(mask.shape, x, dtype=kind, device=mask.device) for x, kind in zip(fills, dtypes, strict=True)]
    sums = reference.token_sums(student[mask], teacher[mask], temperature[mask], _divergence(divergence, alpha, beta))
    values = (sums.d, sums.sum_g, *sums.of_student, *sums.of_teacher, sums.peak, sums.peak_grad)
    for result, value in zip(out, values, strict=True):
        result[mask] = value
    return out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]


@token_divergence.register_fake
def _(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: str, alpha: float, beta: float
) -> Sums:
    dtype = reference.accumulation_dtype(student, teacher)
    d, sum_g, max_s, sum_s, max_t, sum_t, peak_grad = (
        torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(7)
    )
    peak = torch.empty(mask.shape, dtype=torch.int64, device=mask.device)
    return d, sum_g, max_s, sum_s, max_t, sum_t, peak, peak_grad


@register_triton(token_divergence)
def _(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: str, alpha: float, beta: float
) -> Sums:
    from ..kernels.token_divergence import token_divergence_fwd

    return token_divergence_fwd(student, teacher, temperature, mask, divergence, alpha, beta)


def empty_gradient(student: Tensor) -> Tensor:
    """Where the gradient goes: contiguous on the CPU, elsewhere with rows apart as the student's modulo 8 entries.

    So both start alike, which the Triton kernels need for wide access (docs/gpu-kernels.md).
    """
    pad = 0 if student.device.type == "cpu" else (student.stride(-2) - student.shape[-1]) % 8
    shape = (*student.shape[:-1], student.shape[-1] + pad)
    return torch.empty(shape, dtype=student.dtype, device=student.device)[..., : student.shape[-1]]


@torch.library.custom_op("adakd::token_divergence_backward", mutates_args=())
def token_divergence_backward(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    weight: Tensor,
    sum_g: Tensor,
    max_s: Tensor,
    sum_s: Tensor,
    max_t: Tensor,
    sum_t: Tensor,
    peak: Tensor,
    peak_grad: Tensor,
    labels: Tensor | None,
    ce_weight: Tensor | None,
    ce_max: Tensor | None,
    ce_sum: Tensor | None,
    divergence: str,
    alpha: float,
    beta: float,
) -> Tensor:
    """Equation (10): weight·∂D/∂zˢ, plus ce_weight·∂CE/∂zˢ where labels are given.

    Args:
        student, teacher, temperature, divergence, alpha, beta: as in `token_divergence`.
        weight: (B, L) gradient of the loss in D; a token of weight 0 is not read, its gradient is 0.
        sum_g, max_s, sum_s, max_t, sum_t, peak, peak_grad: (B, L) results of `token_divergence`.
        labels, ce_weight, ce_max, ce_sum: (B, L) label, gradient of the loss in the cross-entropy, and the student's
            normaliser at temperature 1; all or none.

    Returns:
        Gradient in the student's shape and type; 0 beyond the common vocabulary.
    """
    grad = empty_gradient(student).zero_()
    _reference_backward(
        grad, student, teacher, temperature, weight, labels, ce_weight, ce_max, ce_sum, divergence, alpha, beta
    )
    return grad


def _reference_backward(
    out: Tensor, student: Tensor, teacher: Tensor, temperature: Tensor, weight: Tensor, labels: Tensor | None,
    ce_weight: Tensor | None, ce_max: Tensor | None, ce_sum: Tensor | None, divergence: str, alpha: float, beta: float,
) -> None:  # fmt: skip
    """The gradient into `out`, rows of weight 0 untouched."""
    rows = weight != 0
    if labels is not None and ce_weight is not None and ce_max is not None and ce_sum is not None:
        rows = rows | (ce_weight != 0)
    acc = reference.accumulation_dtype(student, teacher)
    z_s, z_t = student[rows], teacher[rows]
    weight = weight[rows].to(acc)
    counted = weight != 0
    grad = torch.zeros(z_s.shape, dtype=acc, device=z_s.device)
    grad[counted] = reference.token_divergence_grad(
        z_s[counted].to(acc),
        z_t[counted],
        temperature[rows][counted].to(acc),
        _divergence(divergence, alpha, beta),
        weight[counted],
    )
    if labels is not None and ce_weight is not None and ce_max is not None and ce_sum is not None:
        grad += ce_weight[rows].to(acc).unsqueeze(-1) * reference.cross_entropy_grad(z_s, z_t, labels[rows])
    out[rows] = grad.to(out.dtype)


@token_divergence_backward.register_fake
def _(student: Tensor, *args: Any) -> Tensor:
    return empty_gradient(student)


@register_triton(token_divergence_backward)
def _(student: Tensor, teacher: Tensor, *args: Any) -> Tensor:
    from ..kernels.token_divergence import token_divergence_bwd

    grad = empty_gradient(student)
    token_divergence_bwd(student, teacher, grad, *args)
    return grad


@torch.library.custom_op("adakd::token_divergence_backward_", mutates_args={"student"})
def token_divergence_backward_(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    weight: Tensor,
    sum_g: Tensor,
    max_s: Tensor,
    sum_s: Tensor,
    max_t: Tensor,
    sum_t: Tensor,
    peak: Tensor,
    peak_grad: Tensor,
    labels: Tensor | None,
    ce_weight: Tensor | None,
    ce_max: Tensor | None,
    ce_sum: Tensor | None,
    divergence: str,
    alpha: float,
    beta: float,
) -> None:
    """`token_divergence_backward` with the gradient written over the student's logits."""
    grad = token_divergence_backward(
        student, teacher, temperature, weight, sum_g, max_s, sum_s, max_t, sum_t, peak, peak_grad, labels, ce_weight,
        ce_max, ce_sum, divergence, alpha, beta,
    )  # fmt: skip
    student.copy_(grad)


@token_divergence_backward_.register_fake
def _(student: Tensor, *args: Any) -> None:
    return None


@register_triton(token_divergence_backward_)
def _(student: Tensor, teacher: Tensor, *args: Any) -> None:
    from ..kernels.token_divergence import token_divergence_bwd

    token_divergence_bwd(student, teacher, student, *args)


def token_cross_entropy(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, max_s: Tensor, sum_s: Tensor
) -> Tensor:
    """(B, L) −log q at the label from the normaliser at temperature 1; 0 outside the mask, NaN for a label beyond V."""
    inside = (labels >= 0) & (labels < min(student.shape[-1], teacher.shape[-1]))
    logit = student.gather(-1, labels.where(inside, 0).unsqueeze(-1)).squeeze(-1).to(max_s.dtype)
    return (max_s - logit + sum_s.log()).where(inside, torch.nan).where(mask, 0.0)


def loud_weights(weight: Tensor, ce_weight: Tensor, cross_entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of D and of the cross-entropy for the backward, NaN for a token whose cross-entropy is NaN and counts.

    Where the label is outside the vocabulary, nothing else would make its gradient NaN. The weight of D carries it: it
    reaches the entries of the common vocabulary and no other.
    """
    lost = cross_entropy.isnan() & (ce_weight != 0)
    return weight.masked_fill(lost, torch.nan), ce_weight.masked_fill(lost, 0.0)


def token_losses(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    divergence: Divergence,
    *,
    labels: Tensor | None = None,
    ce_mask: Tensor | None = None,
    ce_max: Tensor | None = None,
    ce_sum: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Divergence and, where labels are given, cross-entropy of every token, differentiable in the student's logits.

    Args:
        student, teacher, temperature, mask: as in `token_divergence`.
        divergence: which, with its parameters.
        labels, ce_mask, ce_max, ce_sum: (B, L) label, tokens of the cross-entropy, the student's normaliser at
            temperature 1 (`token_stats`); all or none.
        inplace: the backward writes the gradient over the student's logits.

    Returns:
        (B, L) divergence, 0 where `mask` is false, and (B, L) cross-entropy, 0 where `ce_mask` is false, or None.
    """
    result: tuple[Tensor, Tensor | None] = TokenLosses.apply(  # type: ignore[no-untyped-call]
        student, teacher, temperature, mask, labels, ce_mask, ce_max, ce_sum, divergence, inplace
    )
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
        ce_max: Tensor | None,
        ce_sum: Tensor | None,
        divergence: Divergence,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        name, (alpha, beta) = divergence.name, divergence.parameters
        d, *saved = token_divergence(student, teacher, temperature, mask, name, alpha, beta)
        cross_entropy = None
        if labels is not None and ce_mask is not None and ce_max is not None and ce_sum is not None:
            cross_entropy = token_cross_entropy(student, teacher, labels, ce_mask, ce_max, ce_sum)
        # What inference mode made cannot be saved, and has no version that would tell of a change: it is kept as it is.
        kept = {}
        if not torch.compiler.is_compiling():
            given = {"teacher": teacher, "temperature": temperature, "mask": mask, "labels": labels}
            kept = {name: x for name, x in given.items() if x is not None and x.is_inference()}
        ctx.kept = kept
        ctx.save_for_backward(
            student,
            None if "teacher" in kept else teacher,
            None if "temperature" in kept else temperature,
            None if "mask" in kept else mask,
            *saved,
            None if "labels" in kept else labels,
            *(ce_mask, ce_max, ce_sum, cross_entropy),
        )
        ctx.op_args = (name, alpha, beta)
        ctx.inplace = inplace
        ctx.overwritten = False
        return d, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_d: Tensor, grad_ce: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 10
        if ctx.overwritten:
            raise RuntimeError(
                "the first backward wrote the gradient over the student's logits (inplace=True), so there is no second "
                "one; call the loss with inplace=False to use retain_graph=True"
            )
        student, teacher, temperature, mask, *sums, labels, ce_mask, ce_max, ce_sum, cross_entropy = ctx.saved_tensors
        teacher, temperature = ctx.kept.get("teacher", teacher), ctx.kept.get("temperature", temperature)
        mask, labels = ctx.kept.get("mask", mask), ctx.kept.get("labels", labels)
        weight = grad_d.where(mask, 0.0)
        ce_weight = None
        if labels is not None and ce_mask is not None and grad_ce is not None:
            weight, ce_weight = loud_weights(weight, grad_ce.where(ce_mask, 0.0), cross_entropy)
        args = (teacher, temperature, weight, *sums, labels, ce_weight, ce_max, ce_sum, *ctx.op_args)
        with torch.no_grad():
            if ctx.inplace:
                token_divergence_backward_(student, *args)
                ctx.overwritten = True
                grad = student
            else:
                grad = token_divergence_backward(student, *args)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grad = OnceDifferentiable.apply(grad, student, grad_d)  # type: ignore[no-untyped-call]
        return (grad,) + (None,) * 9


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
