"""Confident tokens, the usual ones of a trained model: gradient and value on the reference (fast), the C++ kernels
(native), in the interpreter (interpret), on a GPU (gpu)."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from adakd_kernels import reference, token_difficulty, token_divergence
from adakd_kernels.divergences import AlphaBeta, JensenShannon, SkewForwardKL, SkewReverseKL

from .cases import (
    CONFIDENT,
    DIVERGENCES,
    DTYPES,
    ONE_OF_EACH,
    assert_close_as_eager,
    assert_hellinger_rows,
    check_divergence,
    confident_row,
    gradient,
    logits,
    name_of,
    some,
    stack,
)
from .conftest import INTERPRETING

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.interpret, pytest.mark.gpu]
# The interpreter pays for every operation of every block, so it gets few rows, and long ones in one type.
TAKEN = some(CONFIDENT, "surer 1e-03", "agree 1e-06", "agree 1e-09") if INTERPRETING else CONFIDENT
LONG = 32_000
VOCABULARIES = {dtype: 4512 for dtype in DTYPES if dtype != torch.float32} if INTERPRETING else {}


def check(cases, vocab, dtype, divergence):
    """Value and gradient of all cases by the rules of `cases.py`."""
    check_divergence(*stack(cases, vocab, dtype), divergence, names=list(cases))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_gradient_and_value_of_confident_tokens(divergence, dtype):
    check(TAKEN, VOCABULARIES.get(dtype, LONG), dtype, divergence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_confident_tokens_of_a_long_vocabulary(divergence, dtype):
    if INTERPRETING:
        pytest.skip("the interpreter takes seconds for a row of 151,936 entries")
    check(some(CONFIDENT, "agree 1e-06", "surer 1e-03"), 151_936, dtype, divergence)


@pytest.mark.parametrize("vocab", [37, 4100])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_confident_tokens_of_a_short_vocabulary(divergence, vocab):
    """The peak is then the last entry, or in the first block, and the rest of the row is a few entries."""
    check(TAKEN, vocab, torch.float32, divergence)


@pytest.mark.parametrize(
    "divergence",
    [
        JensenShannon(beta=0.9999),
        JensenShannon(beta=0.0001),
        SkewForwardKL(alpha=1e-4),
        SkewForwardKL(alpha=0.9999),
        SkewReverseKL(alpha=1e-4),
        AlphaBeta(alpha=1e-2, beta=1.0),
        AlphaBeta(alpha=0.9, beta=0.1),
    ],
    ids=name_of,
)
def test_parameters_near_their_limits(divergence):
    """Where 1 − β and 1 − α are not what is left of them in fp32."""
    check(some(TAKEN, "surer 1e-03", "agree 1e-06"), 4500, torch.float32, divergence)
    student, teacher = (logits(2, 4500, seed=seed) for seed in (1, 2))
    exact = gradient(lambda s: reference.token_divergence(s, teacher.double(), 0.8, divergence), student.double())
    eager = gradient(lambda s: reference.token_divergence(s, teacher, 0.8, divergence), student)
    assert_close_as_eager(gradient(lambda s: token_divergence(s, teacher, 0.8, divergence), student), eager, exact)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_gradient_of_nearly_equal_rows(divergence):
    """What the rows differ in is a few units in the last place of a 16-bit logit; the second ones are confident."""
    rows, vocab, dtype = 2 if INTERPRETING else 4, 4097, torch.float16
    for scale, step in ((3.0, 0.01), (8.0, 0.003)):
        teacher = logits(rows, vocab, dtype=dtype, seed=3, scale=scale)
        student = (teacher.double() + logits(rows, vocab, dtype=torch.float64, seed=4, scale=step)).to(dtype)
        check_divergence(student, teacher, torch.ones(rows), divergence)


def test_difficulty_of_confident_tokens():
    for dtype in DTYPES:
        student, teacher, _ = stack(TAKEN, 8200, dtype)
        exact = reference.squared_hellinger(student.double(), teacher.double())
        assert_hellinger_rows(token_difficulty(student, teacher), exact, names=list(TAKEN))


# The definitions of docs/maths.md, in decimals of so many digits that nothing cancels.
DEFINITIONS = {
    "forward_kl": lambda p, q, a, b: p * (p / q).ln(),
    "reverse_kl": lambda p, q, a, b: q * (q / p).ln(),
    "jeffreys": lambda p, q, a, b: (p - q) * (p / q).ln(),
    "jensen_shannon": lambda p, q, a, b: (
        b * p * (p / (b * p + (1 - b) * q)).ln() + (1 - b) * q * (q / (b * p + (1 - b) * q)).ln()
    ),
    "skew_forward_kl": lambda p, q, a, b: p * (p / (a * p + (1 - a) * q)).ln(),
    "skew_reverse_kl": lambda p, q, a, b: q * (q / (a * q + (1 - a) * p)).ln(),
    "total_variation": lambda p, q, a, b: abs(p - q) / 2,
    "alpha_beta": lambda p, q, a, b: -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b),
    "hellinger": lambda p, q, a, b: (p.sqrt() - q.sqrt()) ** 2 / 2,
}


def softmax(z):
    masses = [x.exp() for x in z]
    return [mass / sum(masses) for mass in masses]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_the_truth_is_the_derivative_of_the_definition(divergence):
    """The fp64 reference that every test above compares with: D, and its slopes as quotients of differences."""
    if INTERPRETING:
        pytest.skip("plain torch only")
    vocab, tau = 5, 0.75
    parameters = [Decimal(x) for x in divergence.parameters]

    def definition(s, p):
        return sum(DEFINITIONS[divergence.name](a, b, *parameters) for a, b in zip(p, softmax(s), strict=True))

    for rest, place in ((1e-2, 3), (1e-5, 1), (1e-9, 3), (1e-9, 1)):
        student, teacher = confident_row(rest, 3, vocab, 300), confident_row(0.5 * rest, place, vocab, 301)
        value = reference.token_divergence(student, teacher, tau, divergence).item()
        found = reference.token_divergence_grad(student, teacher, tau, divergence)
        with localcontext(prec=60):
            s, t = ([Decimal(x) / Decimal(tau) for x in z.tolist()] for z in (student, teacher))
            p, step = softmax(t), Decimal(10) ** -20
            assert math.isclose(value, definition(s, p), rel_tol=1e-9, abs_tol=1e-15)
            slopes = []
            for v in range(vocab):
                up, down = ([x + sign * step * (u == v) for u, x in enumerate(s)] for sign in (1, -1))
                slopes.append(float((definition(up, p) - definition(down, p)) / (2 * step) / Decimal(tau)))
        exact = torch.tensor(slopes, dtype=torch.float64)
        assert (found - exact).abs().max() <= 1e-9 * exact.abs().max(), (rest, place, found, exact)


def test_every_divergence_has_a_definition():
    assert set(DEFINITIONS) == {divergence.name for divergence in DIVERGENCES}
