"""Finite logits of any size: far margins, levels, rows that drift from block to block. On the reference (fast), the C++
kernels (native), in the interpreter (interpret), on a GPU (gpu)."""

from __future__ import annotations

import math

import pytest
import torch

from adakd_kernels import adakd_loss, reference, token_difficulty, token_divergence

from .cases import (
    BLOCK,
    DIVERGENCES,
    DRIFTING,
    DTYPES,
    EXTREME,
    FAR,
    ONE_OF_EACH,
    PLACES,
    assert_hellinger_rows,
    assert_value_rows,
    check_divergence,
    logits,
    name_of,
    some,
    stack,
)
from .conftest import INTERPRETING

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.interpret, pytest.mark.gpu]
FAMILIES = {"far": FAR, "drifting": DRIFTING, "extreme": EXTREME}
# Three whole blocks and a part of one.
VOCAB = 3 * BLOCK + 13
TYPES = DTYPES
if INTERPRETING:  # which pays for every operation of every block, so that it gets few rows and short ones
    FAMILIES = {
        "far": some(FAR, "20 and 100 at 4096", "10 at tau", "teacher of 200", "both of the largest"),
        "drifting": some(DRIFTING, "student up by 40", "both down by 1000"),
        "extreme": some(EXTREME, "all lowest", "about -1e31", "-1e7 at tau 1e-3", "lowest in both", "opposite 3e38"),
    }
    VOCAB = BLOCK + 1504
    TYPES = [torch.bfloat16, torch.float32]
# The gradient of rows that do not meet, or nearly agree, is far smaller than the masses that it is the difference of.
MASS_ULPS = 16.0


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_difficulty(family, dtype):
    cases = FAMILIES[family]
    student, teacher, _ = stack(cases, VOCAB, dtype)
    exact = reference.squared_hellinger(student.double(), teacher.double())
    assert_hellinger_rows(token_difficulty(student, teacher), exact, names=list(cases))


@pytest.mark.parametrize("dtype", TYPES, ids=name_of)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_and_gradient(family, divergence, dtype):
    cases = FAMILIES[family]
    check_divergence(*stack(cases, VOCAB, dtype), divergence, names=list(cases), ulps=MASS_ULPS)


def peaks(vocab, place, student, teacher, dtype=torch.float32):
    """Two rows of zeros but for one entry."""
    s, t = torch.zeros(1, vocab, dtype=dtype), torch.zeros(1, vocab, dtype=dtype)
    s[0, place], t[0, place] = student, teacher
    return s, t


def test_far_margins_in_numbers():
    """A peak that comes late and far higher in the teacher than in the student, and the other way round."""
    student, teacher = peaks(8192, 5000, 20.0, 100.0)
    assert math.isclose(token_difficulty(student, teacher).item(), 8.4e-6, rel_tol=0.01)
    assert math.isclose(token_difficulty(teacher, student).item(), 8.4e-6, rel_tol=0.01)
    student, teacher = peaks(8192, 5000, 30.0, 10.0)
    for pair in ((student, teacher), (teacher, student)):
        exact = reference.squared_hellinger(*(z.double() for z in pair), 0.3)
        found = token_divergence(*pair, 0.3, "hellinger").double()
        assert_hellinger_rows(found, exact)
    student = logits(1, 32_000, dtype=torch.bfloat16, seed=50)
    for place in (5000, 31_999):
        teacher = torch.zeros(1, 32_000, dtype=torch.bfloat16)
        teacher[0, place] = 200.0
        exact = reference.squared_hellinger(student.double(), teacher.double())
        assert_hellinger_rows(token_difficulty(student, teacher), exact)
        for name in ("reverse_kl", "hellinger"):
            out = adakd_loss(student, teacher, torch.tensor([place]), divergence=name)
            expected = reference.token_divergence(student.double(), teacher.double(), 1.0, name)
            assert math.isclose(out.loss.item(), expected.item(), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=name_of)
def test_rows_of_any_level_are_valid_tokens(dtype):
    """Their tokens count and are selected, and only a row of nothing but −inf is an ignored one."""
    cases = some(FAMILIES["extreme"], "all", "about", "lowest")
    student, teacher, _ = stack(cases, 4500, dtype)
    ignored = torch.full((1, 4500), -torch.inf, dtype=dtype)
    student, teacher = torch.cat((student, ignored)), torch.cat((teacher, teacher[:1]))
    labels = torch.arange(len(student))
    leaf = student.clone().requires_grad_()
    out = adakd_loss(leaf, teacher, labels, divergence="jensen_shannon", ce_weight=0.5, temperature_scale=0.0)
    assert out.selected.tolist() == [True] * len(cases) + [False]
    exact = reference.squared_hellinger(student.double(), teacher.double())
    assert_hellinger_rows(out.difficulty, exact, names=[*cases, "ignored"])
    out.loss.backward()
    assert not leaf.grad.isnan().any() and torch.equal(leaf.grad[-1], torch.zeros_like(leaf.grad[-1]))
    for measure in ("hellinger", "jensen_shannon"):
        half = adakd_loss(student, teacher, labels, difficulty=measure, focus_ratio=0.5)
        assert half.selected.sum() == len(cases) // 2 and not half.difficulty.isnan().any()
        assert half.difficulty[half.selected].min() >= half.difficulty[:-1][~half.selected[:-1]].max()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_a_constant_that_rounds_nowhere_changes_nothing(divergence):
    """Integers in every row, so that each type holds them exactly at the level, too."""
    student, teacher = (logits(2, 4100, dtype=torch.float64, seed=seed).round() for seed in (51, 52))
    for dtype, constant in (
        (torch.float16, 1024.0),
        (torch.bfloat16, -112.0),
        (torch.float32, 2.0**20),
        (torch.float32, 64.0 - 2.0**23),
        (torch.float64, 2.0**50),
    ):
        s, t = (student + constant).to(dtype), (teacher - constant).to(dtype)
        assert torch.equal(s.double() - constant, student) and torch.equal(t.double() + constant, teacher)
        tau = torch.tensor([0.5, 2.0], dtype=torch.promote_types(dtype, torch.float32))
        check_divergence(s, t, tau, divergence, ulps=MASS_ULPS)
        still = reference.token_divergence(student, teacher, tau.double(), divergence)
        eager = reference.token_divergence(student.to(dtype), teacher.to(dtype), tau, divergence)
        assert_value_rows(token_divergence(s, t, tau, divergence), eager, still)


def test_total_variation_of_a_margin_that_overflows():
    """A margin over τ beyond the type's range is still a margin: the rows have nothing in common."""
    for height, tau in ((1e20, 1e-30), (3e38, 1.0), (3e38, 1e-3), (-3e38, 1e-3)):
        for place in (BLOCK,) if INTERPRETING else (0, BLOCK, -1):
            student, teacher = torch.zeros(1, 5000), torch.zeros(1, 5000)
            student[0, place], teacher[0, 7] = height, abs(height)
            value = token_divergence(student, teacher, tau, "total_variation")
            expected = 1.0 if height > 0 else 1.0 - 1.0 / 4999.0
            assert math.isclose(value.item(), expected, rel_tol=1e-6), (height, tau, place)
            for divergence in ONE_OF_EACH:
                leaf = student.clone().requires_grad_()
                value = token_divergence(leaf, teacher, tau, divergence)
                value.sum().backward()
                assert value.isfinite().all() and not leaf.grad.isnan().any(), (height, tau, place, divergence)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_gradient_at_the_lowest_temperatures(divergence):
    """1/τ times a logarithm leaves the type's range, and the mass that it belongs to is 0."""
    single, double = torch.float32, torch.float64
    for dtype, tau in ((single, 1e-22), (single, 1e-36), (double, 1e-200), (double, 1e-306)):
        for vocab in (50, BLOCK + 4):
            student, teacher = (logits(2, vocab, dtype=dtype, seed=seed) for seed in (55, 56))
            leaf = student.clone().requires_grad_()
            value = token_divergence(leaf, teacher, tau, divergence)
            value.sum().backward()
            assert value.isfinite().all()
            plain = reference.token_divergence_grad(student, teacher, tau, divergence)
            torch.testing.assert_close(leaf.grad, plain, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_a_row_whose_value_is_nan_has_a_gradient_of_nan(divergence, side):
    """At every entry that counts, wherever the one is that is not a number."""
    places = (0, -1) if INTERPRETING else PLACES
    rows, vocab = len(places), (1 if INTERPRETING else 2) * BLOCK + 9
    student, teacher = logits(rows + 1, vocab, seed=53), logits(rows + 1, vocab, seed=54)
    for row, place in enumerate(places):
        (student if side == "student" else teacher)[row, place] = math.nan
    leaf = student.clone().requires_grad_()
    value = token_divergence(leaf, teacher, 0.9, divergence)
    value.sum().backward()
    assert value.isnan().tolist() == [True] * rows + [False]
    assert leaf.grad[:rows].isnan().all() and not leaf.grad[rows].isnan().any()
