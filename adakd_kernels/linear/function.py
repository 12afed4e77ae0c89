"""`linear_adakd_loss`: the loss from hidden states and heads, in chunks of tokens, without the logits of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
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
from .chunks import Chunks, KeptLogits, Objective, Tokens, host_power_of_two, one_phase, phase_1, two_phases
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
        divergence, focus_ratio, temperature_scale, base_temperature, difficulty: as in `adakd_loss`.
        ce_weight, num_items, ignore_index, shift: as in `adakd_loss`.
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
            if choice is not None:
                labelled = choice.valid if ce_weight else choice.selected
            else:
                labelled = labels != ignore_index
            share, items = host_copy(focus_ratio), host_copy(num_items if choice is None else choice.n)
            # The one wait: which tokens are labelled.
            positions = labelled.nonzero().flatten()
            n = len(positions)
            objective = objective._replace(power=host_power_of_two(n if items is None else number(items)))
            of_labelled = labels.index_select(0, positions).unsqueeze(0) if read or shards is not None else None
            tokens = Tokens(positions, of_labelled, len(labels))
            if choice is not None or objective.selects_all_at_one_temperature:
                chunks = Chunks(student, teacher, tokens, objective, chunk_tokens, shards=shards)
                own = None
                if choice is not None:
                    own = choice.each(lambda values: values.unsqueeze(0))
                    own = own._replace(
                        **{name: getattr(own, name).to(chunks.dtype) for name in ("temperature", "n", "k")}
                    )
                results = one_phase(chunks, own)
            else:
                needed = n if ce_weight else focus_number(number(share), n)
                kept = KeptLogits(student, teacher, n, needed, keep_bytes, shards)
                chunks = Chunks(student, teacher, tokens, objective, chunk_tokens, kept.rows, shards)
                results = two_phases(chunks, kept, needed)
            of_tokens = results.choice
            token_loss, loss, distillation = ops.loss_sums(
                results.divergence, results.temperature, of_tokens.k, results.cross_entropy, of_tokens.n, ce_weight,
                results.positions, len(labels),
            )  # fmt: skip
        shown = of_tokens if choice is None else choice
        per_token = (token_loss, shown.difficulty, shown.temperature, shown.selected)
        if entropy_out is not None and results.entropy is not None:
            everywhere = results.entropy.new_zeros(labels.shape).index_copy_(0, positions, results.entropy[0])
            entropy_out.copy_(everywhere.view(batch))
    if student.differentiates:
        if shards is not None and reduce_hidden and student.d_hidden is not None:
            shards.add_up(student.d_hidden)
        loss = _WithGradient.apply(  # type: ignore[no-untyped-call]
            [loss], results.gradient_scale, student.positions, student.gradients(), *student.inputs
        )
    return AdaKDOutput(loss, *(values.view(batch) for values in per_token)), distillation


def host_copy(value: float | Tensor | None) -> float | Tensor | None:
    """A number, or a 0-d tensor on the CPU, which has the value of one on a device after the next wait for it."""
    if isinstance(value, Tensor):
        return value.to("cpu", non_blocking=value.is_cuda)
    return value


def number(value: float | Tensor | None) -> float:
    """The value of a number or of a 0-d tensor on the CPU."""
    plain: Any = value.tolist() if isinstance(value, Tensor) else value
    return float(plain)


def focus_number(focus_ratio: float, n: int) -> int:
    """k = max(1, ⌊r·n⌋) of (3) for a share r ≤ 1 that is a number, but no more than n; 1 for a share of NaN."""
    k = focus_ratio * n
    return n if k >= n else max(int(k), 1) if k > 1 else min(1, n)


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
        positions = mask.flatten().nonzero().flatten()
        n, size = len(positions), mask.numel()
        tokens = Tokens(positions, labels.flatten()[positions].unsqueeze(0), size)
        chunks = Chunks(*heads, tokens, Objective(difficulty=measure), chunk_tokens, shards=shards)
        found = phase_1(chunks, KeptLogits(*heads, n, n, 0, shards))
        difficulty, valid, *_ = ops.spread_statistics(
            found.difficulty, found.normalizers_1, positions, size, None, None, chunks.vocab
        )
    return difficulty.view(mask.shape), valid.view(mask.shape)


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
        ctx: Any,
        loss: Sequence[Tensor],  # in a list, so that it is no input, and no copy has to be returned
        factor: float | Tensor,
        positions: Tensor,
        gradients: Sequence[Tensor | None],
        *inputs: Tensor | None,
    ) -> Tensor:
        of_device = isinstance(factor, Tensor)
        ctx.factor = None if of_device else factor
        ctx.save_for_backward(factor if of_device else None, positions, *gradients)
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs]
        return loss[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        factor, positions, *gradients = ctx.saved_tensors
        with torch.no_grad():
            factor = grad_loss * (ctx.factor if factor is None else factor)
            grads = scaled_gradients(gradients, positions, factor, ctx.like)
        if torch.is_grad_enabled():  # create_graph=True
            refuses = torch.zeros((), device=positions.device, requires_grad=True)
            grads = [None if x is None else OnceDifferentiable.apply(x, refuses, grad_loss) for x in grads]  # type: ignore[no-untyped-call]
        return None, None, None, None, *grads


def scaled_gradients(
    gradients: Sequence[Tensor | None], positions: Tensor, factor: Tensor,
    like: Sequence[tuple[torch.Size, torch.dtype] | None],
) -> list[Tensor | None]:  # fmt: skip
    """A head's gradients times a factor, in the shapes and types of its inputs; the first is that of `positions`."""
    of_hidden, *others = gradients
    shape, dtype = like[0] or (torch.Size(), positions.dtype)
    return [
        None if of_hidden is None else spread_rows(of_hidden, positions, factor, shape, dtype),
        *(
            None if grad is None or of is None else scaled(grad, factor, *of)
            for grad, of in zip(others, like[1:], strict=True)
        ),
    ]


def spread_rows(grad: Tensor, positions: Tensor, factor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """factor·grad (rows, H) at these places of the (B, L) or (N,) tokens and 0 elsewhere, rounded once."""
    out = torch.zeros(shape, dtype=dtype, device=grad.device)
    of_tokens = out.view(-1, shape[-1])
    if grad.dtype == dtype:  # without a temporary
        of_tokens.index_copy_(0, positions, grad).mul_(factor)
    else:
        for rows in blocks(grad):
            of_tokens.index_copy_(0, positions[rows], (grad[rows] * factor).to(dtype))
    return out


def scaled(grad: Tensor, factor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """factor·grad in another type and with zeros behind it, rounded once, without a temporary of its size."""
    if grad.dim() == 0 or (grad.shape == shape and grad.dtype == dtype):
        return (grad * factor).to(dtype)
    out = torch.empty(shape, dtype=dtype, device=grad.device)
    if len(grad) < len(out):
        out[grad.shape[0] :] = 0
    for rows in blocks(grad):
        torch.mul(grad[rows], factor, out=out[rows])
    return out
