"""The loss from hidden states and heads, in chunks of tokens: the logits of neither model exist as a whole.

Phase 1 computes the logits of each labelled token and keeps a few numbers: difficulty, normaliser, cross-entropy.
Selection and temperatures follow over the whole batch. Phase 2 computes the logits of the selected tokens again, their
divergence, writes the gradient over them and folds it into those of hidden states and head. Where every token counts
at one temperature, no token waits for the others, and both phases are one (docs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops, reference
from .adaptive import descending, focus_count, select_tokens
from .checks import (
    check_constant,
    check_device,
    check_floating,
    check_integer,
    check_labels,
    check_no_transform,
    check_options,
    check_pair,
    check_range,
)
from .divergences import Divergence
from .functional import (
    AdaKDOutput,
    loss_counts,
    loss_temperature,
    measure_difficulty,
    next_labels,
    token_temperature,
)
from .loss import AdaKDLoss
from .ops.token_divergence import OnceDifferentiable, loud_weights

__all__ = ["LinearAdaKDLoss", "linear_adakd_loss"]

CHUNK_BYTES = {"cpu": 112 * 2**20}
"""Bytes for the logits of one chunk, by device type; 1 GiB for those that are not here."""
TEACHER_PART = 2
"""The teacher's buffer holds one row for so many rows of the student's, whose gradient is worth more rows at a time."""
BLOCK_BYTES = {"cpu": 2**20}
"""Bytes of the part of the head's gradient that is computed at a time; 128 MiB for devices that are not here."""

Head = Tensor | Callable[[Tensor], Tensor]


def linear_adakd_loss(
    student_hidden: Tensor,
    student_weight: Tensor | nn.Module,
    teacher_hidden: Tensor,
    teacher_weight: Head,
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
            parameters get gradients. A module runs twice on a token that counts, the second time with a graph of its
            own; once where every token counts at one temperature.
        teacher_hidden: (B, L, Hᵗ) or (N, Hᵗ); Hᵗ and its type may differ.
        teacher_weight: (Vᵗ, Hᵗ) of the teacher's hidden states' type, or a callable.
        labels: (B, L) or (N,), of any integer type that can hold `ignore_index`: the token that each position predicts.
        student_bias, teacher_bias: (V,), for a head that is a weight.
        student_softcap, teacher_softcap: cap > 0, or None.
        student_scale, teacher_scale: scale > 0.
        chunk_tokens: rows of the student's logits at a time; half as many of the teacher's. None: what fits in
            112 MiB on a CPU and in 1 GiB elsewhere.
        keep_bytes: bytes for logits that are kept between the phases instead of being computed again: those of the
            hardest tokens. Without effect where the student's head is a module that gets gradients.
        divergence, focus_ratio, temperature_scale, base_temperature, difficulty, ce_weight, num_items, ignore_index,
            shift: as in `adakd_loss`.

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
    check_no_transform("linear_adakd_loss", student_hidden, student_weight, student_bias, teacher_hidden)
    hidden_s, hidden_t, batch = check_pair(student_hidden, teacher_hidden, "hidden")
    div = check_options(
        divergence, focus_ratio, temperature_scale, base_temperature, difficulty, ce_weight, ignore_index, num_items,
        shift=shift,
    )  # fmt: skip
    labels = check_labels(labels, batch, student_hidden, ignore_index)
    _check_head("student", student_hidden, student_weight, student_bias)
    _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    _check_head_options(student_softcap, teacher_softcap, student_scale, teacher_scale, chunk_tokens, keep_bytes)
    if shift:
        labels = next_labels(labels, ignore_index)
    labels = labels.flatten()

    inputs: list[Tensor | None] = [student_hidden]
    if isinstance(student_weight, Tensor):
        inputs += [student_weight, student_bias]
    else:
        inputs += [parameter for parameter in student_weight.parameters() if parameter.requires_grad]
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    # Entries beyond the common vocabulary have no part in the loss: their columns are not computed.
    vocab = min([w.shape[0] for w in (student_weight, teacher_weight) if isinstance(w, Tensor)], default=0)
    with torch.no_grad():
        student = _make_head(hidden_s, student_weight, student_bias, student_softcap, student_scale, vocab, needs)
        teacher = _make_head(hidden_t, teacher_weight, teacher_bias, teacher_softcap, teacher_scale, vocab)
        with torch.autocast(student_hidden.device.type, enabled=False):
            counted = labels != ignore_index
            n, k = torch.stack((counted.sum(), focus_count(focus_ratio, counted.sum()))).tolist()  # the one wait
            tokens = (~counted).to(torch.uint8).argsort(stable=True)[:n]
            # Of numbers only: to read the value of a tensor would be another wait.
            known = not (isinstance(focus_ratio, Tensor) or isinstance(temperature_scale, Tensor))
            at_once = known and bool(focus_ratio == 1.0 and temperature_scale == 0.0)
            rows, keep_bytes = (n, 0) if at_once else (n if ce_weight else min(k, n), keep_bytes)
            logits = _Logits(student, teacher, tokens, rows, chunk_tokens, keep_bytes)

            def counts(valid: Tensor) -> tuple[Tensor, Tensor]:
                return loss_counts(valid, focus_ratio, num_items, logits.accumulation_dtype)

            def select(hard: Tensor, valid: Tensor, items: Tensor, count: Tensor) -> _Selection:
                selected = select_tokens(hard, focus_ratio, valid)
                tau = token_temperature(hard, selected, valid, temperature_scale, base_temperature)
                unit = _power_of_two(items)
                weight = (unit * (1.0 - ce_weight) / count) * tau.square() * selected
                return _Selection(tau, selected, weight, (unit * ce_weight / items) * valid if ce_weight else None)

            first_phase = (labels[tokens], difficulty, ce_weight != 0.0)
            if at_once:
                # Which rows are empty is not known before all are there: until then each labelled token counts.
                assumed = counts(torch.ones_like(tokens, dtype=torch.bool))
                stats, token_div = logits.at_once(*first_phase, lambda hard, valid: select(hard, valid, *assumed), div)
            else:
                stats = logits.statistics(*first_phase)
            items, count = counts(stats.valid)
            selection = select(stats.difficulty, stats.valid, items, count)
            if not at_once:
                assumed, token_div = (items, count), logits.divergence(stats, selection, div)
            tau, selected = selection.tau, selection.selected
            factor = student_scale / _power_of_two(assumed[0]) * (assumed[1] / count)
            token_loss = tau.square() * token_div
            loss = token_loss.sum() / count
            if ce_weight:
                loss = (1.0 - ce_weight) * loss + ce_weight * (stats.cross_entropy.sum() / items)

        def spread(values: Tensor, fill: float) -> Tensor:
            everywhere = torch.full(labels.shape, fill, dtype=values.dtype, device=values.device)
            return everywhere.index_copy(0, tokens, values).view(batch)

        per_token = (
            spread(token_loss, 0.0),
            spread(stats.difficulty, 0.0),
            spread(tau, loss_temperature(base_temperature, tau.dtype)),
            spread(selected, False),
        )
    if any(needs):
        loss = _WithGradient.apply(loss, factor, student.gradients(), *inputs)  # type: ignore[no-untyped-call]
    return AdaKDOutput(loss, *per_token)


class LinearAdaKDLoss(AdaKDLoss):
    """`linear_adakd_loss` whose share r follows the loss, as `AdaKDLoss` does from logits.

    Args:
        divergence: as in `adakd_loss`.
        student_softcap, teacher_softcap, student_scale, teacher_scale, chunk_tokens, keep_bytes: as in
            `linear_adakd_loss`.
        **options: those of `AdaKDLoss`; `inplace` concerns `from_logits` only.

    Example:
        >>> loss_fn = LinearAdaKDLoss(divergence="reverse_kl", total_steps=1000)
        >>> hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.nn.Linear(8, 100)
        >>> labels = torch.randint(100, (2, 5))
        >>> out = loss_fn(
        ...     hidden, head.weight, torch.randn(2, 5, 16), torch.randn(100, 16), labels, student_bias=head.bias
        ... )
        >>> out.loss.backward()
        >>> loss_fn.step()
        >>> int(loss_fn.focus.steps)
        1
    """

    def __init__(
        self,
        divergence: str | Divergence = "reverse_kl",
        *,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        chunk_tokens: int | None = None,
        keep_bytes: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(divergence, **options)
        _check_head_options(student_softcap, teacher_softcap, student_scale, teacher_scale, chunk_tokens, keep_bytes)
        self.student_softcap, self.teacher_softcap = student_softcap, teacher_softcap
        self.student_scale, self.teacher_scale = student_scale, teacher_scale
        self.chunk_tokens, self.keep_bytes = chunk_tokens, keep_bytes

    def forward(  # type: ignore[override]
        self,
        student_hidden: Tensor,
        student_weight: Tensor | nn.Module,
        teacher_hidden: Tensor,
        teacher_weight: Head,
        labels: Tensor,
        num_items: float | Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> AdaKDOutput:
        """`linear_adakd_loss` of one micro-batch, at the current share. Shapes and errors are its."""
        self._check_same_count(num_items)
        focus_ratio = self._current_ratio(student_hidden)
        out = linear_adakd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
            student_scale=self.student_scale,
            teacher_scale=self.teacher_scale,
            chunk_tokens=self.chunk_tokens,
            keep_bytes=self.keep_bytes,
            focus_ratio=focus_ratio,
            num_items=num_items,
            **self._options(),
        )
        self._record(out, focus_ratio, num_items)
        return out

    def from_logits(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, num_items: float | Tensor | None = None
    ) -> AdaKDOutput:
        """The same loss of a micro-batch whose logits are there anyway: `AdaKDLoss` with this module's share."""
        return super().forward(student_logits, teacher_logits, labels, num_items)


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients are known: the backward scales them."""

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
            scaled = [
                None if grad is None else _scaled(grad, grad_loss * factor, *like)
                for grad, like in zip(gradients, ctx.like, strict=True)
            ]
        if torch.is_grad_enabled():  # create_graph=True
            refuses = torch.zeros((), device=factor.device, requires_grad=True)
            scaled = [None if x is None else OnceDifferentiable.apply(x, refuses, grad_loss) for x in scaled]  # type: ignore[no-untyped-call]
        return None, None, None, *scaled


def _scaled(grad: Tensor, factor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """factor·grad in another type and with zeros behind it, rounded once, without a temporary of its size."""
    if grad.dim() == 0 or (grad.numel() == math.prod(shape) and grad.dtype == dtype):
        return (grad * factor).to(dtype).view(shape)
    out = torch.empty(shape, dtype=dtype, device=grad.device)
    out[grad.shape[0] :] = 0
    for rows in _blocks(grad):
        out[rows] = grad[rows] * factor
    return out


def _blocks(tensor: Tensor) -> list[slice]:
    """The first dimension in parts of `BLOCK_BYTES`."""
    row_bytes = max(1, math.prod(tensor.shape[1:])) * tensor.element_size()
    step = max(1, BLOCK_BYTES.get(tensor.device.type, 2**27) // row_bytes)
    return [slice(a, b) for a, b in _spans(0, tensor.shape[0], step)]


def _spans(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    return [(a, min(a + step, stop)) for a in range(start, stop, step)]


class _Head:
    """One model: hidden states, head, and what follows the head. `raw` logits are x, or tanh(x/cap) with a cap."""

    weight: Any

    def __init__(self, hidden: Tensor, scale: float, softcap: float | None, vocab: int, dtype: torch.dtype) -> None:
        self.hidden = hidden.flatten(0, 1)
        self.scale, self.softcap, self.vocab, self.dtype = scale, softcap, vocab, dtype

    def raw(self, tokens: Tensor, out: Tensor, *, graph: bool = False) -> None:
        """Raw logits of some tokens into `out`; `graph` for a call that `fold` follows."""
        self.product(self.hidden.index_select(0, tokens), out, graph)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_()

    def capped(self, raw: Tensor, out: Tensor) -> Tensor:
        """Logits from raw ones, in `out` where there is a cap."""
        return raw if self.softcap is None else torch.mul(raw, self.softcap, out=out)

    def product(self, hidden: Tensor, out: Tensor, graph: bool) -> None:
        """The head of hidden states, into `out`."""
        raise NotImplementedError

    def fold(self, tokens: Tensor, grad: Tensor) -> None:
        """Add to the gradients those that follow from the gradient of x/scale of some tokens."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor | None]:
        """In the order of the inputs of `_WithGradient`."""
        raise NotImplementedError


class _WeightHead(_Head):
    """A head that is a weight and perhaps a bias."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, vocab: int,
        needs: Sequence[bool],
    ) -> None:  # fmt: skip
        super().__init__(hidden, scale, softcap, vocab, _compute_dtype(hidden))
        self.weight = weight[:vocab].to(self.dtype)
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        self.d_hidden = torch.zeros_like(self.hidden) if needs[0] else None
        acc = reference.accumulation_dtype(hidden)
        self.d_weight = torch.zeros_like(self.weight, dtype=acc) if needs[1] else None
        self.d_bias = torch.zeros_like(self.bias, dtype=acc) if needs[2] and self.bias is not None else None

    def product(self, hidden: Tensor, out: Tensor, graph: bool) -> None:
        if self.bias is None:
            torch.mm(hidden.to(self.dtype), self.weight.T, out=out)
        else:
            torch.addmm(self.bias, hidden.to(self.dtype), self.weight.T, out=out)

    def fold(self, tokens: Tensor, grad: Tensor) -> None:
        if self.d_hidden is not None:
            self.d_hidden.index_copy_(0, tokens, torch.mm(grad, self.weight).to(self.d_hidden.dtype))
        if self.d_bias is not None:
            for cols in _blocks(self.weight):
                self.d_bias[cols] += grad[:, cols].sum(0, dtype=self.d_bias.dtype)
        if self.d_weight is not None:
            hidden = self.hidden.index_select(0, tokens).to(self.dtype)
            for rows in _blocks(self.weight):
                part = self.d_weight[rows]
                if self.dtype == torch.bfloat16:
                    part += torch.mm(grad[:, rows].T, hidden)
                else:  # fp16 has no room for the sum over a chunk
                    part.addmm_(grad[:, rows].T.to(part.dtype), hidden.to(part.dtype))

    def gradients(self) -> list[Tensor | None]:
        return [self.d_hidden, self.d_weight, self.d_bias]


class _ModuleHead(_Head):
    """A head that is called; autograd differentiates it, chunk by chunk."""

    def __init__(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], scale: float, softcap: float | None,
        needs: Sequence[bool],
    ) -> None:  # fmt: skip
        self.head = head
        self.autocast = torch.is_autocast_enabled(hidden.device.type)
        one = self._call(hidden.new_zeros(1, hidden.shape[-1]))
        super().__init__(hidden, scale, softcap, one.shape[-1], one.dtype)
        parameters = [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module) else []
        self.parameters = [p for p, needed in zip(parameters, needs[1:], strict=False) if needed]
        self.d_hidden = torch.zeros_like(self.hidden) if needs[0] else None
        self.d_parameters = [torch.zeros_like(p, dtype=reference.accumulation_dtype(p)) for p in self.parameters]

    def _call(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=self.autocast):
            return self.head(hidden)

    def product(self, hidden: Tensor, out: Tensor, graph: bool) -> None:
        with torch.set_grad_enabled(graph):
            self.leaf = hidden.requires_grad_(graph and self.d_hidden is not None)
            self.result = self._call(self.leaf)
        out.copy_(self.result)
        if not graph:
            del self.leaf, self.result

    def fold(self, tokens: Tensor, grad: Tensor) -> None:
        inputs = ([] if self.d_hidden is None else [self.leaf]) + self.parameters
        with _without_hooks(self.parameters):
            grads = torch.autograd.grad(self.result, inputs, grad.to(self.result.dtype), allow_unused=True)
        del self.leaf, self.result
        if self.d_hidden is not None:
            if grads[0] is not None:
                self.d_hidden.index_copy_(0, tokens, grads[0])
            grads = grads[1:]
        for total, part in zip(self.d_parameters, grads, strict=True):
            if part is not None:
                total += part

    def gradients(self) -> list[Tensor | None]:
        return [self.d_hidden, *self.d_parameters]


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """No chunk calls the hooks of the parameters: the backward of the loss does, with the whole gradient."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, kept in hooks:
            registered.update(kept)


def _make_head(
    hidden: Tensor, weight: Head, bias: Tensor | None, softcap: float | None, scale: float, vocab: int,
    needs: Sequence[bool] = (False, False, False),
) -> _Head:  # fmt: skip
    if isinstance(weight, Tensor):
        return _WeightHead(hidden, weight, bias, scale, softcap, vocab, needs)
    return _ModuleHead(hidden, weight, scale, softcap, needs)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The type of the products: autocast's where it is on, but fp64 stays."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _power_of_two(items: Tensor) -> Tensor:
    """Near `items`. What is computed is the gradient of a sum over so many, not of a mean: fp16 has no room below 6e-8,
    and a power of two rounds nothing."""
    return items / torch.frexp(items).mantissa


class _Statistics(NamedTuple):
    """What phase 1 leaves of each labelled token."""

    labels: Tensor
    difficulty: Tensor
    valid: Tensor
    normalizers_1: Tensor  # (4, n), the others (n,)
    cross_entropy: Tensor


class _Selection(NamedTuple):
    """What phase 2 does with each labelled token."""

    tau: Tensor
    selected: Tensor
    weight: Tensor
    weight_ce: Tensor | None


def _rows(of: Any, part: Tensor | slice) -> Any:
    """A tuple of tensors, of some tokens."""
    return type(of)(*(None if x is None else x[..., part] for x in of))


class _Logits:
    """The logits of both models, a chunk of tokens at a time, in buffers that are used again.

    Of the n labelled tokens the second phase needs `rows`: the hardest ones, or all. As many of them as fit in
    `keep_bytes` are kept: in phase 1 a token that is among the hardest so far takes the place of one that is no longer.
    """

    def __init__(
        self, student: _Head, teacher: _Head, tokens: Tensor, rows: int, chunk_tokens: int | None, keep_bytes: int,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.tokens, self.rows = student, teacher, tokens, rows
        n, device = tokens.numel(), tokens.device
        bytes_s, bytes_t = (head.vocab * head.dtype.itemsize for head in (student, teacher))
        part_bytes = bytes_t + (bytes_s if student.softcap is not None else 0)
        self.chunk = chunk_tokens or _chunk_rule(CHUNK_BYTES.get(device.type, 2**30), bytes_s, part_bytes)
        self.part = -(-self.chunk // TEACHER_PART)
        self.differentiates = any(grad is not None for grad in student.gradients())
        graph = self.differentiates and isinstance(student, _ModuleHead)
        self.kept = 0 if graph else min(rows, keep_bytes // (bytes_s + bytes_t))
        self.replaces = self.kept > 0 and rows < n
        left = n - self.kept

        def rows_of(head: _Head, count: int) -> Tensor:
            return torch.empty(count, head.vocab, dtype=head.dtype, device=device)

        self.raw_s, self.z_t = rows_of(student, min(self.chunk, left)), rows_of(teacher, min(self.part, left))
        self.z_s = rows_of(student, min(self.part, n) if student.softcap is not None else 0)
        self.accumulation_dtype = reference.accumulation_dtype(self.raw_s, self.z_t)
        # One row more takes what is not kept, so that the number of rows that enter need not be known.
        spare = int(self.replaces)
        self.kept_s, self.kept_t = rows_of(student, self.kept + spare), rows_of(teacher, self.kept + spare)
        self.kept_tokens = torch.arange(self.kept + spare, device=device)

    def statistics(
        self, labels: Tensor, difficulty: str, with_ce: bool, finish: Callable[..., None] | None = None
    ) -> _Statistics:
        """Phase 1. `finish(stats, i, j, raw, z_s, z_t)` is called for tokens i to j when their statistics are there and
        leaves the gradient in `raw`, if any is asked for."""
        n, device, acc = labels.numel(), labels.device, self.accumulation_dtype
        differentiates = finish is not None and self.differentiates
        hard, ce = (torch.empty(n, dtype=acc, device=device) for _ in range(2))
        normalizers_1 = torch.empty(4, n, dtype=acc, device=device)
        stats = _Statistics(labels, hard, torch.empty(n, dtype=torch.bool, device=device), normalizers_1, ce)
        spans = _spans(0, self.kept, self.chunk), _spans(self.kept, n, self.chunk)
        for kept in (True, False):
            for a, b in spans[not kept]:
                raw = self.kept_s[a:b] if kept else self.raw_s[: b - a]
                self.student.raw(self.tokens[a:b], raw, graph=differentiates)
                for i, j in _spans(a, b, self.part):
                    z_t = self.kept_t[i:j] if kept else self.z_t[: j - i]
                    self.teacher.raw(self.tokens[i:j], z_t)
                    z_t = self.teacher.capped(z_t, z_t)
                    z_s = self.student.capped(raw[i - a : j - a], self.z_s[: j - i])
                    self._measure(stats, i, j, z_s, z_t, difficulty, with_ce)
                    if self.replaces and not kept:
                        self._keep_hardest(stats, i, j, raw[i - a : j - a], z_t)
                    if finish is not None:
                        finish(stats, i, j, raw[i - a : j - a], z_s, z_t)
                if differentiates:
                    self.student.fold(self.tokens[a:b], raw)
        return stats

    def at_once(
        self, labels: Tensor, difficulty: str, with_ce: bool, select: Callable[[Tensor, Tensor], _Selection],
        div: Divergence,
    ) -> tuple[_Statistics, Tensor]:  # fmt: skip
        """Both phases in one: `select(difficulty, valid)` of some tokens depends on no others."""
        result = torch.zeros(labels.numel(), dtype=self.accumulation_dtype, device=labels.device)

        def finish(stats: _Statistics, i: int, j: int, raw: Tensor, z_s: Tensor, z_t: Tensor) -> None:
            stats = _rows(stats, slice(i, j))
            result[i:j] = self._part_divergence(stats, select(stats.difficulty, stats.valid), raw, z_s, z_t, div)

        return self.statistics(labels, difficulty, with_ce, finish), result

    def _measure(
        self, stats: _Statistics, i: int, j: int, z_s: Tensor, z_t: Tensor, difficulty: str, with_ce: bool
    ) -> None:
        """The statistics of tokens i to j from their logits."""
        z_s, z_t, labels = z_s.unsqueeze(0), z_t.unsqueeze(0), stats.labels[i:j].unsqueeze(0)
        everywhere = torch.ones_like(labels, dtype=torch.bool)
        hard, valid, normalizers_1 = measure_difficulty(z_s, z_t, everywhere, labels, difficulty)
        if with_ce:
            stats.cross_entropy[i:j] = ops.token_cross_entropy(z_s, z_t, labels, valid, normalizers_1)[0]
        stats.difficulty[i:j], stats.valid[i:j] = hard[0], valid[0]
        stats.normalizers_1[:, i:j] = normalizers_1[:, 0]

    def _keep_hardest(self, stats: _Statistics, i: int, j: int, raw: Tensor, z_t: Tensor) -> None:
        """Let those of tokens i to j that are among the hardest of tokens 0 to j replace what is not."""
        hardest = torch.zeros_like(stats.valid)
        hardest[descending(stats.difficulty[:j], stats.valid[:j]).indices[: self.kept]] = True
        free = hardest[self.kept_tokens[:-1]].to(torch.uint8).argsort(stable=True)
        enters = hardest[i:j]
        slot = free[(enters.cumsum(0) - 1).clamp(0, self.kept - 1)].where(enters, self.kept)
        self.kept_s.index_copy_(0, slot, raw)
        self.kept_t.index_copy_(0, slot, z_t)
        self.kept_tokens.index_copy_(0, slot, torch.arange(i, j, device=slot.device))

    def divergence(self, stats: _Statistics, selection: _Selection, div: Divergence) -> Tensor:
        """Phase 2: D of the selected tokens, 0 elsewhere; the student's gradients if any is asked for."""
        n = stats.difficulty.numel()
        result = torch.zeros_like(stats.difficulty)
        for a, b in _spans(0, self.kept, self.chunk):
            of, raw, z_t = self.kept_tokens[a:b], self.kept_s[a:b], self.kept_t[a:b]
            self._chunk_divergence(of, raw, z_t, stats, selection, div, result)
        if self.rows < n:
            rest = descending(stats.difficulty, stats.valid).indices[self.kept : self.rows]
        else:
            rest = torch.arange(self.kept, n, device=result.device)
        for a, b in _spans(0, rest.numel(), self.chunk):
            raw = self.raw_s[: b - a]
            self.student.raw(self.tokens[rest[a:b]], raw, graph=self.differentiates)
            self._chunk_divergence(rest[a:b], raw, None, stats, selection, div, result)
        return result

    def _chunk_divergence(
        self, of: Tensor, raw: Tensor, kept_t: Tensor | None, stats: _Statistics, selection: _Selection,
        div: Divergence, result: Tensor,
    ) -> None:  # fmt: skip
        """D of the tokens `of` into `result`, and their gradient over `raw` and from there into the student's head."""
        for i, j in _spans(0, of.numel(), self.part):
            part = of[i:j]
            if kept_t is None:
                z_t = self.z_t[: j - i]
                self.teacher.raw(self.tokens[part], z_t)
                z_t = self.teacher.capped(z_t, z_t)
            else:
                z_t = kept_t[i:j]
            z_s = self.student.capped(raw[i:j], self.z_s[: j - i])
            d = self._part_divergence(_rows(stats, part), _rows(selection, part), raw[i:j], z_s, z_t, div)
            result.index_copy_(0, part, d)
        if self.differentiates:
            self.student.fold(self.tokens[of], raw)

    def _part_divergence(
        self, stats: _Statistics, selection: _Selection, raw: Tensor, z_s: Tensor, z_t: Tensor, div: Divergence
    ) -> Tensor:
        """D of some tokens, and the gradient of their raw logits over these."""
        values = [None if x is None else x.unsqueeze(-2) for x in (*selection, *stats)]
        tau, selected, weight, weight_ce, labels, _, _, normalizers_1, cross_entropy = values
        assert weight is not None and cross_entropy is not None
        z_s, z_t, args = z_s.unsqueeze(0), z_t.unsqueeze(0), (div.name, *div.parameters)
        d, *saved = ops.token_divergence(z_s, z_t, tau, selected, *args)
        if self.differentiates:
            ce: tuple[Tensor | None, ...] = (None,) * 3
            if weight_ce is not None:
                weight, weight_ce = loud_weights(weight, weight_ce, cross_entropy)
                ce = (labels, weight_ce, normalizers_1)
            ops.token_divergence_backward_(z_s, z_t, tau, weight, *saved, *ce, *args)
            if self.student.softcap is not None:
                torch.ops.aten.tanh_backward(z_s[0], raw, grad_input=raw)
        divergence: Tensor = d[0]
        return divergence


def _chunk_rule(budget: int, bytes_s: int, part_bytes: int) -> int:
    """Rows of the student's logits that fit in the budget with the buffers of a part: a multiple of 64, 64 at least."""
    rows = int(budget / (bytes_s + part_bytes / TEACHER_PART))
    return max(64, rows // 64 * 64)


def _check_head(side: str, hidden: Tensor, weight: Any, bias: Any) -> None:
    """Refuse a head that does not fit its hidden states, or that belongs to the teacher and requires grad."""
    name, size = f"{side}_weight", hidden.shape[-1]
    if not isinstance(weight, Tensor):
        if side == "student" and not isinstance(weight, nn.Module):
            raise TypeError(
                f"{name} must be a (V, H) tensor or an nn.Module, whose parameters get gradients, "
                f"got {type(weight).__name__}"
            )
        if not callable(weight):
            raise TypeError(f"{name} must be a (V, H) tensor or a callable, got {type(weight).__name__}")
        if bias is not None:
            raise ValueError(f"{side}_bias must be None where {name} is no tensor: the head adds its own")
        return
    autocast = torch.is_autocast_enabled(hidden.device.type)
    check_floating(name, weight)
    if weight.dim() != 2 or weight.shape[1] != size or weight.numel() == 0:
        raise ValueError(f"{name} must be (V, {size}), H as {side}_hidden has it, got shape {tuple(weight.shape)}")
    for part, value in ((name, weight), (f"{side}_bias", bias)):
        if value is None:
            continue
        check_floating(part, value)
        if part != name and value.shape != weight.shape[:1]:
            raise ValueError(f"{part} must be ({weight.shape[0]},), V as {name} has it, got shape {tuple(value.shape)}")
        if value.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"{part} must be {hidden.dtype} as {side}_hidden is, got {value.dtype}; cast one of them or use "
                "torch.autocast"
            )
        check_device(part, value, hidden)
        if side == "teacher":
            check_constant(part, value)


def _check_head_options(
    student_softcap: Any, teacher_softcap: Any, student_scale: Any, teacher_scale: Any, chunk_tokens: Any,
    keep_bytes: Any,
) -> None:  # fmt: skip
    """Refuse what follows a head, or sets its chunks, outside its range."""
    for side, scale, softcap in (
        ("student", student_scale, student_softcap),
        ("teacher", teacher_scale, teacher_softcap),
    ):
        check_range(f"{side}_scale", scale, 0.0, float("inf"), "a finite number > 0", low_open=True, high_open=True)
        if softcap is not None:
            check_range(f"{side}_softcap", softcap, 0.0, float("inf"), "None or > 0", low_open=True, high_open=True)
    if chunk_tokens is not None:
        check_integer("chunk_tokens", chunk_tokens, least=1)
    check_integer("keep_bytes", keep_bytes, least=0)
