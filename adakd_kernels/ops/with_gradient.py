"""Divergence and gradient of every token in one go: the gradient's weights are known before its rows are read.

`adakd::token_divergence_with_gradient` gives what `token_divergence` and then `token_divergence_backward` give, and its
kernels look at a row for the second time while the row is in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import operator, register_fake
from .token_divergence import (
    empty_gradient,
    token_divergence,
    token_divergence_backward,
    token_divergence_backward_,
)

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
    found = token_divergence(student, teacher, temperature, mask, divergence, alpha, beta)
    grad = token_divergence_backward(
        student, teacher, temperature, weight, *found[1:], labels, ce_weight, normalizers_1, divergence, alpha, beta
    )
    return *found, grad


@register_fake(token_divergence_with_gradient)
def _(student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, *args: Any) -> Six:
    return *torch.ops.adakd.token_divergence(student, teacher, temperature, mask, *args[:3]), empty_gradient(student)


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
    found: Five = token_divergence(student, teacher, temperature, mask, divergence, alpha, beta)
    token_divergence_backward_(
        student, teacher, temperature, weight, *found[1:], labels, ce_weight, normalizers_1, divergence, alpha, beta
    )
    return found


@token_divergence_with_gradient_.register_fake
def _(student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, *args: Any) -> Five:
    found: Five = torch.ops.adakd.token_divergence(student, teacher, temperature, mask, *args[:3])
    return found
