"""`adakd::token_kl` on the reference (fast), the C++ kernels (native), in the interpreter (interpret), on a GPU (gpu).

Its divergences, Σg made of `kept` and `lost`, normalisers and peak go through the backward, so that value and gradient
are held to the rules of `cases.py`. `kept` and `lost` have rules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from adakd_kernels import ops, reference
from adakd_kernels.divergences import Divergence, get_divergence
from adakd_kernels.reference import KlSums, Normalizers

from .cases import (
    CONFIDENT,
    DRIFTING,
    DTYPES,
    EXTREME,
    FAR,
    check_divergence,
    logits,
    name_of,
    some,
    stack,
    temperatures,
)
from .conftest import INTERPRETING, NATIVE

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.interpret, pytest.mark.gpu]
INF = math.inf
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FAMILIES = {"confident": CONFIDENT, "far": FAR, "drifting": DRIFTING, "extreme": EXTREME}
VOCAB, TYPES = 8200, DTYPES
if INTERPRETING:  # which pays for every operation of every block, so that it gets few rows
    FAMILIES = {
        "confident": some(CONFIDENT, "surer 1e-03", "disagree 1e-06"),
        "far": some(FAR, "10 at tau"),
        "drifting": some(DRIFTING, "student up by 40"),
        "extreme": some(EXTREME, "lowest in both", "opposite 3e38"),
    }
    VOCAB, TYPES = 4512, [FP32]


def kl(student: Tensor, teacher: Tensor, tau: Tensor) -> KlSums:
    """The results of the operator for (N, V) rows, as the reference bundles them."""
    rows = [x.unsqueeze(0) for x in (student, teacher, tau, torch.ones(tau.shape, dtype=torch.bool))]
    *values, normalizers, peak, forward_grad, reverse_grad = ops.token_kl(*rows)
    values, grads = ([x.squeeze(0) for x in of] for of in (values, (forward_grad, reverse_grad)))
    return KlSums(*values, Normalizers.of(normalizers.squeeze(1)), peak.squeeze(0), *grads)


def differentiable(found: KlSums) -> Callable[[Tensor, Tensor, Tensor, Divergence], Tensor]:
    """What gives the divergence of the rows of these results, with a backward that takes them."""

    def function(student: Tensor, teacher: Tensor, tau: Tensor, divergence: Divergence) -> Tensor:
        of_each = {
            "forward_kl": (found.forward, -found.kept, found.forward_grad),
            "reverse_kl": (found.reverse, found.reverse - found.lost, found.reverse_grad),
        }
        d, sum_g, grad = (x.unsqueeze(0) for x in of_each[divergence.name])
        sums = (d, sum_g, torch.stack(found.normalizers).unsqueeze(1), found.peak.unsqueeze(0), grad)
        rows = [x.unsqueeze(0) for x in (student, teacher, tau, torch.ones(tau.shape, dtype=torch.bool))]
        return ops.token_losses(*rows, divergence, sums=lambda *_: sums)[0].squeeze(0)

    return function


def check_masses(student: Tensor, teacher: Tensor, tau: Tensor, names: Sequence[str] = ()) -> KlSums:
    """`kept` and `lost` to a few roundings of themselves, however small, and normalisers and peak; all are returned.

    A mass of 1e-9 is 2 to the power of −30, of which half a unit of rounding in the exponent is some 16 of the mass.
    """
    found, exact = kl(student, teacher, tau), reference.kl_sums(student.double(), teacher.double(), tau.double())
    acc = torch.finfo(found.kept.dtype)
    ulps = 256.0 if found.kept.dtype == FP64 else 64.0  # in fp64 the truth itself rounds
    for what in ("kept", "lost"):
        ours, truth = getattr(found, what).double(), getattr(exact, what)
        bad = ~((ours - truth).abs() <= ulps * acc.eps * truth + acc.smallest_normal)
        assert not bad.any(), [(what, names and names[i], ours[i], truth[i]) for i in bad.nonzero().flatten()]
    vocab = min(student.shape[-1], teacher.shape[-1])
    finite = (student[:, :vocab] != -INF) & (teacher[:, :vocab] != -INF)
    whole = finite.all(-1)
    assert torch.equal(found.lost[whole], torch.zeros_like(found.lost[whole])), "lost something of finite entries"
    own = 4.0 if INTERPRETING or NATIVE else ulps  # plain torch sums masses that are rounded one by one
    assert ((found.kept[whole] - 1.0).abs() <= own * acc.eps).all()
    for side in ("s", "t"):
        (z_max, z_sum), (true_max, true_sum) = (
            [getattr(x.normalizers, f"{what}_{side}") for what in ("max", "sum")] for x in (found, exact)
        )
        assert torch.equal(z_max.double(), true_max)
        assert ((z_sum.double() - true_sum).abs() <= ulps * acc.eps * true_sum).all()
    # Any entry with an eighth of the largest mass may be the peak.
    q = (student[:, :vocab].double() / tau.double().unsqueeze(-1)).softmax(-1).nan_to_num(0.0)
    some_peak = found.peak >= 0
    at = found.peak.clamp_min(0).unsqueeze(-1)
    heavy = q >= q.amax(-1, keepdim=True) / 9.0
    assert (heavy & finite).gather(-1, at).squeeze(-1)[some_peak].all()
    assert ((heavy & ~finite).any(-1) | (q.sum(-1) == 0.0))[~some_peak].all()
    for grad in (found.forward_grad, found.reverse_grad):
        assert torch.equal(grad[~some_peak], torch.zeros_like(grad[~some_peak]))
    return found


def check(student: Tensor, teacher: Tensor, tau: Tensor, names: Sequence[str] = (), ulps: float = 16.0) -> KlSums:
    """All results of the operator, by the rules."""
    names = list(names)
    found = check_masses(student, teacher, tau, names)
    for name in ("forward_kl", "reverse_kl"):
        function = differentiable(found)
        check_divergence(student, teacher, tau, get_divergence(name), names=names, ulps=ulps, function=function)
    return found


@pytest.mark.parametrize("dtype", TYPES, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_finite_rows(family, dtype):
    cases = FAMILIES[family]
    ulps = 0.0 if family == "confident" else 16.0  # as in the tests of these rows for `token_divergence`
    found = check(*stack(cases, VOCAB, dtype), list(cases), ulps)
    assert not found.lost.any()


MIXED = [(BF16, FP32), (FP16, FP64)] if INTERPRETING else [(BF16, FP32), (FP32, FP16), (FP16, FP64), (BF16, FP16)]


@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), MIXED, ids=name_of)
def test_mixed_types_and_unequal_vocabularies(student_dtype, teacher_dtype):
    for student_vocab, teacher_vocab in ((303, 319), (1019, 1003), (7, 600))[: 1 if INTERPRETING else None]:
        student = logits(3, student_vocab, dtype=student_dtype, seed=1)
        teacher = logits(3, teacher_vocab, dtype=teacher_dtype, seed=2)
        common = min(student_vocab, teacher_vocab)
        teacher[1, 3], student[2, 5] = -INF, -INF
        tau = temperatures(3).to(reference.accumulation_dtype(student, teacher))
        found = check_masses(student[:, :common], teacher[:, :common], tau)
        for one, other in zip(flat(kl(student, teacher, tau)), flat(found), strict=True):
            assert torch.equal(one, other)


def flat(sums: KlSums) -> list[Tensor]:
    """Its tensors, those of the normalisers too."""
    return [*sums.normalizers, *(x for x in sums if isinstance(x, Tensor))]


def small_mass(row: Tensor, places: Tensor, mass: float) -> None:
    """Shift a row's entries at the places so that they hold this share of its mass."""
    inside = torch.zeros(row.shape, dtype=torch.bool)
    inside[places] = True
    row[places] += row[~inside].logsumexp(-1) - row[places].logsumexp(-1) + math.log(mass) - math.log1p(-mass)


@pytest.mark.parametrize("dtype", TYPES, ids=name_of)
def test_small_masses_are_relatively_exact(dtype):
    """Lost ones of the student, and kept ones of the teacher: at one entry, at some of a block, over the whole row."""
    places = [torch.tensor([VOCAB - 3]), torch.arange(40, 300, 7), torch.arange(5, VOCAB, 11)]
    if INTERPRETING:
        places = places[1:2]
    student, teacher = logits(6 * len(places) * 2, VOCAB, dtype=FP64, seed=3), logits(1, VOCAB, dtype=FP64, seed=4)
    teacher = teacher.repeat(len(student), 1)
    smallest = 1e-4 if dtype == FP16 else 1e-9  # a single entry of less mass lies below the others by too much for fp16
    for row in range(len(student)):
        mass, where = max(10.0 ** -(3 + row % 6 * 1.2), smallest), places[row // 6 % len(places)]
        of, other = (student, teacher) if row < len(student) // 2 else (teacher, student)
        small_mass(of[row], where, mass)
        out = torch.zeros(VOCAB, dtype=torch.bool)
        out[where] = True
        # The teacher lacks the student's small mass, or the student all but the teacher's.
        other[row, out if of is student else ~out] = -INF
    student, teacher = student.to(dtype), teacher.to(dtype)
    tau = torch.ones(len(student), dtype=reference.accumulation_dtype(student, teacher))
    found = check_masses(student, teacher, tau)
    half = len(student) // 2
    assert (found.lost[:half] < 2e-3).all() and (found.lost[:half] > 0.2 * smallest).all()
    assert (found.kept[half:] < 2e-3).all() and (found.kept[half:] > 0.2 * smallest).all()


@pytest.mark.parametrize("dtype", [BF16] if INTERPRETING else [BF16, FP32], ids=name_of)
def test_minus_infinity_on_either_side(dtype):
    vocab = 1003 if INTERPRETING else 4500
    student, teacher = logits(9, vocab, dtype=dtype, seed=5), logits(9, vocab, dtype=dtype, seed=6)
    student[0, 2], teacher[1, 3] = -INF, -INF
    student[2, 4], teacher[2, 4] = -INF, -INF
    student[3, ::2], teacher[4, ::2] = -INF, -INF
    teacher[5, : vocab - 2] = -INF
    teacher[6, 1:] = -INF
    student[7, : vocab - 2] = -INF
    teacher[8, student[8].argmax()] = -INF  # the student's peak is lost
    check(student, teacher, temperatures(9).float())


@pytest.mark.parametrize("shift", [3.0] if INTERPRETING else [3.0, 40.0, -3.0])
def test_former_peaks_that_the_teacher_lacks(shift):
    """The student's maximum moves every 100 entries, and some of its peaks have no counterpart, so they are lost."""
    vocab = 1003 if INTERPRETING else 5003
    student, teacher = logits(3, vocab, seed=7), logits(3, vocab, seed=8)
    student += shift * torch.arange(vocab).div(100, rounding_mode="floor")
    teacher[0, ::3], teacher[1, ::101], student[2, ::5] = -INF, -INF, -INF
    check(student, teacher, torch.tensor([0.7, 1.0, 3.0]))


def test_empty_rows():
    """Also two rows without a common entry, and none of a row's entries in the common vocabulary."""
    student, teacher = logits(6, 1003, seed=9), logits(6, 1019, seed=10)
    student[0], teacher[1], student[2], teacher[2] = -INF, -INF, -INF, -INF
    student[3, 500:], teacher[3, :500] = -INF, -INF
    teacher[4, :1003] = -INF
    found = kl(student, teacher, torch.full((6,), 0.8))
    for values in (found.forward, found.reverse, found.kept, found.forward_grad, found.reverse_grad):
        assert torch.equal(values[:5], torch.zeros(5)) and values[5] != 0.0
    assert torch.allclose(found.lost, torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]), rtol=1e-5)
    assert (found.lost == 0.0).tolist() == [True, False, True, False, False, True]
    assert found.peak[:5].tolist() == [-1] * 5
    nothing = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    for (z_max, z_sum), rows in zip((found.normalizers[:2], found.normalizers[2:]), nothing, strict=True):
        assert torch.equal(z_max == -INF, rows) and torch.equal(z_sum == 0.0, rows)


def test_a_teacher_of_one_entry_far_below_0():
    """Its anchor is not known before the entry is met, wherever that lies."""
    student, teacher = logits(3, 4500, seed=11), torch.full((3, 4500), -INF)
    for row, place in enumerate((17, 4200, 4499)):
        teacher[row, place] = -1e4
    found = check_masses(student, teacher, torch.ones(3))
    assert torch.equal(found.kept, torch.ones(3)) and torch.equal(found.forward >= 0.0, torch.ones(3).bool())


def test_masked_tokens_are_not_read():
    student, teacher = logits(2, 3, 133, seed=12), logits(2, 3, 133, seed=13)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    tau = temperatures(2, 3)
    whole = ops.token_kl(student, teacher, tau, torch.ones_like(mask))
    student[~mask], teacher[~mask] = math.nan, math.nan
    *numbers, normalizers, peak, forward_grad, reverse_grad = ops.token_kl(student, teacher, tau, mask)
    for values, of_all in zip((*numbers, forward_grad, reverse_grad), (*whole[:4], *whole[6:]), strict=True):
        assert torch.equal(values, of_all.where(mask, 0.0)) and values.dtype == FP32
    assert torch.equal(normalizers[:, mask], whole[4][:, mask])
    assert torch.equal(normalizers[:, ~mask], torch.tensor([0.0, 1.0, 0.0, 1.0]).unsqueeze(-1).expand(4, 2))
    assert torch.equal(peak, whole[5].where(mask, -1)) and peak.dtype == torch.int64
    nothing = ops.token_kl(student[:, :0], teacher[:, :0], tau[:, :0], mask[:, :0])
    assert [tuple(x.shape) for x in nothing] == [(2, 0)] * 4 + [(4, 2, 0)] + [(2, 0)] * 3


VIEWS = {
    "last position cut off": lambda z: torch.cat((z, z[:, :1] + 1), 1)[:, :-1],
    "time first in memory": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "padded rows": lambda z: torch.nn.functional.pad(z, (0, 13))[..., : z.shape[-1]],
    "a row offset in memory": lambda z: torch.cat((torch.zeros(3), z.flatten()))[3:].view_as(z),
}


@pytest.mark.parametrize("view", ["time first in memory"] if INTERPRETING else VIEWS)
def test_strides(view):
    student, teacher = logits(2, 3, 303, seed=14), logits(2, 3, 303, seed=15)
    teacher[0, 1, 7], mask = -INF, torch.tensor([[True, True, True], [True, False, True]])
    tau = VIEWS["time first in memory"](temperatures(2, 3).unsqueeze(-1)).squeeze(-1)
    viewed = ops.token_kl(VIEWS[view](student), VIEWS[view](teacher), tau, mask.t().contiguous().t())
    for one, other in zip(viewed, ops.token_kl(student, teacher, tau.contiguous(), mask), strict=True):
        assert torch.equal(one, other)


def test_skewed_rows():
    """Rows long enough to be read in aligned steps that begin before them, at every offset from a multiple of 8."""
    vocab = 8193
    student, teacher = logits(1, 8, vocab, dtype=BF16, seed=16), logits(1, 8, vocab, dtype=BF16, seed=17)
    if INTERPRETING:
        student, teacher = student[:, 3:6], teacher[:, 3:6]
    student[0, 1, 8190], teacher[0, 0, 0], teacher[0, 2, vocab - 1] = -INF, -INF, -INF
    check_masses(student[0], teacher[0], temperatures(student.shape[1]).float())


@pytest.mark.parametrize("place", ["student", "teacher"])
def test_nan_is_seen(place):
    student, teacher = logits(3, 1003, seed=18), logits(3, 1003, seed=19)
    (student if place == "student" else teacher)[1, 998] = math.nan
    found = kl(student, teacher, torch.ones(3))
    for values in (found.forward, found.reverse):
        assert values.isnan().tolist() == [False, True, False]
    for name in ("forward_kl", "reverse_kl"):
        leaf = student.clone().requires_grad_()
        differentiable(found)(leaf, teacher, torch.ones(3), get_divergence(name)).sum().backward()
        assert leaf.grad[1].isnan().any() and not leaf.grad[[0, 2]].isnan().any()


def test_it_is_what_token_divergence_finds():
    """Both divergences, peaks, gradients and normalisers, and Σg from the masses."""
    student, teacher, tau = stack(some(CONFIDENT, "disagree 1e-06", "surer 1e-03"), 4500, BF16)
    teacher[0, 5], teacher[1, ::9] = -INF, -INF
    found = kl(student, teacher, tau)
    rows = [x.unsqueeze(0) for x in (student, teacher, tau, torch.ones(tau.shape, dtype=torch.bool))]
    for name, d, sum_g, grad in (
        ("forward_kl", found.forward, -found.kept, found.forward_grad),
        ("reverse_kl", found.reverse, found.reverse - found.lost, found.reverse_grad),
    ):
        alone = ops.token_divergence(*rows, name, 0.0, 0.0)
        for one, other in zip((d, sum_g, found.peak, grad), (*alone[:2], *alone[3:]), strict=True):
            assert torch.allclose(one.double(), other.squeeze(0).double(), rtol=1e-5, atol=1e-9)
        assert torch.allclose(torch.stack(found.normalizers), alone[2].squeeze(1), rtol=1e-6)


def test_reruns_agree_bit_for_bit():
    student, teacher = logits(1, 2, 4500, dtype=BF16, seed=20), logits(1, 2, 4500, seed=21)
    teacher[0, 0, ::50] = -INF
    args = (student, teacher, temperatures(1, 2), torch.ones(1, 2, dtype=torch.bool))
    for one, other in zip(ops.token_kl(*args), ops.token_kl(*args), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETING, reason="schema and fake results are the same for all kernels of an operator")
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=name_of)
def test_opcheck(dtype, unpoisoned):
    student, teacher = logits(2, 2, 33, dtype=dtype, seed=22), logits(2, 2, 35, dtype=BF16, seed=23)
    mask = torch.tensor([[True, False], [True, True]])
    torch.library.opcheck(ops.token_kl, (student, teacher, temperatures(2, 2), mask))
