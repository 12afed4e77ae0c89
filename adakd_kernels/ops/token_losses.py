"""The autograd function over the divergence: of every token, or with their sums as a loss.

Where the loss is a number, its gradient is known in the forward up to one factor, so that the forward computes it with
the divergence, from rows that are in the cache, and the backward multiplies it. What asks for more than that factor, a
gradient of every token's loss or a second backward, takes the operator of the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adaptive import power_of_two
from ..divergences import Divergence, with_parameters
from .backends import call
from .loss_sums import loss_sums, loss_weights, token_cross_entropy
from .token_divergence import (
    OnceDifferentiable,
    Sums,
    token_divergence,
    token_divergence_backward,
    token_divergence_backward_,
)
from .with_gradient import scale_gradient_, token_divergence_with_gradient, token_divergence_with_gradient_


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
        inplace: the gradient is written over the student's logits. By this call where it has k and no `sums` and the
            logits get a gradient, and then the loss of every token is not differentiable; else by the backward.
        n, k, ce_weight: as in `loss_sums`; without k there is no loss, and no cross-entropy either.

    Returns:
        ((B, L) divergence, 0 where `mask` is false), or with k the results of `loss_sums`, of which the last is a
        constant.
    """
    compiling = torch.compiler.is_compiling()
    # A compiled backward cannot multiply in place what its forward gave it.
    at_once = k is not None and sums is None and student.requires_grad and torch.is_grad_enabled() and not compiling
    result: tuple[Tensor, ...] = TokenLosses.apply(  # type: ignore[no-untyped-call]
        student, teacher, temperature, mask, labels, ce_mask, normalizers_1, cross_entropy, n, k, ce_weight,
        divergence.name, *divergence.parameters, sums, inplace, at_once,
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
        divergence: str,
        alpha: float,
        beta: float,
        sums: Callable[..., Sums] | None,
        inplace: bool,
        at_once: bool,
    ) -> tuple[Tensor, ...]:
        args = (student, teacher, temperature, mask, divergence, alpha, beta)
        if cross_entropy is None and labels is not None and ce_mask is not None and normalizers_1 is not None:
            cross_entropy = token_cross_entropy(student, teacher, labels, ce_mask, normalizers_1)
        given: tuple[Tensor | None, ...] = ()
        if at_once and k is not None:
            # Until the upstream gradient comes it is taken for 1, or in fp16, where the gradient would vanish, for a
            # power of two near k. No finite logits overflow: where an entry of (10) grows with them, τ cancels from it,
            # and it stays below a quarter of their largest difference, 131,008, over k.
            scaled_by = power_of_two(k) if student.dtype == torch.float16 else None
            weights = loss_weights(None, scaled_by, temperature, mask, k, cross_entropy, ce_mask, n, ce_weight)
            weight, *of_ce = weights.unbind()
            of_gradient = (weight, labels, of_ce[0] if of_ce else None, normalizers_1)
            if inplace:
                d, *saved = token_divergence_with_gradient_(*args, *of_gradient)
                # Not the logits themselves: those of a DTensor are a view that autograd refuses once it has changed.
                given = (student.detach(), weights, scaled_by)
            else:
                d, *saved, gradient = token_divergence_with_gradient(*args, *of_gradient)
                given = (gradient, weights, scaled_by)
        elif sums is None:
            d, *saved = call(token_divergence, *args)
        else:
            d, *saved = sums(student, teacher, temperature, mask, with_parameters(divergence, alpha, beta))
        results: tuple[Tensor, ...] = (d,)
        if k is not None:
            results = call(loss_sums, d, temperature, k, cross_entropy, n, ce_weight)
            ctx.mark_non_differentiable(results[2])
        rest: tuple[Tensor | None, ...] = (
            student, teacher, temperature, mask, *saved, labels, normalizers_1, ce_mask, cross_entropy, n, k
        )  # fmt: skip
        if given and inplace:
            rest = ()  # the student's logits are gone, and nothing keeps the teacher's
        kept = (*given, *rest)
        ctx.save_for_backward(*(kept if torch.compiler.is_compiling() else map(savable, kept)))
        ctx.set_materialize_grads(False)
        ctx.op_args = (divergence, alpha, beta)
        ctx.common = min(student.shape[-1], teacher.shape[-1])
        ctx.ce_weight, ctx.inplace, ctx.at_once = ce_weight, inplace, bool(given)
        ctx.given_away = False
        return results

    @staticmethod
    def backward(
        ctx: Any, of_token: Tensor | None, grad_loss: Tensor | None = None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0] or (of_token is None and grad_loss is None):
            return (None,) * 17
        if ctx.given_away and ctx.inplace:
            raise RuntimeError(
                "the gradient was written over the student's logits (inplace=True) and the first backward gave it "
                "away, so there is no second one; call the loss with inplace=False to use retain_graph=True"
            )
        if ctx.at_once and ctx.inplace and of_token is not None:
            raise RuntimeError(
                "token_loss has no gradient with inplace=True: that of the loss stands in the place of the student's "
                "logits already; call the loss with inplace=False, or, with the temperature and the selected tokens "
                "of a call under torch.no_grad(), token_divergence(..., inplace=True)"
            )
        tensors = list(ctx.saved_tensors)
        given = [tensors.pop(0) for _ in range(3)] if ctx.at_once else []
        memory = None if ctx.given_away or not given else given[0]
        if memory is not None and not ctx.inplace:
            memory = memory.data  # what happens to the gradient must not count as a change of a saved tensor
        ctx.given_away = True
        with torch.no_grad():
            if memory is not None and of_token is None:
                grad = memory
                scale_gradient_(grad[..., : ctx.common], given[1], grad_loss, given[2])
            else:
                grad = TokenLosses.computed(ctx, tensors, of_token, grad_loss, memory)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            refuses = torch.zeros((), device=grad.device, requires_grad=True)
            upstream = [x for x in (of_token, grad_loss) if x is not None]
            grad = OnceDifferentiable.apply(grad, refuses, *upstream)  # type: ignore[no-untyped-call]
        return (grad,) + (None,) * 16

    @staticmethod
    def computed(
        ctx: Any, tensors: list[Any], of_token: Tensor | None, grad_loss: Tensor | None, memory: Tensor | None
    ) -> Tensor:
        """The gradient from what `forward` saved of the logits, in `memory` if there is any."""
        student, teacher, temperature, mask, *saved, labels, normalizers_1, ce_mask, cross_entropy, n, k = tensors
        ce_weight = None
        if k is None:
            assert of_token is not None
            weight = of_token.where(mask, 0.0)
        else:
            weight, *of_ce = call(
                loss_weights, of_token, grad_loss, temperature, mask, k, cross_entropy, ce_mask, n, ctx.ce_weight
            ).unbind()
            ce_weight = of_ce[0] if of_ce else None
        args = (teacher, temperature, weight, *saved, labels, ce_weight, normalizers_1, *ctx.op_args)
        grad: Tensor | None = student if ctx.inplace else memory
        if not ctx.common:  # a shard without a common entry
            return grad.zero_() if grad is not None else torch.zeros_like(student)
        if grad is None:
            new: Tensor = call(token_divergence_backward, student, *args)
            return new
        if grad is not student:
            grad.copy_(student)
        token_divergence_backward_(grad, *args)
        return grad


def savable(x: Tensor | None) -> Tensor | None:
    """The tensor, or one of the same memory where inference mode made it: autograd refuses to save those."""
    if x is None or not x.is_inference():
        return x
    same = torch.empty(0, dtype=x.dtype, device=x.device)
    return same.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
