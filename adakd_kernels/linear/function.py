"""`linear_adakd_loss`: the loss from hidden states and heads, in chunks of tokens, without the logits of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adaptive import focus_count, loss_temperature
from ..checks import (
    check_entropy_out,
    check_flag,
    check_head,
    check_head_options,
    check_labels,
    check_no_transform,
    check_options,
    check_pair,
    is_dtensor,
)
from ..divergences import Divergence
from ..functional import (
    AdaKDOutput,
    TokenChoice,
    check_choice,
    next_labels,
)
from ..ops.token_divergence import OnceDifferentiable
from ..vocab_parallel import VocabParallel, local_part, local_shards
from .chunks import Chunks, KeptLogits, Objective, Tokens, one_phase, phase_1, two_phases
from .heads import HeadInput, StudentHead, TeacherHead, blocks, make_heads

__all__ = ["linear_adakd_loss"]


def linear_adakd_loss(
    student_hidden: Tensor,
    student_weight: StudentHead,
    teacher_hidden: Tensor,
    teacher_weight: TeacherHead,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    chunk_tokens: int | None = None,
    keep_bytes: int = 0,
    divergence: str | Divergence = "reverse_kl",
    focus_ratio: float | Tensor = 1.0,
    temperature_scale: float = 0.5,
    base_temperature: float = 1.0,
    difficulty: str = "hellinger",
    ce_weight: float = 0.0,
    num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    choice: TokenChoice | None = None,
    entropy_out: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
    reduce_hidden: bool = False,
) -> AdaKDOutput:
    """`adakd_loss` of logits z = cap·tanh(x/cap), x = scale·(hWᵀ + b), without the logits (or z = x without a cap).

    Equal to the logits route to rounding, in memory that grows with the number of tokens by a few numbers each. The
    gradients of hidden states, weight and bias are computed here, not in the backward, which only scales them; where
    none is asked for, none is computed. The weight's gradient is added up in fp32 (fp64 for fp64).

    Waits for the device once a call, for the number of labelled and of selected tokens, so `torch.compile` breaks the
    graph here. Under `torch.autocast` the heads compute in its type, as a linear layer does.

    Args:
        student_hidden: (B, L, Hˢ) or (N, Hˢ), what the head is applied to; fp16, bf16, fp32 or fp64.
        student_weight: (Vˢ, Hˢ) of the hidden states' type, or an `nn.Module` that makes logits of hidden states: its
            parameters get gradients. A module runs twice on a selected token (on a labelled one if `ce_weight` > 0),
            the second time with a graph of its own; once where every token is selected at one temperature.
        teacher_hidden: (B, L, Hᵗ) or (N, Hᵗ); Hᵗ and its type may differ.
        teacher_weight: (Vᵗ, Hᵗ) of the teacher's hidden states' type, or a callable.
        labels: (B, L) or (N,), of any integer type that can hold `ignore_index`: the token that each position predicts;
            or bool, as in `adakd_loss`.
        student_bias, teacher_bias: (V,), for a head that is a weight.
        student_softcap, teacher_softcap: cap > 0, or None.
        student_scale, teacher_scale: scale > 0.
        chunk_tokens: rows of the student's logits at a time; half as many of the teacher's. None: what fits in
            112 MiB on a CPU and in 1 GiB elsewhere.
        keep_bytes: bytes for logits that are kept between the phases instead of being computed again: those of the
            hardest tokens. Without effect where the student's head is a module that gets gradients.
        divergence, focus_ratio, temperature_scale, base_temperature, difficulty, ce_weight, num_items, ignore_index,
            shift: as in `adakd_loss`.
        choice: as in `adakd_loss`. Each token that has a part in the loss goes through the heads once then.
        entropy_out: (B, L) or (N,), floating, takes the entropy of the student at temperature 1 over the common
            vocabulary, in nats, of the valid tokens, and 0 elsewhere: for one more pass over the student's logits of
            each chunk. Not with `choice`, and not where the vocabulary is split.
        vocab_parallel: heads are this rank's columns of the vocabulary: weights (V_r, H), biases (V_r,), or modules
            that give (rows, V_r) logits; which and of whom, it says. Hidden states and labels are the same on all
            ranks. None for whole heads, and for weights (and biases) that are DTensors split along the vocabulary. Not
            with the difficulty 'jensen_shannon', which would take a pass of its own. See docs/scale.md.
        reduce_hidden: with a split vocabulary, add up the gradient of the student's hidden states over the ranks.
            Without it, each rank gets the part that follows from its own columns, and the layer in front of the head
            adds them up, as column-parallel layers do; of hidden states that are a DTensor, DTensor does. Here
            the parts that follow from a weight are added up in fp32 (fp64 for fp64) and rounded once. The other ways
            round each part to the hidden states' type, which is coarse in fp16 and bf16 where parts cancel.

    Returns:
        AdaKDOutput(loss, token_loss, difficulty, temperature, selected), as `adakd_loss`, but `loss` alone carries a
        graph.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; the message says which and what was meant.

    Example:
        >>> hidden = torch.randn(2, 5, 8, requires_grad=True)
        >>> weight = torch.randn(100, 8, requires_grad=True)
        >>> out = linear_adakd_loss(
        ...     hidden, weight, torch.randn(2, 5, 16), torch.randn(100, 16), torch.randint(100, (2, 5)), focus_ratio=0.5
        ... )
        >>> out.loss.backward()
        >>> int(out.selected.sum()), tuple(hidden.grad.shape), tuple(weight.grad.shape)
        (5, (2, 5, 8), (100, 8))
    """
    return loss_of_hidden(
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels,
        student_bias=student_bias, teacher_bias=teacher_bias, student_softcap=student_softcap,
        teacher_softcap=teacher_softcap, student_scale=student_scale, teacher_scale=teacher_scale,
        chunk_tokens=chunk_tokens, keep_bytes=keep_bytes, divergence=divergence, focus_ratio=focus_ratio,
        temperature_scale=temperature_scale, base_temperature=base_temperature, difficulty=difficulty,
        ce_weight=ce_weight, num_items=num_items, ignore_index=ignore_index, shift=shift, choice=choice,
        entropy_out=entropy_out, vocab_parallel=vocab_parallel, reduce_hidden=reduce_hidden,
    )[0]  # fmt: skip


def loss_of_hidden(
    student_hidden: Tensor,
    student_weight: StudentHead,
    teacher_hidden: Tensor,
    teacher_weight: TeacherHead,
    labels: Tensor,
    *,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_scale: float,
    teacher_scale: float,
    chunk_tokens: int | None,
    keep_bytes: int,
    divergence: str | Divergence,
    focus_ratio: float | Tensor,
    temperature_scale: float,
    base_temperature: float,
    difficulty: str,
    ce_weight: float,
    num_items: float | Tensor | None,
    ignore_index: int,
    shift: bool,
    choice: TokenChoice | None,
    entropy_out: Tensor | None,
    vocab_parallel: VocabParallel | None,
    reduce_hidden: bool,
) -> tuple[AdaKDOutput, Tensor]:
    """`linear_adakd_loss`, and L of (7) alone: a 0-d constant, in fp64 where the device has it."""
    student_weight, teacher_weight, shards = local_shards(student_weight, teacher_weight, vocab_parallel, "weight", 0)
    student_in = HeadInput(student_hidden, student_weight, student_bias, student_scale, student_softcap)
    teacher_in = HeadInput(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    spread_hidden = is_dtensor(student_hidden)
    student_in = local_head("student", student_in, shards is not None)
    teacher_in = local_head("teacher", teacher_in, shards is not None)
    student_hidden = student_in.hidden
    batch = check_heads("linear_adakd_loss", student_in, teacher_in, shards=shards)
    check_flag("reduce_hidden", reduce_hidden)
    div = check_options(
        divergence, focus_ratio, temperature_scale, base_temperature, difficulty, ce_weight, ignore_index, num_items,
        shift=shift,
    )  # fmt: skip
    read = ce_weight > 0 or difficulty == "cross_entropy"
    labels = check_labels(labels, batch, student_hidden, ignore_index, read=read)
    check_head_options(student_softcap, teacher_softcap, student_scale, teacher_scale, chunk_tokens, keep_bytes)
    if entropy_out is not None:
        check_entropy_out(entropy_out, batch, choice)
    if shards is not None:
        for refused, what in (
            (entropy_out is not None, "entropy_out must be None"),
            (difficulty == "jensen_shannon" and choice is None, "difficulty must not be 'jensen_shannon'"),
        ):
            if refused:
                raise ValueError(f"{what} where the vocabulary is split: it would take one more pass over the logits")
    elif reduce_hidden:
        raise ValueError("reduce_hidden must be False where the vocabulary is not split: there is nothing to add up")
    if reduce_hidden and spread_hidden:
        raise ValueError("reduce_hidden must be False where student_hidden is a DTensor, which adds up its gradient")
    if choice is not None:
        check_choice(choice, batch, student_hidden)
        choice = choice.each(torch.flatten)
    if shift:
        labels = next_labels(labels, ignore_index)
    labels = labels.flatten()
    objective = Objective(
        div, difficulty, focus_ratio, temperature_scale, base_temperature, ce_weight, num_items, entropy_out is not None
    )
    differentiable = torch.is_grad_enabled()
    with torch.no_grad():
        student, teacher = make_heads(
            student_in, teacher_in, shards=shards, differentiable=differentiable, summed=reduce_hidden
        )
        with torch.autocast(student_hidden.device.type, enabled=False):
            labelled = labels != ignore_index
            if choice is not None:
                labelled = choice.valid if ce_weight else choice.selected
            # The one wait: how many tokens are labelled, and how many of them can be selected.
            n, k = torch.stack((labelled.sum(), focus_count(focus_ratio, labelled.sum()))).tolist()
            positions = masked_positions(labelled, n)
            tokens = Tokens(positions, labels[positions].unsqueeze(0))
            if choice is not None or objective.selects_all_at_one_temperature:
                chunks = Chunks(student, teacher, tokens, objective, chunk_tokens, shards=shards)
                own = None
                if choice is not None:
                    own = choice.each(lambda values: values[positions].unsqueeze(0))
                    own = own._replace(
                        **{name: getattr(own, name).to(chunks.dtype) for name in ("temperature", "n", "k")}
                    )
                results = one_phase(chunks, own)
            else:
                needed = n if ce_weight else min(k, n)
                kept = KeptLogits(student, teacher, n, needed, keep_bytes, shards)
                chunks = Chunks(student, teacher, tokens, objective, chunk_tokens, kept.rows, shards)
                results = two_phases(chunks, kept, needed)
            of_tokens = results.choice
            token_loss, loss, distillation = ops.loss_sums(
                results.divergence, of_tokens.temperature, of_tokens.k, results.cross_entropy, of_tokens.n, ce_weight
            )

        def spread(values: Tensor, fill: float) -> Tensor:
            everywhere = torch.full(labels.shape, fill, dtype=values.dtype, device=values.device)
            return everywhere.index_copy(0, positions, values[0])

        if choice is None:
            choice = TokenChoice(
                spread(of_tokens.difficulty, 0.0),
                labelled,
                spread(of_tokens.temperature, loss_temperature(base_temperature, of_tokens.temperature.dtype)),
                spread(of_tokens.selected, False),
                *of_tokens[4:],
            )
        per_token = (spread(token_loss, 0.0), choice.difficulty, choice.temperature, choice.selected)
        if entropy_out is not None and results.entropy is not None:
            entropy_out.copy_(spread(results.entropy, 0.0).view(batch))
    if student.differentiates:
        if shards is not None and reduce_hidden and student.d_hidden is not None:
            shards.add_up(student.d_hidden)
        loss = _WithGradient.apply(loss, results.gradient_scale, student.gradients(), *student.inputs)  # type: ignore[no-untyped-call]
    return AdaKDOutput(loss, *(values.view(batch) for values in per_token)), distillation


@torch.no_grad()
def linear_token_statistics(
    student: HeadInput,
    teacher: HeadInput,
    labels: Tensor,
    mask: Tensor,
    measure: str,
    chunk_tokens: int | None = None,
    shards: VocabParallel | None = None,
) -> tuple[Tensor, Tensor]:
    """Difficulty and validity of the tokens in the mask (B, L), as `token_statistics` has them, without their logits.

    Waits for the device once.
    """
    heads = make_heads(student, teacher, shards=shards)
    with torch.autocast(mask.device.type, enabled=False):
        n = int(mask.sum())
        positions = masked_positions(mask.flatten(), n)
        tokens = Tokens(positions, labels.flatten()[positions].unsqueeze(0))
        chunks = Chunks(*heads, tokens, Objective(difficulty=measure), chunk_tokens, shards=shards)
        found = phase_1(chunks, KeptLogits(*heads, n, n, 0, shards))
    difficulty, valid = (
        torch.zeros(mask.numel(), dtype=values.dtype, device=mask.device).index_copy(0, positions, values[0])
        for values in (found.difficulty, found.valid)
    )
    return difficulty.view(mask.shape), valid.view(mask.shape)


def masked_positions(mask: Tensor, n: int) -> Tensor:
    """The indices of the n true entries of a mask (N,), in order."""
    # By a stable sort, because `nonzero` would wait for the device.
    return (~mask).to(torch.uint8).argsort(stable=True)[:n]


def local_head(side: str, head: HeadInput, split: bool) -> HeadInput:
    """The head with what is here of its hidden states and bias, where they are DTensors."""
    hidden = local_part(f"{side}_hidden", head.hidden, split, "the same on all ranks")
    bias = local_part(f"{side}_bias", head.bias, split, "split as its weight is", dim=0)
    return head._replace(hidden=hidden, bias=bias)


def check_heads(
    function: str, student: HeadInput, teacher: HeadInput, *others: Any, shards: VocabParallel | None = None
) -> torch.Size:
    """Refuse hidden states and heads that do not fit; the shape of the tokens."""
    check_no_transform(function, *student[:3], *teacher[:3], *others)
    *_, batch = check_pair(student.hidden, teacher.hidden, "hidden")
    check_head("student", student.hidden, student.weight, student.bias, shard=shards is not None)
    check_head("teacher", teacher.hidden, teacher.weight, teacher.bias, shard=shards is not None)
    return batch


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients are known but for a factor, by which the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, factor: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(factor, *gradients)
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        factor, *gradients = ctx.saved_tensors
        with torch.no_grad():
            grads = [
                None if grad is None else scaled(grad, grad_loss * factor, *like)
                for grad, like in zip(gradients, ctx.like, strict=True)
            ]
        if torch.is_grad_enabled():  # create_graph=True
            refuses = torch.zeros((), device=factor.device, requires_grad=True)
            grads = [None if x is None else OnceDifferentiable.apply(x, refuses, grad_loss) for x in grads]  # type: ignore[no-untyped-call]
        return None, None, None, *grads


def scaled(grad: Tensor, factor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """factor·grad in another type and with zeros behind it, rounded once, without a temporary of its size."""
    all_of_it = grad.numel() == math.prod(shape)
    if grad.dim() == 0 or (all_of_it and grad.dtype == dtype):
        return (grad * factor).to(dtype).view(shape)
    out = torch.empty(shape, dtype=dtype, device=grad.device)
    rows_of_out = out.view(grad.shape) if all_of_it else out
    rows_of_out[grad.shape[0] :] = 0
    for rows in blocks(grad):
        rows_of_out[rows] = grad[rows] * factor
    return out
