"""`linear_token_divergence`: the divergence of every token from hidden states and heads, in chunks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adaptive import power_of_two
from ..checks import check_head_options, check_temperature, is_dtensor
from ..divergences import Divergence, get_divergence
from ..functional import divergence_temperature, token_mask
from ..ops.token_divergence import OnceDifferentiable
from .chunks import Chunks, Objective, Tokens
from .function import check_heads, scaled_gradients
from .heads import HeadInput, StudentHead, TeacherHead, make_heads

__all__ = ["linear_token_divergence"]


def linear_token_divergence(
    student_hidden: Tensor,
    student_weight: StudentHead,
    teacher_hidden: Tensor,
    teacher_weight: TeacherHead,
    temperature: float | Tensor = 1.0,
    divergence: str | Divergence = "reverse_kl",
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`token_divergence` of logits z = cap·tanh(x/cap), x = scale·(hWᵀ + b), without the logits (z = x without a cap).

    Unreduced and without the τ² of equation (7); the gradients of the student's hidden states, weight and bias are
    exact for any upstream weight. This weight is known in the backward only, which computes the logits of every token
    in the mask again. `linear_adakd_loss` does without that where its loss is what you want.

    Waits for the device once a call with a mask, for the number of its tokens, so `torch.compile` breaks the graph
    here. Under `torch.autocast` the heads compute in its type, as a linear layer does.

    Args:
        student_hidden, teacher_hidden, student_bias, teacher_bias, chunk_tokens: as in `linear_adakd_loss`.
        student_softcap, teacher_softcap, student_scale, teacher_scale: as in `linear_adakd_loss`.
        student_weight, teacher_weight: as in `linear_adakd_loss`. A module in the place of the student's weight runs
            once in the forward and once, with a graph of its own, in the backward.
        temperature, divergence, mask: as in `token_divergence`. Tokens that are not in the mask cost no product.

    Returns:
        (B, L) or (N,), fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; the message says which and what was meant.

    Example:
        >>> hidden = torch.randn(2, 5, 8, requires_grad=True)
        >>> weight = torch.randn(100, 8, requires_grad=True)
        >>> per_token = linear_token_divergence(
        ...     hidden, weight, torch.randn(2, 5, 16), torch.randn(100, 16), temperature=2.0, divergence="forward_kl"
        ... )
        >>> (4.0 * per_token).mean().backward()
        >>> tuple(per_token.shape), tuple(hidden.grad.shape), tuple(weight.grad.shape)
        ((2, 5), (2, 5, 8), (100, 8))
    """
    if is_dtensor(student_weight) or is_dtensor(teacher_weight):
        raise TypeError(
            "linear_token_divergence needs whole heads, got a DTensor: take token_divergence of logits that are split "
            "along the vocabulary, or the weight's full_tensor()"
        )
    student = HeadInput(student_hidden, student_weight, student_bias, student_scale, student_softcap)
    teacher = HeadInput(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    batch = check_heads("linear_token_divergence", student, teacher, temperature)
    objective = Objective(get_divergence(divergence))
    within = token_mask(mask, batch, student_hidden).flatten()
    check_temperature(temperature, batch, student_hidden)
    check_head_options(student_softcap, teacher_softcap, student_scale, teacher_scale, chunk_tokens, keep_bytes=0)
    differentiable = torch.is_grad_enabled()
    with torch.no_grad():
        heads = make_heads(student, teacher, differentiable=differentiable)
        with torch.autocast(within.device.type, enabled=False):
            n = within.numel()
            positions = torch.arange(n, device=within.device) if mask is None else within.nonzero().flatten()
            chunks = Chunks(*heads, Tokens(positions, None, n), objective, chunk_tokens)
            each = divergence_temperature(temperature, batch, within.device, chunks.dtype)
            each = each.flatten()[positions].unsqueeze(0)
            d, *sums = _sums(chunks, each)
    if heads[0].differentiates:
        constants = (positions, each, teacher_hidden, teacher_weight, teacher_bias, *sums)
        options = _Options(
            student_weight if isinstance(student_weight, nn.Module) else None,
            student_scale,
            student_softcap,
            teacher_scale,
            teacher_softcap,
            objective,
            chunk_tokens,
            _autocast(within.device.type),
        )
        d = _TokenDivergence.apply(d, options, constants, *heads[0].inputs)  # type: ignore[no-untyped-call]
    return torch.zeros_like(within, dtype=d.dtype).index_copy(0, positions, d[0]).view(batch)


def _sums(chunks: Chunks, temperature: Tensor) -> list[Tensor]:
    """D of all tokens (1, n), and what its gradient needs."""
    found = [
        chunks.sums(pair, temperature[:, part], torch.ones_like(temperature[:, part], dtype=torch.bool))
        for part, pair in chunks.parts()
    ]
    if not found:
        nothing = chunks.pair(chunks.raw_s, chunks.z_t)
        found = [chunks.sums(nothing, temperature, torch.ones_like(temperature, dtype=torch.bool))]
    return [torch.cat(of_parts, dim=-1) for of_parts in zip(*found, strict=True)]


class _Options(NamedTuple):
    """What the backward needs beside tensors."""

    module: nn.Module | None  # the student's head, where it is no weight
    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    objective: Objective
    chunk_tokens: int | None
    autocast: dict[str, Any]


def _autocast(device_type: str) -> dict[str, Any]:
    """The arguments of `torch.autocast` that bring back what holds now."""
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
    }


class _TokenDivergence(torch.autograd.Function):
    """D of the tokens at some positions; the backward computes their logits again."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, options: _Options, constants: Sequence[Any], *inputs: Tensor | None) -> Tensor:
        given = (*inputs, *constants)
        # A callable is no tensor, and what inference mode made cannot be saved.
        ctx.kept = {i: x for i, x in enumerate(given) if not isinstance(x, Tensor) or x.is_inference()}
        ctx.save_for_backward(*(None if i in ctx.kept else x for i, x in enumerate(given)))
        ctx.options, ctx.inputs = options, len(inputs)
        return d.clone()

    @staticmethod
    def backward(ctx: Any, grad_d: Tensor) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        given = [ctx.kept.get(i, x) for i, x in enumerate(ctx.saved_tensors)]
        inputs, constants = given[: ctx.inputs], given[ctx.inputs :]
        positions, temperature, hidden_t, weight_t, bias_t, *sums = constants
        weight, bias = inputs[1:] if options.module is None else (options.module, None)
        with torch.no_grad(), torch.autocast(**options.autocast):
            heads = make_heads(
                HeadInput(inputs[0], weight, bias, options.student_scale, options.student_softcap),
                HeadInput(hidden_t, weight_t, bias_t, options.teacher_scale, options.teacher_softcap),
                differentiable=True,
            )
            with torch.autocast(grad_d.device.type, enabled=False):
                tokens = Tokens(positions, None, heads[0].hidden.shape[0])
                chunks = Chunks(*heads, tokens, options.objective, options.chunk_tokens)
                unit = _unit(grad_d)
                for part, pair in chunks.parts(fold=True):
                    saved = [values[..., part] for values in sums]
                    chunks.gradient(pair, temperature[:, part], grad_d[:, part] / unit, saved)
            like = [None if x is None else (x.shape, x.dtype) for x in inputs]
            grads = scaled_gradients(heads[0].gradients(), positions, unit * heads[0].scale, like)
        if torch.is_grad_enabled():  # create_graph=True
            refuses = torch.zeros((), device=grad_d.device, requires_grad=True)
            grads = [None if x is None else OnceDifferentiable.apply(x, refuses, grad_d) for x in grads]  # type: ignore[no-untyped-call]
        return None, None, None, *grads


def _unit(weight: Tensor) -> Tensor:
    """A power of two near the largest weight, without which gradients in fp16 could become 0."""
    largest = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    largest = largest.where(largest.isfinite() & (largest > 0), 1.0)
    return power_of_two(largest)
