"""The heads of both models: logits of some tokens from hidden states, and the gradients that follow from theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..checks import is_dtensor
from ..vocab_parallel import VocabParallel

StudentHead = Tensor | nn.Module
TeacherHead = Tensor | Callable[[Tensor], Tensor]

BLOCK_BYTES = {"cpu": 2**20}
"""Bytes of the part of a weight's gradient that is computed at a time, by device type; 128 MiB for others."""


def spans(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """The range as (start, stop) of parts of `step`; the last one may be shorter."""
    return [(a, min(a + step, stop)) for a in range(start, stop, step)]


def blocks(tensor: Tensor) -> list[slice]:
    """The first dimension in parts of `BLOCK_BYTES`."""
    row_bytes = max(1, math.prod(tensor.shape[1:])) * tensor.element_size()
    step = max(1, BLOCK_BYTES.get(tensor.device.type, 2**27) // row_bytes)
    return [slice(a, b) for a, b in spans(0, tensor.shape[0], step)]


class Head:
    """One model: its hidden states, its head, and the scale and soft-cap that follow the head.

    Logits are z = cap·tanh(x/cap) of x = scale·head(h). *Raw* logits are tanh(x/cap), or x where there is no cap.

    Attributes:
        inputs: the student's tensors that may require grad, in the order of `gradients()`.
        vocab: entries of a row of logits.
        dtype: type of the logits.
        differentiates: whether any gradient is asked for.
        positions: the tokens that are folded, in this order; None where no gradient is asked for.
        d_hidden: gradient of the hidden states of these tokens, (rows, H), or None where none is asked for.
        needs_graph: whether `fold` differentiates a graph that `raw_logits` has to record.
    """

    inputs: list[Tensor | None]
    differentiates = False
    positions: Tensor | None = None
    d_hidden: Tensor | None = None
    needs_graph = False

    def __init__(self, hidden: Tensor, scale: float, softcap: float | None, vocab: int, dtype: torch.dtype) -> None:
        self.hidden = hidden.flatten(0, -2)  # (tokens, H)
        self.scale, self.softcap, self.vocab, self.dtype = scale, softcap, vocab, dtype
        self.folded = 0  # rows so far

    @property
    def row_bytes(self) -> int:
        """Bytes of the logits of one token."""
        return self.vocab * self.dtype.itemsize

    def empty_rows(self, rows: int) -> Tensor:
        """Memory for the logits of so many tokens."""
        return torch.empty(rows, self.vocab, dtype=self.dtype, device=self.hidden.device)

    def rows(self, index: Tensor) -> Tensor:
        """The hidden states of the tokens at `index`, (rows, H)."""
        return self.hidden.index_select(0, index)

    def raw_logits(self, hidden: Tensor, out: Tensor, *, graph: bool = False) -> None:
        """Raw logits of hidden states (rows, H) into `out` (rows, V); `graph` for a call that `fold` follows."""
        self.product(hidden, out, graph)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_()

    def capped(self, raw: Tensor, out: Tensor) -> Tensor:
        """Logits from raw ones; in `out`, which may be `raw`, where there is a cap."""
        return raw if self.softcap is None else torch.mul(raw, self.softcap, out=out)

    def product(self, hidden: Tensor, out: Tensor, graph: bool) -> None:
        """The head of hidden states (rows, H) into `out` (rows, V)."""
        raise NotImplementedError

    def expect(self, positions: Tensor) -> None:
        """Which tokens are folded, in this order. Nothing is folded without it."""
        raise NotImplementedError

    def fold(self, hidden: Tensor, grad: Tensor) -> None:
        """Add to the gradients what follows from `grad` (rows, V), the gradient over x of the next tokens."""
        raise NotImplementedError

    def next_rows(self, rows: int) -> slice:
        """Where the next so many tokens are among those that are folded."""
        self.folded += rows
        return slice(self.folded - rows, self.folded)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of `inputs`, but for the factor `scale`; None for what does not require grad.

        The first is `d_hidden`, of the tokens at `positions`; the hidden states of the others have gradient 0.
        """
        raise NotImplementedError


class WeightHead(Head):
    """A head that is a weight (V, H) and perhaps a bias (V,)."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, vocab: int,
        differentiable: bool, summed: bool,
    ) -> None:  # fmt: skip
        super().__init__(hidden, scale, softcap, vocab, _compute_dtype(hidden))
        self.inputs = [hidden, weight, bias]
        self.weight = weight[:vocab].to(self.dtype)
        self.columns = self.weight.T
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        self.acc = reference.accumulation_dtype(hidden)
        self.wide = summed and self.dtype != self.acc
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None
        self.ones: Tensor | None = None
        self.wants = [differentiable and x is not None and x.requires_grad for x in self.inputs]
        self.differentiates = any(self.wants)

    def expect(self, positions: Tensor) -> None:
        self.positions, rows = positions, len(positions)
        of_hidden, of_weight, of_bias = self.wants
        if of_hidden:
            dtype = self.acc if self.wide else self.dtype
            self.d_hidden = torch.empty(rows, self.hidden.shape[1], dtype=dtype, device=positions.device)
        if of_weight:
            self.d_weight = torch.empty(self.weight.shape, dtype=self.acc, device=positions.device)
        if of_bias:
            self.d_bias = torch.empty(self.vocab, dtype=self.acc, device=positions.device)
            if self.dtype != torch.bfloat16:
                self.ones = torch.ones(rows, dtype=self.acc, device=positions.device)

    def product(self, hidden: Tensor, out: Tensor, graph: bool) -> None:
        if self.bias is None:
            torch.mm(hidden.to(self.dtype), self.columns, out=out)
        else:
            torch.addmm(self.bias, hidden.to(self.dtype), self.columns, out=out)

    def fold(self, hidden: Tensor, grad: Tensor) -> None:
        rows = self.next_rows(len(grad))
        first = rows.start == 0
        if self.d_hidden is not None:
            part = self.d_hidden[rows]
            if self.wide:
                self._wide_product(grad, part)
            else:
                torch.mm(grad, self.weight, out=part)
        if self.d_weight is None and self.d_bias is None:
            return
        # In fp16 the sum over a chunk could overflow.
        type_ = self.dtype if self.dtype == torch.bfloat16 else self.acc
        hidden = hidden.to(self.dtype).to(type_)
        # In blocks, because the product of a chunk is as large as the weight, and so is the gradient in another type.
        for block in blocks(self.weight):
            of_block = grad[:, block].T.to(type_)
            if self.d_weight is not None:
                add_product(self.d_weight[block], of_block, hidden, first)
            if self.d_bias is not None:
                add_row_sums(self.d_bias[block], of_block, None if self.ones is None else self.ones[rows], first)
            del of_block  # before the next one is made

    def _wide_product(self, grad: Tensor, out: Tensor) -> None:
        """grad·W, not rounded to their type: parts that ranks add up may cancel, and their sum is what is rounded."""
        if grad.is_cuda:
            out.copy_(torch.mm(grad, self.weight, out_dtype=self.acc))
            return
        out.zero_()
        for rows in blocks(self.weight):
            out.addmm_(grad[:, rows].to(self.acc), self.weight[rows].to(self.acc))

    def gradients(self) -> list[Tensor | None]:
        if self.folded == 0:
            for total in (self.d_weight, self.d_bias):
                if total is not None:
                    total.zero_()
        return [self.d_hidden, self.d_weight, self.d_bias]


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a·b to the total; the `first` one takes the place of what was there."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total += torch.mm(a, b)


def add_row_sums(total: Tensor, a: Tensor, ones: Tensor | None, first: bool) -> None:
    """Add the sums over the rows of `a` to the total, as a product with `ones` where their types are alike."""
    if ones is not None:
        total.addmv_(a, ones, beta=0 if first else 1)
    elif first:
        torch.sum(a, 1, dtype=total.dtype, out=total)
    else:
        total += a.sum(1, dtype=total.dtype)


class ModuleHead(Head):
    """A head that is called; autograd differentiates it, chunk by chunk."""

    def __init__(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], scale: float, softcap: float | None,
        differentiable: bool,
    ) -> None:  # fmt: skip
        self.head = head
        self.autocast = torch.is_autocast_enabled(hidden.device.type)
        # Only a call tells which vocabulary and type the module has.
        one = self._call(hidden.new_zeros(1, hidden.shape[-1]))
        super().__init__(hidden, scale, softcap, one.shape[-1], one.dtype)
        self.spread = is_dtensor(one)
        self.parameters: list[Tensor] = []
        if differentiable and isinstance(head, nn.Module):
            self.parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        self.inputs = [hidden, *self.parameters]
        self.wants_hidden = differentiable and hidden.requires_grad
        self.d_parameters = [torch.zeros_like(p, dtype=reference.accumulation_dtype(p)) for p in self.parameters]
        self.needs_graph = self.differentiates = self.wants_hidden or bool(self.parameters)

    def check_logits(self, name: str, split: bool) -> None:
        """Refuse a module that gives DTensors, or columns of its split weight where no vocabulary is `split`."""
        weight: Any = getattr(self.head, "weight", None)
        if self.spread or (is_dtensor(weight) and len(weight) != self.vocab and not split):
            raise TypeError(
                f"{name} must give plain logits of the whole vocabulary, or of vocab_parallel's columns, got a module "
                "whose logits are split over ranks: pass its weight, a DTensor, in its place"
            )

    def _call(self, hidden: Tensor) -> Tensor:
        """The module's logits, under the autocast of the caller, which is off around the phases."""
        with torch.autocast(hidden.device.type, enabled=self.autocast):
            return self.head(hidden)

    def expect(self, positions: Tensor) -> None:
        self.positions = positions
        if self.wants_hidden:
            self.d_hidden = self.hidden.new_empty(len(positions), self.hidden.shape[1])

    def product(self, hidden: Tensor, out: Tensor, graph: bool) -> None:
        with torch.set_grad_enabled(graph):
            self.leaf = hidden.requires_grad_(graph and self.d_hidden is not None)
            self.result = self._call(self.leaf)
        out.copy_(self.result)
        if not graph:
            del self.leaf, self.result

    def fold(self, hidden: Tensor, grad: Tensor) -> None:
        rows = self.next_rows(len(grad))
        inputs = ([] if self.d_hidden is None else [self.leaf]) + self.parameters
        with without_hooks(self.parameters):
            grads = torch.autograd.grad(self.result, inputs, grad.to(self.result.dtype), allow_unused=True)
        del self.leaf, self.result
        if self.d_hidden is not None:
            if grads[0] is None:
                self.d_hidden[rows] = 0
            else:
                self.d_hidden[rows] = grads[0]
            grads = grads[1:]
        for total, part in zip(self.d_parameters, grads, strict=True):
            if part is not None:
                total += part

    def gradients(self) -> list[Tensor | None]:
        return [self.d_hidden, *self.d_parameters]


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Takes the hooks off the parameters: the backward of the loss calls them, once, with the whole gradient."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, kept in hooks:
            registered.update(kept)


class HeadInput(NamedTuple):
    """What a head is made of."""

    hidden: Tensor  # (B, L, H) or (N, H)
    weight: TeacherHead  # (V, H), or a callable; a module on the student's side
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None

    def head(self, vocab: int, *, differentiable: bool = False, summed: bool = False) -> Head:
        """The head that a weight, of which the first `vocab` rows are used, or a callable stands for."""
        after = self.scale, self.softcap
        if isinstance(self.weight, Tensor):
            return WeightHead(self.hidden, self.weight, self.bias, *after, vocab, differentiable, summed)
        return ModuleHead(self.hidden, self.weight, *after, differentiable)


def make_heads(
    student: HeadInput, teacher: HeadInput, *, shards: VocabParallel | None = None, differentiable: bool = False,
    summed: bool = False,
) -> tuple[Head, Head]:  # fmt: skip
    """Both heads, without the rows of a weight whose entries are not common, and gradients of the student's.

    That of the hidden states by a weight is in the accumulation type where it is to be `summed` over the ranks.
    """
    rows = [len(side.weight) for side in (student, teacher) if isinstance(side.weight, Tensor)]
    vocab = min(rows, default=0)
    if shards is not None and rows:
        vocab = shards.common(rows[0], rows[-1], "weight")
    heads = student.head(vocab, differentiable=differentiable, summed=summed), teacher.head(vocab)
    for name, head in zip(("student_weight", "teacher_weight"), heads, strict=True):
        if isinstance(head, ModuleHead):
            head.check_logits(name, shards is not None)
    return heads


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The type of the products: autocast's where it is on, but fp64 stays."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype
