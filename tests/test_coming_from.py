"""docs/coming-from.md: the old calls and the new ones give the same numbers and gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adakd_kernels import JensenShannon, SkewForwardKL, SkewReverseKL, adakd_loss, linear_adakd_loss

pytestmark = pytest.mark.fast

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
OFF: dict[str, Any] = {"focus_ratio": 1.0, "temperature_scale": 0.0}
N, V, H = 12, 50, 16
generator = torch.Generator().manual_seed(0)
S, T = (2.0 * torch.randn(2, N, V, dtype=torch.float64, generator=generator) for _ in range(2))
LABELS = torch.randint(V, (2, N), generator=generator).masked_fill(
    torch.rand(2, N, generator=generator) < 0.3, -100
)  # fmt: skip
VALID = LABELS != -100


def rows(line_starts_with: str) -> list[str]:
    return [line for line in PAGE.splitlines() if line.startswith(f"| {line_starts_with}")]


def with_gradient(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    leaf = S.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def check(old: Callable[[Tensor], Tensor], new: Callable[[Tensor], Tensor], factor: float = 1.0) -> None:
    """`new` is `factor` times `old`, and so is its gradient."""
    (expected, of_old), (found, of_new) = with_gradient(old), with_gradient(new)
    torch.testing.assert_close(found, factor * expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_new, factor * of_old, rtol=1e-7, atol=1e-12)


def ours(divergence: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda s: adakd_loss(s, T, LABELS, divergence=divergence, **OFF, **options).loss


def test_every_line_of_the_page_has_its_test():
    lines = [line for line in PAGE.splitlines() if re.match(r"\| (TRL|Liger|DistiLLM)", line)]
    assert len(lines) == 9 == len(rows("TRL")) + len(rows("Liger")) + len(rows("DistiLLM"))


def test_trl():
    pytest.importorskip("trl", reason="trl is not installed: pip install 'adakd-kernels[trl]'")
    from trl.experimental.gkd import GKDTrainer

    def old(**options: Any) -> Callable[[Tensor], Tensor]:
        return lambda s: GKDTrainer.generalized_jsd_loss(s, T, LABELS, **options)

    check(old(beta=0.1, temperature=2.0), ours(JensenShannon(0.1), base_temperature=2.0), factor=4.0)
    check(old(beta=0.5), ours(JensenShannon(0.5)))
    check(old(beta=0), ours("forward_kl"))
    check(old(beta=1), ours("reverse_kl"))
    check(old(beta=0.3, num_items_in_batch=40), ours(JensenShannon(0.3), num_items=40))


@pytest.mark.parametrize("hard", [0.0, 0.25])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger(hard, temperature):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install liger-kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden = [torch.randn(2 * N, H, dtype=torch.float64, generator=generator) for _ in range(2)]
    heads = [torch.randn(V, H, dtype=torch.float64, generator=generator) for _ in range(2)]
    old, new = (hidden[0].clone().requires_grad_() for _ in range(2))
    labels = LABELS.flatten()
    liger = LigerFusedLinearJSDLoss(hard, 1.0 - hard, beta=0.1, temperature=temperature, compiled=False)
    expected = liger(old, heads[0], hidden[1], heads[1], labels)
    found = linear_adakd_loss(
        new, heads[0], hidden[1], heads[1], labels, divergence=JensenShannon(0.1), base_temperature=temperature,
        ce_weight=hard, **OFF,
    ).loss  # fmt: skip
    expected.backward()
    found.backward()
    if temperature == 1.0 or hard == 0.0:
        torch.testing.assert_close(found, temperature**2 * expected.double(), rtol=1e-6, atol=0.0)
        torch.testing.assert_close(new.grad, temperature**2 * old.grad, rtol=1e-5, atol=1e-9)
    else:
        assert abs(found - expected) > 0.1 * expected


def mean_over_valid(values: Tensor) -> Tensor:
    return values[VALID].mean()


def of_distillm(name: str, lam: float) -> Callable[[Tensor], Tensor]:
    """The sums over the vocabulary in the losses of DistiLLM's code, which AdaKD's code has too."""

    def loss(s: Tensor) -> Tensor:
        p, q, log_p, log_q = T.softmax(-1), s.softmax(-1), T.log_softmax(-1), s.log_softmax(-1)
        own = {
            "forward_kl": lambda: -(p * log_q).sum(-1),
            "reverse_kl": lambda: (q * (log_q - log_p)).sum(-1),
            "skewed_forward_kl": lambda: -(p * (lam * p + (1 - lam) * q).log()).sum(-1),
            "skewed_reverse_kl": lambda: (q * (log_q - ((1 - lam) * p + lam * q).log())).sum(-1),
        }
        if name == "js_distance":
            m = ((1 - lam) * p + lam * q).log()
            return mean_over_valid(lam * (q * (log_q - m)).sum(-1) + (1 - lam) * (p * (log_p - m)).sum(-1))
        return mean_over_valid(own[name]())

    return loss


@pytest.mark.parametrize(
    "name, divergence, constant",
    [("forward_kl", "forward_kl", True), ("reverse_kl", "reverse_kl", False),
     ("skewed_forward_kl", SkewForwardKL(alpha=0.1), True), ("skewed_reverse_kl", SkewReverseKL(alpha=0.1), False),
     ("js_distance", JensenShannon(beta=0.9), False)],
)  # fmt: skip
def test_distillm_and_the_code_of_adakd(name, divergence, constant):
    entropy = mean_over_valid(-(T.softmax(-1) * T.log_softmax(-1)).sum(-1)) if constant else 0.0
    check(lambda s: of_distillm(name, 0.1)(s) - entropy, ours(divergence))
    assert f"`{name}(" in PAGE
