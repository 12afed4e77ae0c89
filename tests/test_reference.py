"""The reference itself: closed forms in plain Python, and equation (10) against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from adakd_kernels import reference
from adakd_kernels.divergences import DIVERGENCES as REGISTRY
from adakd_kernels.divergences import AlphaBeta, JensenShannon, SkewForwardKL, SkewReverseKL, get_divergence

from .cases import CONFIDENT, DIVERGENCES, EXTREME, gradient, logits, name_of, stack, temperatures

pytestmark = pytest.mark.fast

P, Q = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)


def mixture(weight: float) -> list[float]:
    return [weight * p + (1 - weight) * q for p, q in zip(P, Q, strict=True)]


def kl(a, b) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


CLOSED_FORMS = [
    ("forward_kl", kl(P, Q)),
    ("reverse_kl", kl(Q, P)),
    ("jeffreys", kl(P, Q) + kl(Q, P)),
    ("jensen_shannon", 0.5 * kl(P, mixture(0.5)) + 0.5 * kl(Q, mixture(0.5))),
    (JensenShannon(beta=0.1), 0.1 * kl(P, mixture(0.1)) + 0.9 * kl(Q, mixture(0.1))),
    ("skew_forward_kl", kl(P, mixture(0.1))),
    (SkewForwardKL(alpha=0.4), kl(P, mixture(0.4))),
    ("skew_reverse_kl", kl(Q, mixture(0.9))),
    (SkewReverseKL(alpha=0.4), kl(Q, mixture(0.6))),
    ("total_variation", (0.3 + 0.1 + 0.4) / 2),
    (
        "alpha_beta",
        -sum(p**0.2 * q**0.7 - 0.2 / 0.9 * p**0.9 - 0.7 / 0.9 * q**0.9 for p, q in zip(P, Q, strict=True)) / 0.14,
    ),
    (
        AlphaBeta(alpha=1.0, beta=1.0),
        -sum(p * q - 0.5 * p**2 - 0.5 * q**2 for p, q in zip(P, Q, strict=True)),
    ),
    ("hellinger", 1 - sum(math.sqrt(p * q) for p, q in zip(P, Q, strict=True))),
]


def test_every_divergence_has_a_closed_form():
    assert {get_divergence(divergence).name for divergence, _ in CLOSED_FORMS} == set(REGISTRY)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-8), (torch.float32, 1e-3)], ids=name_of)
def test_the_difficulty_is_the_hellinger_divergence(dtype, rtol):
    """Equation (2) has a formula of its own, with one exponential an entry, and gives the normalisers beside it."""
    student, teacher, tau = stack(CONFIDENT | EXTREME, 300, dtype)
    rows = len(student)
    student, teacher, tau = (torch.cat((x, x[:4])) for x in (student, teacher, tau))
    student[rows] = teacher[rows + 1] = student[rows + 3, 5] = -math.inf
    student[rows + 2, 7] = math.nan
    difficulty, of = reference.token_stats(student, teacher, tau)
    exact = reference.token_divergence(student.double(), teacher.double(), tau.double(), "hellinger")
    torch.testing.assert_close(difficulty.double(), exact, rtol=rtol, atol=1e-30, equal_nan=True)
    assert difficulty[rows] == difficulty[rows + 1] == 0 and difficulty[rows + 2].isnan() and difficulty[rows + 3] > 0
    normalizers = (*reference.normalizer(student, tau), *reference.normalizer(teacher, tau))
    for found, expected in zip(of, normalizers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("divergence, expected", CLOSED_FORMS, ids=lambda x: name_of(x)[:40])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_closed_forms(divergence, expected, temperature):
    student = torch.tensor([[temperature * math.log(q) + 5.0 for q in Q]], dtype=torch.float64)
    teacher = torch.tensor([[temperature * math.log(p) - 2.0 for p in P]], dtype=torch.float64)
    value = reference.token_divergence(student, teacher, temperature, divergence)
    assert math.isclose(value.item(), expected, rel_tol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_equation_10_is_the_gradient_autograd_gives(divergence):
    student, teacher = (logits(7, 50, dtype=torch.float64, seed=seed, scale=2.0) for seed in (1, 2))
    student[1, 3], teacher[2, 4] = -math.inf, -math.inf
    teacher[3, 10:], student[4, :40] = -math.inf, -math.inf
    student[5] = teacher[5]
    tau, weight = temperatures(7), torch.linspace(-1, 2, 7, dtype=torch.float64)
    expected = gradient(lambda s: reference.token_divergence(s, teacher, tau, divergence), student, weight)
    grad = reference.token_divergence_grad(student, teacher, tau, divergence, weight)
    assert torch.allclose(grad, expected, rtol=1e-10, atol=1e-15)
    assert torch.autograd.gradcheck(
        lambda s: reference.token_divergence(s, teacher[:1], tau[:1], divergence),
        (student[:1].clone().requires_grad_(),),
    )


def test_cross_entropy_and_its_gradient():
    student = logits(5, 30, dtype=torch.float64, seed=3)
    labels = torch.tensor([0, 4, 29, 7, 7])
    expected = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    assert torch.allclose(reference.cross_entropy(student, student, labels), expected)
    grad = gradient(lambda s: torch.nn.functional.cross_entropy(s, labels, reduction="none"), student)
    assert torch.allclose(reference.cross_entropy_grad(student, student, labels), grad, atol=1e-15)


def test_loss_of_three_tokens_by_hand():
    """Equations (2)-(7) on numbers that one can follow."""
    teacher = torch.tensor([P, P, P, P], dtype=torch.float64).log()
    student = torch.tensor([P, Q, (0.4, 0.3, 0.3), (0.1, 0.1, 0.8)], dtype=torch.float64).log()
    hardness = [
        1 - sum(math.sqrt(p * q) for p, q in zip(P, row, strict=True)) for row in (Q, (0.4, 0.3, 0.3), (0.1, 0.1, 0.8))
    ]
    assert hardness[2] > hardness[0] > hardness[1]
    # k = floor(0.75 * 4) = 3: tokens 3, 1, 2; the lower median is token 1
    median = hardness[0]
    total = 0.0
    for hard, row in zip(hardness, (Q, (0.4, 0.3, 0.3), (0.1, 0.1, 0.8)), strict=True):
        tau = 2.0 * math.exp(-0.5 * (hard - median) / (hard + median))
        p_tau, q_tau = ([x ** (1 / tau) for x in dist] for dist in (P, row))
        p_tau, q_tau = ([x / sum(dist) for x in dist] for dist in (p_tau, q_tau))
        total += tau**2 * kl(q_tau, p_tau)
    loss = reference.adakd_loss(
        student, teacher, torch.zeros(4, dtype=torch.long), "reverse_kl", focus_ratio=0.75, base_temperature=2.0
    )
    assert math.isclose(loss.item(), total / 3, rel_tol=1e-12)


def test_focus_step_by_hand():
    state = reference.FocusState()
    for loss, ratio, ref in ((4.0, 1.0, 0.0), (4.0, 1.0, 4.0), (1.0, 0.95, 2.5), (2.5, 0.95, 2.5), (9.5, 0.9975, 6.0)):
        state = reference.focus_step(state, loss, warmup_steps=2, beta=0.5)
        assert math.isclose(state.ratio, ratio) and math.isclose(state.reference, ref)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_valid_token_beside_minus_infinity(dtype, ce_weight):
    student, teacher = logits(3, 11, dtype=dtype), logits(3, 13, dtype=dtype, seed=1)
    student[0, 2], student[1], teacher[2] = -math.inf, -math.inf, -math.inf
    for labels in (torch.full((3,), -100), torch.tensor([-100, 3, 4])):
        leaf = student.clone().requires_grad_()
        loss = reference.adakd_loss(leaf, teacher, labels, ce_weight=ce_weight)
        loss.backward()
        assert loss.item() == 0.0 and torch.equal(leaf.grad, torch.zeros_like(leaf))
