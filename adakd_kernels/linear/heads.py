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
        d_hidden: gradient of the hidden states, (tokens, H), or None where none is asked for.
        needs_graph: whether `fold` differentiates a graph that `raw_logits` has to record.
    """

    inputs: list[Tensor | None]
    d_hidden: Tensor | None = None
    needs_graph = False

    def __init__(self, hidden: Tensor, scale: float, softcap: float | None, vocab: int, dtype: torch.dtype) -> None:
        self.hidden = hidden.flatten(0, -2)  # (tokens, H)
        self.scale, self.softcap, self.vocab, self.dtype = scale, softcap, vocab, dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of the logits of one token."""
        return self.vocab * self.dtype.itemsize

    @property
    def differentiates(self) -> bool:
        """Whether any gradient is asked for."""
        return any(grad is not None for grad in self.gradients())

    def empty_rows(self, rows: int) -> Tensor:
        """Memory for the logits of so many tokens."""
        return torch.empty(rows, self.vocab, dtype=self.dtype, device=self.hidden.device)

    def raw_logits(self, index: Tensor, out: Tensor, *, graph: bool = False) -> None:
        """Raw logits of the tokens at `index` into `out` (rows, V); `graph` for a call that `fold` follows."""
        self.product(self.hidden.index_select(0, index), out, graph)
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

    def fold(self, index: Tensor, grad: Tensor) -> None:
        """Add to the gradients what follows from `grad` (rows, V), the gradient over x of the tokens at `index`."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor | None]:
        """The gradients of `inputs`, but for the factor `scale`; None for what does not require grad."""
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
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        acc = reference.accumulation_dtype(hidden)
        self.wide = summed and self.dtype != acc
        self.d_hidden = self.d_weight = self.d_bias = None
        if differentiable and hidden.requires_grad:
            self.d_hidden = torch.zeros_like(self.hidden, dtype=acc if summed else None)
        if differentiable and weight.requires_grad:
            self.d_weight = torch.zeros_like(self.weight, dtype=acc)
        if differentiable and bias is not None and bias.requires_grad:
            self.d_bias = torch.zeros(vocab, dtype=acc, device=bias.device)

    def product(self, hidden: Tensor, out: Tensor, graph: bool) -> None:
        if self.bias is None:
            torch.mm(hidden.to(self.dtype), self.weight.T, out=out)
        else:
            torch.addmm(self.bias, hidden.to(self.dtype), self.weight.T, out=out)

    def fold(self, index: Tensor, grad: Tensor) -> None:
        if self.d_hidden is not None:
            part = self._wide_product(grad) if self.wide else torch.mm(grad, self.weight)
            self.d_hidden.index_copy_(0, index, part.to(self.d_hidden.dtype))
        if self.d_bias is not None:
            # In blocks, because the sum casts its input to the accumulation type.
            for cols in blocks(self.weight):
                self.d_bias[cols] += grad[:, cols].sum(0, dtype=self.d_bias.dtype)
        if self.d_weight is not None:
            hidden = self.hidden.index_select(0, index).to(self.dtype)
            # In blocks, because the product of a chunk is as large as the weight.
            for rows in blocks(self.weight):
                part = self.d_weight[rows]
                if self.dtype == torch.bfloat16:
                    part += torch.mm(grad[:, rows].T, hidden)
                else:  # in fp16 the sum over a chunk could overflow
                    part.addmm_(grad[:, rows].T.to(part.dtype), hidden.to(part.dtype))

    def _wide_product(self, grad: Tensor) -> Tensor:
        """grad·W, not rounded to their type: parts that ranks add up may cancel, and their sum is what is rounded."""
        acc = reference.accumulation_dtype(grad)
        if grad.is_cuda:
            return torch.mm(grad, self.weight, out_dtype=acc)
        total = torch.zeros(len(grad), self.weight.shape[1], dtype=acc, device=grad.device)
        for rows in blocks(self.weight):
            total.addmm_(grad[:, rows].to(acc), self.weight[rows].to(acc))
        return total

    def gradients(self) -> list[Tensor | None]:
        return [self.d_hidden, self.d_weight, self.d_bias]


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
        self.d_hidden = torch.zeros_like(self.hidden) if differentiable and hidden.requires_grad else None
        self.d_parameters = [torch.zeros_like(p, dtype=reference.accumulation_dtype(p)) for p in self.parameters]
        self.needs_graph = self.differentiates

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

    def product(self, hidden: Tensor, out: Tensor, graph: bool) -> None:
        with torch.set_grad_enabled(graph):
            self.leaf = hidden.requires_grad_(graph and self.d_hidden is not None)
            self.result = self._call(self.leaf)
        out.copy_(self.result)
        if not graph:
            del self.leaf, self.result

    def fold(self, index: Tensor, grad: Tensor) -> None:
        inputs = ([] if self.d_hidden is None else [self.leaf]) + self.parameters
        with without_hooks(self.parameters):
            grads = torch.autograd.grad(self.result, inputs, grad.to(self.result.dtype), allow_unused=True)
        del self.leaf, self.result
        if self.d_hidden is not None:
            if grads[0] is not None:
                self.d_hidden.index_copy_(0, index, grads[0])
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
