"""The losses as functions: checks of the arguments, flattening, reduction. The work is done by `adakd_kernels.ops`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .adaptive import clamped, tensor_on, token_choice
from .checks import (
    DIFFICULTIES,
    check_device,
    check_difficulty,
    check_flag,
    check_floating,
    check_inplace,
    check_labels,
    check_mask,
    check_no_transform,
    check_options,
    check_pair,
    check_temperature,
    check_token_tensor,
)
from .divergences import DIVERGENCES, Divergence, get_divergence
from .ops.token_stats import TokenStatistics
from .reference import Normalizers
from .vocab_parallel import VocabParallel, local_shards

__all__ = ["DIFFICULTIES", "AdaKDOutput", "TokenChoice", "adakd_loss", "token_difficulty", "token_divergence"]


class TokenChoice(NamedTuple):
    """How the tokens of a batch enter the loss: what (3)-(6) make of the difficulties, of this batch or of more.

    Attributes:
        difficulty: (B, L) or (N,), of a floating type.
        valid: (B, L) or (N,) bool, the tokens of the cross-entropy.
        temperature: (B, L) or (N,), τ > 0 of the selected tokens.
        selected: (B, L) or (N,) bool, the tokens whose divergences the loss adds up; all of them valid.
        n: what the sum of the cross-entropies is divided by, a 0-d tensor > 0.
        k: what the sum over the selected tokens is divided by, a 0-d tensor > 0.
    """

    difficulty: Tensor
    valid: Tensor
    temperature: Tensor
    selected: Tensor
    n: Tensor
    k: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> TokenChoice:
        """The same of other tokens, or of these in another shape: `function` of what there is one of for each token."""
        return TokenChoice(
            function(self.difficulty), function(self.valid), function(self.temperature), function(self.selected),
            self.n, self.k,
        )  # fmt: skip


class AdaKDOutput(NamedTuple):
    """What `adakd_loss` returns. All but `loss` have the shape of the labels.

    Attributes:
        loss: 0-d, in the accumulation type (fp32; fp64 for fp64 logits).
        token_loss: τ²·D of the selected tokens, 0 elsewhere; differentiable in the student's logits, but not where the
            loss was computed with `inplace`.
        difficulty: difficulty of the valid tokens (squared Hellinger distance by default), 0 elsewhere.
        temperature: temperature τ of the valid tokens, the base temperature elsewhere.
        selected: bool, the tokens whose divergences the loss adds up.
    """

    loss: Tensor
    token_loss: Tensor
    difficulty: Tensor
    temperature: Tensor
    selected: Tensor


def adakd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str | Divergence = "reverse_kl",
    focus_ratio: float | Tensor = 1.0,
    temperature_scale: float = 0.5,
    base_temperature: float = 1.0,
    difficulty: str = "hellinger",
    ce_weight: float = 0.0,
    num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    inplace: bool = False,
    choice: TokenChoice | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> AdaKDOutput:
    """AdaKD's loss: the hardest tokens, each at its own temperature (equations (1)-(7); Xie et al., arXiv 2510.11615).

    L = (1/k) Σ τ²·D(p^τ, q^τ) over the k = max(1, ⌊r·n⌋) hardest of the n valid tokens; with `ce_weight` = a the loss
    is (1−a)·L + a·CE, CE the mean hard-label cross-entropy over all valid tokens. Difficulty, selection and temperature
    are constants of the gradient.

    Args:
        student_logits: (B, L, Vˢ) or (N, Vˢ); fp16, bf16, fp32 or fp64; any strides with a contiguous last dimension.
        teacher_logits: (B, L, Vᵗ) or (N, Vᵗ); its type and vocabulary may differ: the first min(Vˢ, Vᵗ) entries are
            common, and the loss reads no others. They may come from `torch.inference_mode()`, except under
            `torch.compile`: torch refuses to save them there.
        labels: (B, L) or (N,), of any integer type that can hold `ignore_index`: the token that each position predicts.
            Or bool, true for valid tokens, where neither `ce_weight` nor the difficulty 'cross_entropy' reads them.
            A valid token whose label is no common entry makes the cross-entropy NaN, and the gradient of its row.
        divergence: a name of `DIVERGENCES` or an instance such as `JensenShannon(beta=0.1)`.
        focus_ratio: the share r in (0, 1], a float or a 0-d tensor (its value is not checked).
        temperature_scale: c of τ = τ_base·exp(−c·ŝ); 0 gives all tokens the base temperature, and a negative number
            turns the direction round, for comparisons: high where a token is hard.
        base_temperature: τ_base > 0. A temperature is kept in the range in which τ² is neither 0 nor infinite.
        difficulty: 'hellinger', 'forward_kl', 'reverse_kl', 'jensen_shannon' or 'cross_entropy'.
        ce_weight: a in [0, 1].
        num_items: number of valid tokens in the whole optimizer step, a number or a 0-d tensor (its value is not
            checked: that would wait for the device). The sums are divided by r·num_items (and num_items for the
            cross-entropy), so that the losses of k micro-batches add up to the step's.
        ignore_index: label of the tokens that are not valid.
        shift: labels are aligned with the inputs, as transformers has them: position i predicts labels[i + 1].
        inplace: the gradient is written over the student's logits instead of a new (B, L, Vˢ) tensor, by this call, if
            they get one. They must not be read afterwards; `loss` alone has a gradient then, and there is no second
            backward. (Logits that are split over the vocabulary are overwritten by the backward.) Refused where they
            require grad and are a leaf or a view of one, or where rows share memory. Ignored under `torch.compile`.
        choice: how the tokens enter the loss, where it was decided on more than this batch. `focus_ratio`,
            `temperature_scale`, `base_temperature`, `difficulty` and `num_items` are not read then.
        vocab_parallel: the logits are this rank's columns of the vocabulary, (B, L, V_r) or (N, V_r) each; which and
            of whom, it says. Labels are indices of the whole vocabulary. None for whole logits, and for DTensors that
            are split along the vocabulary. See docs/scale.md.

    Returns:
        AdaKDOutput(loss, token_loss, difficulty, temperature, selected). With no valid token the loss is 0 and its
        gradient is 0. NaN in a valid row makes the loss NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; the message says which and what was meant.
        RuntimeError: inside a transformation of `torch.func`, or in forward mode.

    Example:
        >>> student = torch.randn(2, 5, 100, requires_grad=True)
        >>> out = adakd_loss(student, torch.randn(2, 5, 100), torch.randint(100, (2, 5)), focus_ratio=0.5)
        >>> out.loss.backward()
        >>> int(out.selected.sum()), tuple(student.grad.shape)
        (5, (2, 5, 100))
    """
    return loss_of_logits(
        student_logits, teacher_logits, labels, divergence=divergence, focus_ratio=focus_ratio,
        temperature_scale=temperature_scale, base_temperature=base_temperature, difficulty=difficulty,
        ce_weight=ce_weight, num_items=num_items, ignore_index=ignore_index, shift=shift, inplace=inplace,
        choice=choice, vocab_parallel=vocab_parallel,
    )[0]  # fmt: skip


def loss_of_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str | Divergence,
    focus_ratio: float | Tensor,
    temperature_scale: float,
    base_temperature: float,
    difficulty: str,
    ce_weight: float,
    num_items: float | Tensor | None,
    ignore_index: int,
    shift: bool,
    inplace: bool,
    choice: TokenChoice | None,
    vocab_parallel: VocabParallel | None,
) -> tuple[AdaKDOutput, Tensor]:
    """`adakd_loss`, and L of (7) alone: a 0-d constant, in fp64 where the device has it."""
    check_no_transform("adakd_loss", student_logits, teacher_logits)
    given = student_logits  # what is here of a DTensor is no leaf
    student_logits, teacher_logits, shards = local_shards(student_logits, teacher_logits, vocab_parallel, "logits")
    student, teacher, batch = check_shards(student_logits, teacher_logits, shards)
    div = check_options(
        divergence, focus_ratio, temperature_scale, base_temperature, difficulty, ce_weight, ignore_index, num_items,
        shift=shift, inplace=inplace,
    )  # fmt: skip
    read = ce_weight > 0 or difficulty == "cross_entropy"
    labels = check_labels(labels, batch, student, ignore_index, read=read)
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace:
        check_inplace("student_logits", given)
    if shift:
        labels = next_labels(labels, ignore_index)
    labels = labels.reshape(student.shape[:2])
    statistics = None
    with torch.no_grad():
        if choice is None:
            statistics = token_statistics(student, teacher, labels != ignore_index, labels, difficulty, shards)
            choice = choose_tokens(
                statistics.difficulty, statistics.valid, focus_ratio, temperature_scale, base_temperature, num_items
            )
        else:
            check_choice(choice, batch, student)
            choice = choice.each(lambda values: values.reshape(student.shape[:2]))
            choice = choice._replace(temperature=choice.temperature.to(reference.accumulation_dtype(student, teacher)))
            if ce_weight:
                statistics = token_statistics(student, teacher, choice.valid, labels, "hellinger", shards)
    options = loss_options(shards, statistics, labels if ce_weight else None)
    token_loss, loss, distillation = ops.token_losses(
        student, teacher, choice.temperature, choice.selected, div, inplace=inplace,
        n=choice.n, k=choice.k, ce_weight=ce_weight, **options,
    )  # fmt: skip
    per_token = (token_loss, choice.difficulty, choice.temperature, choice.selected)
    return AdaKDOutput(loss, *(values.view(batch) for values in per_token)), distillation


@torch.no_grad()
def token_difficulty(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    difficulty: str = "hellinger",
    *,
    labels: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor:
    """How far the student is from the teacher on every token, at temperature 1 (equation (2)).

    The squared Hellinger distance s² = 1 − Σ√(pq) lies in [0, 1]; of the measures it is compared with, Jensen-Shannon
    lies in [0, ln 2], forward and reverse KL and cross-entropy in [0, ∞) (nats). Carries no gradient.

    Args:
        student_logits, teacher_logits, vocab_parallel: as in `adakd_loss`.
        mask: (B, L) or (N,) bool, true for valid tokens; None for all. Others give 0 and their rows are not read.
        difficulty: 'hellinger', 'forward_kl', 'reverse_kl', 'jensen_shannon' or 'cross_entropy'.
        labels: (B, L) or (N,) of an integer type, needed by 'cross_entropy' only.

    Returns:
        (B, L) or (N,), fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: as `adakd_loss`; ValueError if 'cross_entropy' is asked for without labels.

    Example:
        >>> logits = torch.randn(3, 100)
        >>> bool((token_difficulty(logits, logits + 7.0) < 1e-6).all())
        True
    """
    student_logits, teacher_logits, shards = local_shards(student_logits, teacher_logits, vocab_parallel, "logits")
    student, teacher, batch = check_shards(student_logits, teacher_logits, shards)
    check_difficulty(difficulty)
    mask = token_mask(mask, batch, student)
    if difficulty == "cross_entropy":
        if labels is None:
            raise ValueError(
                "labels must be given for difficulty='cross_entropy': the token that each position predicts"
            )
        labels = check_labels(labels, batch, student).reshape(student.shape[:2])
    mask = mask.reshape(student.shape[:2])
    return token_statistics(student, teacher, mask, labels, difficulty, shards).difficulty.view(batch)


def token_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    divergence: str | Divergence = "reverse_kl",
    mask: Tensor | None = None,
    *,
    inplace: bool = False,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor:
    """D(p^τ, q^τ) of every token, unreduced and without the τ² of equation (7); differentiable in the student's logits.

    Weight, mask or reduce the result as you like: the gradient (10) is exact for any upstream weight.

    Args:
        student_logits, teacher_logits, divergence, vocab_parallel: as in `adakd_loss`.
        inplace: the backward writes the gradient over the student's logits; else as in `adakd_loss`.
        temperature: τ > 0, a float, a 0-d tensor or a tensor of shape (B, L) or (N,). A tensor's values are not
            checked: 0 and infinity give the limit in the type's range, a negative τ is taken for 0, NaN gives NaN.
        mask: (B, L) or (N,) bool, true for valid tokens; None for all. Others give 0 and gradient 0, and are not read.

    Returns:
        (B, L) or (N,), fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: as `adakd_loss`; ValueError if the temperature requires grad.

    Example:
        >>> student = torch.randn(3, 100, requires_grad=True)
        >>> per_token = token_divergence(student, torch.randn(3, 100), temperature=2.0, divergence="forward_kl")
        >>> (4.0 * per_token).mean().backward()
    """
    check_no_transform("token_divergence", student_logits, teacher_logits, temperature)
    given = student_logits
    student_logits, teacher_logits, shards = local_shards(student_logits, teacher_logits, vocab_parallel, "logits")
    student, teacher, batch = check_shards(student_logits, teacher_logits, shards)
    div = get_divergence(divergence)
    mask = token_mask(mask, batch, student)
    check_flag("inplace", inplace)
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace:
        check_inplace("student_logits", given)
    check_temperature(temperature, batch, student)
    temperature = divergence_temperature(
        temperature, batch, student.device, reference.accumulation_dtype(student, teacher)
    )
    shape = student.shape[:2]
    (d,) = ops.token_losses(
        student, teacher, temperature.reshape(shape), mask.reshape(shape), div, inplace=inplace,
        **loss_options(shards, None, None),
    )  # fmt: skip
    return d.view(batch)


def check_shards(student: Tensor, teacher: Tensor, shards: VocabParallel | None) -> tuple[Tensor, Tensor, torch.Size]:
    """`check_pair` of logits; those of a shard without the teacher's columns that are not common."""
    student, teacher, batch = check_pair(student, teacher, shard=shards is not None)
    if shards is not None:
        teacher = teacher[..., : shards.common(student.shape[-1], teacher.shape[-1], "logits")]
    return student, teacher, batch


def loss_options(
    shards: VocabParallel | None, statistics: TokenStatistics | None, labels: Tensor | None
) -> dict[str, Any]:
    """What `ops.token_losses` takes for the cross-entropy, where there are labels, and for rows that are split."""
    options: dict[str, Any] = {}
    if labels is not None and statistics is not None:
        options = {"labels": labels, "ce_mask": statistics.valid, "normalizers_1": statistics.normalizers_1}
    if shards is not None:
        maxima = None if statistics is None else statistics.maxima
        options["sums"] = partial(ops.shard_divergence, shards, maxima=maxima)
        if labels is not None and statistics is not None:
            options.update(labels=shards.local(labels), cross_entropy=statistics.cross_entropy)
    return options


def token_mask(mask: Tensor | None, batch: torch.Size, student: Tensor) -> Tensor:
    """The mask of the tokens, or one of all of them."""
    if mask is None:
        return torch.ones(batch, dtype=torch.bool, device=student.device)
    check_mask("mask", mask, batch)
    check_device("mask", mask, student)
    return mask


def divergence_temperature(
    temperature: float | Tensor, batch: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """τ of every token, so far from 0 and infinity that 1/τ is a normal number: these two give their finite limits."""
    temperature = clamped(temperature, 8.0 * torch.finfo(dtype).tiny, torch.finfo(dtype).max / 8.0, dtype)
    return tensor_on(temperature, device, dtype).expand(batch)


def token_statistics(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    labels: Tensor | None,
    measure: str,
    shards: VocabParallel | None = None,
) -> TokenStatistics:
    """The statistics of the tokens in the mask, their difficulty by the `measure`, one of `DIFFICULTIES`."""
    if shards is not None:
        labels = torch.full(mask.shape, -1, device=mask.device) if labels is None else labels
        return ops.row_statistics(shards, student, teacher, mask, labels, measure)
    difficulty, normalizers_1 = distances(student, teacher, mask, measure)
    of = Normalizers.of(normalizers_1)
    valid = mask & of.sum_s.logical_and(of.sum_t)  # the sum of a row of nothing but −inf is 0
    if measure == "cross_entropy" and labels is not None:
        difficulty = ops.token_cross_entropy(student, teacher, labels, valid, normalizers_1)
    return TokenStatistics(difficulty, valid, normalizers_1)


def distances(student: Tensor, teacher: Tensor, mask: Tensor, measure: str) -> tuple[Tensor, Tensor]:
    """Difficulty of the tokens in the mask by the `measure`, s² for cross-entropy, and their normalisers."""
    if measure in ("hellinger", "cross_entropy"):
        difficulty, normalizers_1 = ops.token_stats(student, teacher, mask)
    else:
        ones = torch.ones(mask.shape, dtype=torch.float32, device=mask.device)
        div = DIVERGENCES[measure]()
        difficulty, _, normalizers_1, *_ = ops.token_divergence(student, teacher, ones, mask, div.name, *div.parameters)
    return difficulty, normalizers_1


def next_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels aligned with the inputs, moved to the position that predicts them."""
    return torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)), dim=-1)


def check_choice(choice: TokenChoice, batch: torch.Size, student: Tensor) -> None:
    """Refuse a choice whose parts do not fit the tokens."""
    if not isinstance(choice, TokenChoice):
        raise TypeError(f"choice must be a TokenChoice, got {type(choice).__name__}")
    for name in ("difficulty", "temperature"):
        check_floating(f"choice.{name}", getattr(choice, name))
        check_token_tensor(f"choice.{name}", getattr(choice, name), batch, student)
        if getattr(choice, name).requires_grad:
            raise ValueError(f"choice.{name} requires grad, but it is a constant of the loss: pass it detached")
    for name in ("valid", "selected"):
        check_mask(f"choice.{name}", getattr(choice, name), batch)
        check_device(f"choice.{name}", getattr(choice, name), student)
    for name in ("n", "k"):
        value = getattr(choice, name)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise TypeError(f"choice.{name} must be a 0-d tensor, got {value!r}")
        check_device(f"choice.{name}", value, student)


def choose_tokens(
    difficulty: Tensor,
    valid: Tensor,
    focus_ratio: float | Tensor,
    temperature_scale: float,
    base_temperature: float,
    num_items: float | Tensor | None = None,
) -> TokenChoice:
    """(3)-(6) over all of these tokens. The divisors are n and k, or num_items and r·num_items; none of them is 0."""
    scales = (temperature_scale, base_temperature)
    if any(isinstance(scale, Tensor) for scale in scales):  # the operator takes numbers
        selected, temperature, n, k = token_choice(difficulty, valid, focus_ratio, *scales, num_items)
    else:
        selected, temperature, n, k = ops.choose_tokens(difficulty, valid, focus_ratio, num_items, *scales)
    return TokenChoice(difficulty, valid, temperature, selected, n, k)
