"""Hidden states and heads for the tests of the linear route, and what they watch it with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adakd_kernels import AdaKDOutput, adakd_loss, linear_adakd_loss, ops

from .cases import logits, tokens

EXACT = {"rtol": 1e-9, "atol": 1e-13}
V, V_T = 61, 67
AT_ONCE = {"temperature_scale": 0.0}
"""Every token is selected at one temperature: one phase instead of two."""
ROW = (V + V) * 8
"""Bytes of one token's logits of both models over the common vocabulary, in fp64."""


class Case:
    """Hidden states and heads of two models, differentiable on the student's side, and labels with some ignored."""

    def __init__(self, dtype: torch.dtype = torch.float64, bias: bool = True, vocab: int = V, vocab_t: int = V_T):
        def leaf(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
            return logits(*shape, dtype=dtype, seed=seed, scale=scale, grad=True)

        self.hidden, self.weight = leaf(3, 7, 12, seed=1), leaf(vocab, 12, seed=2, scale=0.7)
        self.bias = leaf(vocab, seed=3) if bias else None
        self.hidden_t = logits(3, 7, 5, dtype=dtype, seed=4, scale=1.0)
        self.weight_t = logits(vocab_t, 5, dtype=dtype, seed=5, scale=1.0)
        self.bias_t = logits(vocab_t, dtype=dtype, seed=6, scale=1.0) if bias else None
        self.labels = tokens(min(vocab, vocab_t), 3, 7, seed=7)
        self.labels[0, :3], self.labels[2, 4] = -100, -100

    def double(self) -> Case:
        """The same numbers in fp64."""
        other = Case()
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.detach().double().requires_grad_(value.requires_grad)
            setattr(other, name, value)
        return other

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def from_hidden(self, **options: Any) -> AdaKDOutput:
        given = {"student_bias": self.bias, "teacher_bias": self.bias_t, "chunk_tokens": 5, **options}
        return linear_adakd_loss(self.hidden, self.weight, self.hidden_t, self.weight_t, self.labels, **given)

    def logits(self, **options: Any) -> tuple[Tensor, Tensor]:
        """The logits of both models, made as a model makes them."""

        def made(hidden: Tensor, weight: Tensor, bias: Tensor | None, side: str) -> Tensor:
            x = F.linear(hidden, weight, bias) * options.get(f"{side}_scale", 1.0)
            cap = options.get(f"{side}_softcap")
            return x if cap is None else torch.tanh(x / cap) * cap

        return (
            made(self.hidden, self.weight, self.bias, "student"),
            made(self.hidden_t, self.weight_t, self.bias_t, "teacher"),
        )

    def from_logits(self, **options: Any) -> AdaKDOutput:
        """`adakd_loss` of those logits."""
        names = ("divergence", "focus_ratio", "temperature_scale", "base_temperature", "difficulty", "ce_weight",
                 "num_items", "ignore_index", "shift", "choice")  # fmt: skip
        own = {name: options[name] for name in names if name in options}
        return adakd_loss(*self.logits(**options), self.labels, **own)


class LoRAHead(nn.Module):
    """A frozen weight and a low-rank change to it."""

    def __init__(self, weight: Tensor, rank: int = 2):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.down = nn.Parameter(logits(rank, weight.shape[1], dtype=weight.dtype, seed=11, scale=1.0))
        self.up = nn.Parameter(logits(weight.shape[0], rank, dtype=weight.dtype, seed=12, scale=1.0))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight) + F.linear(F.linear(hidden, self.down), self.up)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Calls(TorchDispatchMode):
    """Names of the operators that ran, and the (type, shape) of every tensor that they made."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.made: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        given = {memory(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        for result in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(result, Tensor) and memory(result) not in given:
                self.made.append((result.dtype, tuple(result.shape)))
        return out

    def waits(self) -> int:
        return sum(
            name.split(".")[1] in ("nonzero", "_local_scalar_dense", "item", "is_nonzero") for name in self.names
        )


def without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the operators by something that waits and allocates for nothing."""

    def bundled(student, *args):
        number = student[..., 0].abs().to(torch.promote_types(student.dtype, torch.float32)) + 1.0
        return number, number.expand(4, *number.shape)

    monkeypatch.setattr(ops, "token_stats", bundled)
    monkeypatch.setattr(ops, "token_divergence", bundled)
    monkeypatch.setattr(ops, "token_divergence_backward_", lambda student, *args: student.mul_(0.5))
    monkeypatch.setattr(ops, "token_divergence_with_gradient_", lambda student, *args: bundled(student.mul_(0.5)))
