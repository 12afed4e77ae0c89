"""docs/coming-from.md: the calls of its lines, as they stand there, give the numbers and gradients that it says."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import adakd_kernels
from adakd_kernels import adakd_loss, linear_adakd_loss

pytestmark = pytest.mark.fast

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
LINES = re.findall(r"^\| (.*?) \| `([^`]+)` \| `([^`]+)` \| (.*?) \|$", PAGE, re.MULTILINE)
OFF: dict[str, float] = eval(f"dict({re.search('AdaKD is off: `(.*?)`', PAGE)[1]})")
N, V, H = 24, 50, 16
Value = tuple[Tensor, Tensor]
"""A loss and its gradient."""


def losses_of_distillm() -> dict[str, Callable[..., Tensor]]:
    """As DistiLLM's code has them, and AdaKD's: sums over the vocabulary, averaged over the tokens with a label."""

    def loss(summand: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of_logits(s: Tensor, t: Tensor, batch: dict[str, Tensor], lam: float = 0.0) -> Tensor:
            p, q, log_p, log_q = t.softmax(-1), s.softmax(-1), t.log_softmax(-1), s.log_softmax(-1)
            return summand(p, q, log_p, log_q, lam).sum(-1)[batch["label"] != -100].mean()

        return of_logits

    def js(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, lam: float) -> Tensor:
        m = ((1 - lam) * p + lam * q).log()
        return lam * q * (log_q - m) + (1 - lam) * p * (log_p - m)

    return {
        "forward_kl": loss(lambda p, q, log_p, log_q, lam: -p * log_q),
        "reverse_kl": loss(lambda p, q, log_p, log_q, lam: q * (log_q - log_p)),
        "skewed_forward_kl": loss(lambda p, q, log_p, log_q, lam: -p * (lam * p + (1 - lam) * q).log()),
        "skewed_reverse_kl": loss(lambda p, q, log_p, log_q, lam: q * (log_q - ((1 - lam) * p + lam * q).log())),
        "js_distance": loss(js),
    }


@pytest.fixture
def names() -> dict[str, Any]:
    """What stands in the calls of the page."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(V, (N,), generator=generator).masked_fill(torch.rand(N, generator=generator) < 0.3, -100)
    found: dict[str, Any] = {"β": 0.1, "T": 2.0, "λ": 0.1, "n": 40, "a": 0.25, "labels": labels}
    found |= {"s": 2.0 * normal(N, V), "t": 2.0 * normal(N, V), "batch": {"label": labels}}
    found |= {"hs": normal(N, H), "Ws": normal(V, H), "ht": normal(N, H), "Wt": normal(V, H)}
    found |= losses_of_distillm()
    for name in adakd_kernels.__all__:
        found[name] = getattr(adakd_kernels, name)
    for function in (adakd_loss, linear_adakd_loss):
        found[function.__name__] = lambda *args, of=function, **options: of(*args, **OFF, **options).loss
    return found


def value(call: str, names: dict[str, Any]) -> Value:
    """With the gradient of the student's logits or hidden states."""
    student = "hs" if "hs" in call else "s"
    leaf = names[student].clone().requires_grad_()
    loss = eval(call, {**names, student: leaf})
    loss.backward()
    return loss.detach().double(), leaf.grad


def equal(old: Value, new: Value, names: dict[str, Any], factor: float = 1.0, less: float | Tensor = 0.0) -> None:
    rounding = 1e-5 if new[1].shape[-1] == H else 1e-9  # Liger's own is that of fp32
    torch.testing.assert_close(new[0], factor * old[0] - less, rtol=rounding, atol=1e-12)
    torch.testing.assert_close(new[1], factor * old[1], rtol=10 * rounding, atol=rounding)


def squared(old: Value, new: Value, names: dict[str, Any]) -> None:
    equal(old, new, names, factor=names["T"] ** 2)


def less_by_the_entropy(old: Value, new: Value, names: dict[str, Any]) -> None:
    t = names["t"][names["labels"] != -100]
    equal(old, new, names, less=-(t.softmax(-1) * t.log_softmax(-1)).sum(-1).mean())


def as_liger(old: Value, new: Value, names: dict[str, Any]) -> None:
    (_, old_call, new_call, _) = next(line for line in LINES if line[0].startswith("Liger"))
    at_1 = {**names, "T": 1.0}
    equal(value(old_call, at_1), value(new_call, at_1), names)
    soft = value(old_call, {**names, "a": 0.0})
    hard = value("cross_entropy(hs @ Ws.T, labels)", {**names, "cross_entropy": F.cross_entropy})
    a, factor = names["a"], names["T"] ** 2
    equal(tuple((1 - a) * factor * x + a * y for x, y in zip(soft, hard, strict=True)), new, names)
    assert abs(new[0] - old[0]) > 0.1 * old[0]


SAYS: dict[str, Callable[[Value, Value, dict[str, Any]], None]] = {
    "equal": equal,
    "T² times the old one": squared,
    "less by the teacher's entropy, a constant": less_by_the_entropy,
    "equal at T = 1; else the divergence is T² times the old one, and the cross-entropy is taken at temperature 1": (
        as_liger
    ),
}
"""What a line says of the new number, and how that is checked."""


def test_every_line_of_the_page_is_run():
    assert len(LINES) == len(re.findall(r"^\|", PAGE, re.MULTILINE)) - 2 >= 10  # without the head of the table
    assert {name for name, *_ in LINES} >= {"TRL, `GKDTrainer`", "Liger, from hidden states", "DistiLLM, AdaKD's code"}


@pytest.mark.parametrize("old, new, says", [line[1:] for line in LINES], ids=[line[1] for line in LINES])
def test_a_line_gives_what_it_says(old, new, says, names):
    function = old.split("(")[0]
    if function not in names:
        (place,) = re.findall(rf"`([\w.]+\.{function})`", PAGE)
        pytest.importorskip(place.split(".")[0], reason=f"{place} is not installed")
        names[function] = pkgutil.resolve_name(place)
        if function.startswith("Liger"):
            names[function] = partial(names[function], compiled=False)
    SAYS[says](value(old, names), value(new, names), names)
