"""Divergence and gradient of every token in one go: the gradient's weights are known before its rows are read.

`adakd::token_divergence_with_gradient` gives what `token_divergence` and then `token_divergence_backward` give, and its
kernels look at a row for the second time while the row is in the cache. The gradient is that of an upstream gradient
which is a guess; `adakd::scale_gradient_` makes it that of the true one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..divergences import with_parameters
from ..reference import GradientCall
from .backends import operator, register_fake, register_triton
from .row_chunks import joined, row_chunks, rows_at, set_rows
from .token_divergence import empty_gradient, everywhere, flat, read_rows, write_gradient

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("token_divergence_with_gradient")
def token_divergence_with_gradient(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    divergence: str,
    alpha: float,
    beta: float,
    weight: Tensor,
    labels: Tensor | None,
    ce_weight: Tensor | None,
    normalizers_1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five results of `token_divergence`, and the gradient (10) for these weights.

    Args:
        student, teacher, temperature, mask, divergence, alpha, beta: as in `token_divergence`.
        weight: (B, L) gradient of the loss in D, 0 or NaN outside the mask.
        labels, ce_weight, normalizers_1: as in `GradientCall`; all or none.

    Returns:
        (D, Σg, normalizers_tau, peak, peak_grad, gradient), the last as `token_divergence_backward` returns it.
    """
    grad = empty_gradient(student)
    args = (student, teacher, temperature, mask, divergence, alpha, beta, weight, labels, ce_weight, normalizers_1)
    return *_with_gradient_over(grad, *args), grad


def _with_gradient_over(
    grad: Tensor, student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, *rest: Any
) -> Five:
    """The five results, and the gradient in `grad`, which may be the student's logits; `rest` as in the operator."""
    *options, weight, labels, ce_weight, normalizers_1 = rest
    numbers, found = (temperature, weight, labels, ce_weight, normalizers_1), []
    for where, (tau, of_d, *of_ce) in row_chunks(mask, student.shape[-1], *numbers):
        s, t = rows_at(student, where), rows_at(teacher, where)
        sums, masses = reference.token_sums_and_masses(s, t, tau, with_parameters(*options))
        found.append(flat(sums))
        some = GradientCall._make([s, t, tau, of_d, *flat(sums)[1:], *of_ce, *options])
        set_rows(grad, where, reference.rebuilt_gradient(some, masses))
    results = everywhere(mask, joined(found))
    call = GradientCall(student, teacher, temperature, weight, *results[1:], labels, ce_weight, normalizers_1, *options)
    write_gradient(call, grad, read_rows(call) & ~mask)
    return results


@register_fake(token_divergence_with_gradient)
def _(student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, *args: Any) -> Six:
    return *torch.ops.adakd.token_divergence(student, teacher, temperature, mask, *args[:3]), empty_gradient(student)


@register_triton(token_divergence_with_gradient)
def _(student: Tensor, *args: Any) -> Six:
    from ..kernels.with_gradient import token_divergence_with_gradient_over

    grad = empty_gradient(student)
    return *token_divergence_with_gradient_over(grad, student, *args), grad


@torch.library.custom_op("adakd::token_divergence_with_gradient_", mutates_args={"student"})
def token_divergence_with_gradient_(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    divergence: str,
    alpha: float,
    beta: float,
    weight: Tensor,
    labels: Tensor | None,
    ce_weight: Tensor | None,
    normalizers_1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`token_divergence_with_gradient` with the gradient written over the student's logits, and not returned."""
    args = (teacher, temperature, mask, divergence, alpha, beta, weight, labels, ce_weight, normalizers_1)
    return _with_gradient_over(student, student, *args)


@token_divergence_with_gradient_.register_fake
def _(student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, *args: Any) -> Five:
    found: Five = torch.ops.adakd.token_divergence(student, teacher, temperature, mask, *args[:3])
    return found


@register_triton(token_divergence_with_gradient_)
def _(student: Tensor, *args: Any) -> Five:
    from ..kernels.with_gradient import token_divergence_with_gradient_over

    return token_divergence_with_gradient_over(student, student, *args)


@operator("scale_gradient_", "(Tensor(a!) gradient, Tensor weights, Tensor grad_loss, Tensor? scaled_by) -> ()")
def scale_gradient_(gradient: Tensor, weights: Tensor, grad_loss: Tensor, scaled_by: Tensor | None) -> None:
    """Multiply the rows of a gradient in place by grad_loss, over what they were scaled by; nothing at a factor of 1.

    Args:
        gradient: (B, L, V), of the common vocabulary.
        weights: (1, B, L) or (2, B, L), the result of `loss_weights` that the gradient was made with: rows without a
            weight are zeros, which they stay below an upstream gradient that is infinite or NaN.
        grad_loss, scaled_by: 0-d upstream gradient, and the factor that is in the gradient already, or None for 1.
    """
    factor = grad_loss if scaled_by is None else grad_loss / scaled_by
    if gradient.device.type == "cpu":  # whose values nothing waits for
        number = factor.item()
        if math.isfinite(number):
            if number != 1.0:
                gradient.mul_(number)  # a factor for each row would be multiplied in a copy of the accumulation type
            return
        factor = factor.to(gradient.dtype)
    gradient.mul_(torch.where((weights != 0).any(0), factor, 1.0).unsqueeze(-1))


@register_fake(scale_gradient_)
def _(*args: Any) -> None:
    return None


@register_triton(scale_gradient_)
def _(*args: Any) -> None:
    from ..kernels.scale_gradient import scale_gradient

    scale_gradient(*args)
