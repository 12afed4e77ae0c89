"""Between the kernels over the vocabulary: cross-entropy of the tokens, the sums of (7), and the weights of (10)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adaptive import exact_dtype
from ..reference import Normalizers
from .backends import operator, register_fake, register_triton


@operator("token_cross_entropy")
def token_cross_entropy(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, normalizers_1: Tensor
) -> Tensor:
    """−log q at the label of every token.

    Args:
        student, teacher: (B, L, Vˢ) and (B, L, Vᵗ) logits; of the teacher's only the number of entries is read.
        labels: (B, L) int64.
        mask: (B, L) bool.
        normalizers_1: (4, B, L) `Normalizers` at temperature 1, a result of `token_stats`.

    Returns:
        (B, L) in the type of the normalisers; 0 outside the mask, NaN for a label beyond the common vocabulary.
    """
    of = Normalizers.of(normalizers_1)
    inside = (labels >= 0) & (labels < min(student.shape[-1], teacher.shape[-1]))
    logit = student.gather(-1, labels.where(inside, 0).unsqueeze(-1)).squeeze(-1).to(of.max_s.dtype)
    return (of.max_s - logit + of.sum_s.log()).where(inside, torch.nan).where(mask, 0.0)


@register_fake(token_cross_entropy)
def _(student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, normalizers_1: Tensor) -> Tensor:
    return torch.empty(mask.shape, dtype=normalizers_1.dtype, device=mask.device)


@register_triton(token_cross_entropy)
def _(*args: Any) -> Tensor:
    from ..kernels.loss_sums import token_cross_entropy_fwd

    return token_cross_entropy_fwd(*args)


@operator("spread_statistics")
def spread_statistics(
    difficulty: Tensor,
    normalizers_1: Tensor,
    positions: Tensor,
    batch: int,
    label_logits: Tensor | None,
    labels: Tensor | None,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the labelled tokens of a batch, as statistics of all its tokens, and their cross-entropy.

    Args:
        difficulty, normalizers_1: (1, n) and (4, 1, n) results of `token_stats`.
        positions: (n,) int64, the places of the labelled tokens in the batch, in ascending order and none twice.
        batch: number of all tokens.
        label_logits, labels: (1, n) student's logits of any type at the labels, and the int64 labels, or None. The
            logit of a label beyond the vocabulary is not read.
        vocab: entries of the common vocabulary.

    Returns:
        (difficulty, valid, valid_here, cross_entropy): (1, batch) and (1, batch) bool of all tokens, (1, n) bool and
        (1, n) of the labelled ones; cross_entropy is (1, 0) where no labels are given, else as `token_cross_entropy`
        returns it. A labelled token is valid where both its rows have a finite entry. Other tokens have difficulty 0.
    """
    of = Normalizers.of(normalizers_1)
    valid = of.sum_s.logical_and(of.sum_t)
    difficulties = difficulty.new_zeros(1, batch).index_copy_(1, positions, difficulty)
    everywhere = valid.new_zeros(1, batch).index_copy_(1, positions, valid)
    if label_logits is None or labels is None:
        return difficulties, everywhere, valid, difficulty.new_empty(1, 0)
    cross_entropy = of.max_s - label_logits.to(difficulty.dtype) + of.sum_s.log()
    inside = (labels >= 0) & (labels < vocab)
    return difficulties, everywhere, valid, cross_entropy.where(inside, torch.nan).where(valid, 0.0)


@register_fake(spread_statistics)
def _(
    difficulty: Tensor, normalizers_1: Tensor, positions: Tensor, batch: int, label_logits: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, device = difficulty.shape, difficulty.device
    valid, everywhere = (torch.empty(1, size, dtype=torch.bool, device=device) for size in (shape[1], batch))
    cross_entropy = difficulty.new_empty(1, 0 if label_logits is None else shape[1])
    return difficulty.new_empty(1, batch), everywhere, valid, cross_entropy


@register_triton(spread_statistics)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.spread_statistics import spread_statistics_fwd

    return spread_statistics_fwd(*args)


@operator("loss_sums")
def loss_sums(
    d: Tensor,
    temperature: Tensor,
    k: Tensor,
    cross_entropy: Tensor | None,
    n: Tensor | None,
    ce_weight: float,
    positions: Tensor | None = None,
    batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (7), or with the cross-entropy of every token (1−a)·L + a·CE.

    Args:
        d, temperature: (B, L) divergences, 0 for tokens that are not selected, and τ, of one type.
        k, n: 0-d divisors of the two sums.
        cross_entropy: (B, L), 0 for tokens that are not valid, or None, as n then may be.
        ce_weight: a, read where there is a cross-entropy.
        positions, batch: where the tokens are (1, n) of a batch of more, their (n,) places, none twice, and the number
            of tokens in the batch; τ²·D is then (1, batch), and 0 elsewhere.

    Returns:
        (τ²·D, loss, L): (B, L) and 0-d in the type of d, and 0-d in fp64 where the device has it. The sums are in fp64
        there, too, and their order does not depend on the number of threads.
    """
    token_loss, exact = temperature.square() * d, exact_dtype(d.device)
    distillation = token_loss.to(exact).sum() / k
    loss = distillation
    if cross_entropy is not None and n is not None:
        loss = (1.0 - ce_weight) * distillation + ce_weight * (cross_entropy.to(exact).sum() / n)
    if positions is not None:
        token_loss = token_loss.new_zeros(1, batch).index_copy_(1, positions, token_loss)
    return token_loss, loss.to(d.dtype, copy=True), distillation


@register_fake(loss_sums)
def _(
    d: Tensor,
    temperature: Tensor,
    k: Tensor,
    cross_entropy: Tensor | None,
    n: Tensor | None,
    ce_weight: float,
    positions: Tensor | None = None,
    batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    token_loss = torch.empty_like(d) if positions is None else d.new_empty(1, batch)
    return token_loss, d.new_empty(()), d.new_empty((), dtype=exact_dtype(d.device))


@register_triton(loss_sums)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.loss_sums import loss_sums_fwd

    return loss_sums_fwd(*args)


@operator("loss_weights")
def loss_weights(
    grad_token_loss: Tensor | None,
    grad_loss: Tensor | None,
    temperature: Tensor,
    mask: Tensor,
    k: Tensor,
    cross_entropy: Tensor | None,
    ce_mask: Tensor | None,
    n: Tensor | None,
    ce_weight: float,
) -> Tensor:
    """The backward of `loss_sums`: gradients in D and in the cross-entropy, as `GradientCall` takes them.

    Args:
        grad_token_loss, grad_loss: (B, L) and 0-d upstream gradients; None is 0, but None for both is a gradient of 1
            of the loss.
        temperature, k, cross_entropy, n, ce_weight: as in `loss_sums`.
        mask, ce_mask: (B, L) bool, the tokens of the divergence and of the cross-entropy; the others have weight 0.

    Returns:
        (1, B, L) weights of D, or with a cross-entropy (2, B, L) of both, in the type of the temperature. Where the
        cross-entropy is NaN and has a weight, `loud_weights` has changed them.
    """
    of_loss = temperature.new_ones(()) if grad_token_loss is None and grad_loss is None else grad_loss
    weight = torch.zeros_like(temperature) if grad_token_loss is None else grad_token_loss
    if of_loss is not None:
        weight = weight + of_loss * (1.0 if cross_entropy is None else 1.0 - ce_weight) / k.to(temperature)
    weight = (weight * temperature.square()).where(mask, 0.0)
    if cross_entropy is None or ce_mask is None or n is None:
        return weight.unsqueeze(0)
    of_ce = torch.zeros_like(weight) if of_loss is None else of_loss * ce_weight / n.to(weight) * ce_mask
    return torch.stack(loud_weights(weight, of_ce.where(ce_mask, 0.0), cross_entropy))


@register_fake(loss_weights)
def _(
    grad_token_loss: Tensor | None,
    grad_loss: Tensor | None,
    temperature: Tensor,
    mask: Tensor,
    k: Tensor,
    cross_entropy: Tensor | None,
    *args: Any,
) -> Tensor:
    return temperature.new_empty((1 if cross_entropy is None else 2, *mask.shape))


@register_triton(loss_weights)
def _(*args: Any) -> Tensor:
    from ..kernels.loss_sums import loss_weights_fwd

    return loss_weights_fwd(*args)


def loud_weights(weight: Tensor, ce_weight: Tensor, cross_entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of D and of the cross-entropy for the backward: NaN where the cross-entropy is NaN and has a weight.

    Where the label is outside the vocabulary, nothing else would make its gradient NaN. The weight of D carries the
    NaN, because it reaches the entries of the common vocabulary and no other.
    """
    lost = cross_entropy.isnan() & (ce_weight != 0)
    return weight.masked_fill(lost, torch.nan), ce_weight.masked_fill(lost, 0.0)
