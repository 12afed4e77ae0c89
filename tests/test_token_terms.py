"""`adakd::token_terms`, the second sweep over a part of every row: on the reference (fast), the C++ kernels (native),
in the interpreter (interpret), on a GPU (gpu)."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from adakd_kernels import divergences as registry
from adakd_kernels import ops, reference
from adakd_kernels.divergences import Divergence, JensenShannon
from adakd_kernels.reference import Normalizer, Normalizers

from .cases import (
    CONFIDENT,
    DTYPES,
    EXTREME,
    FAR,
    ONE_OF_EACH,
    SIGN_ULPS,
    Row,
    RowCase,
    logits,
    name_of,
    some,
    stack,
)
from .conftest import INTERPRETING, NATIVE

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.interpret, pytest.mark.gpu]
TWO_SWEEPS = [divergence for divergence in ONE_OF_EACH if divergence.sweeps == 2]
EACH = pytest.mark.parametrize("divergence", TWO_SWEEPS, ids=name_of)
INF = math.inf
# A part with a whole block of the C++ kernels and a rest, one without an entry, one of a few entries, and one more.
VOCAB = 500 if INTERPRETING else 5003
FIRST = VOCAB - VOCAB // 8
CUTS = (0, FIRST, FIRST, FIRST + 5, VOCAB)


def ordinary(vocab: int, dtype: torch.dtype) -> Row:
    return Row(logits(vocab, dtype=dtype, seed=1), logits(vocab, dtype=dtype, seed=2), 0.8)


def near(vocab: int, dtype: torch.dtype) -> Row:
    """They differ by some units in the last place of a number of 16 bits."""
    teacher = logits(vocab, dtype=dtype, seed=3)
    step = logits(vocab, dtype=torch.float64, seed=4, scale=0.01)
    return Row((teacher.double() + step).to(dtype), teacher)


def without(side: str, part: slice) -> RowCase:
    """Ordinary rows with −inf in a part of one of them or of both."""

    def case(vocab: int, dtype: torch.dtype) -> Row:
        row = ordinary(vocab, dtype)
        for name, z in (("student", row.student), ("teacher", row.teacher)):
            if side in (name, "both"):
                z[part] = -INF
        return row

    return case


def without_peak(vocab: int, dtype: torch.dtype) -> Row:
    """The teacher has −inf at the student's peak."""
    row = ordinary(vocab, dtype)
    row.teacher[row.student.argmax()] = -INF
    return row


def offset(vocab: int, dtype: torch.dtype) -> Row:
    """The parts' masses are far apart: after the second cut they are about e^−40 of those before."""
    row = ordinary(vocab, dtype)
    for z in (row.student, row.teacher):
        z[FIRST:] -= 40.0
    return row


EVERY_SEVENTH, LAST_PARTS, ALL = slice(3, None, 7), slice(FIRST, None), slice(None)
ROWS: dict[str, RowCase] = {
    "ordinary": ordinary,
    "near": near,
    "offset": offset,
    "student −inf": without("student", EVERY_SEVENTH),
    "teacher −inf": without("teacher", EVERY_SEVENTH),
    "both −inf": without("both", EVERY_SEVENTH),
    "student's part −inf": without("student", LAST_PARTS),
    "teacher's part −inf": without("teacher", LAST_PARTS),
    "teacher −inf at the peak": without_peak,
    "student empty": without("student", ALL),
    "teacher empty": without("teacher", ALL),
    **some(FAR, "20 and 100 at 0", "one-hot student of 200", "one-hot teacher of 200"),
    **some(CONFIDENT, "surer 1e-03", "agree 1e-06", "disagree 1e-09", "surer 1e-09"),
}


if INTERPRETING:  # which pays for every operation of every row
    ROWS = some(ROWS, "near", "teacher −inf", "teacher's part", "teacher empty", "student of 200", "disagree 1e-06")


class Call(NamedTuple):
    """The operator's arguments for rows (1, N, V), their own normalisers, c and peak or given ones."""

    student: Tensor
    teacher: Tensor
    temperature: Tensor
    mask: Tensor
    normalizers_tau: Tensor
    constant: Tensor
    peak: Tensor
    divergence: str
    alpha: float
    beta: float

    def part(self, first: int, last: int) -> Call:
        """The call of the entries first .. last of the vocabulary."""
        peak = (self.peak - first).where((self.peak >= first) & (self.peak < last), -1)
        return self._replace(student=self.student[..., first:last], teacher=self.teacher[..., first:last], peak=peak)

    def terms(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The reference's result, in fp64 where that is asked for."""
        s, t = (x if dtype is None else x.to(dtype) for x in (self.student, self.teacher))
        acc = reference.accumulation_dtype(s, t)
        tau, of, c = (x.to(acc) for x in (self.temperature, self.normalizers_tau, self.constant))
        return reference.token_terms(s, t, tau, Normalizers.of(of), c, self.peak, self.of())

    def of(self) -> Divergence:
        return registry.with_parameters(self.divergence, self.alpha, self.beta)


def call_of(student: Tensor, teacher: Tensor, tau: Tensor, divergence: Divergence) -> Call:
    """(N, V), (N, V), (N,) -> the call of the whole rows, with numbers from fp64 in the accumulation type."""
    sums = reference.token_sums(student.double(), teacher.double(), tau.double(), divergence)
    acc = reference.accumulation_dtype(student, teacher)
    of = torch.stack(sums.normalizers).to(acc)
    q = ((student.double().amax(-1) - of[0].double()) / tau.double()).exp() / of[1].double()
    c = (-sums.peak_grad / q - sums.sum_g).where(sums.peak >= 0, 0.0)
    if divergence.name == "total_variation":
        c = (2.0 * c).round() / 2.0
    one = torch.ones_like(sums.peak, dtype=torch.bool)
    numbers = (x.unsqueeze(0) for x in (student, teacher, tau.to(acc), one))
    return Call(
        *numbers, of.unsqueeze(1), c.to(acc).unsqueeze(0), sums.peak.unsqueeze(0), divergence.name,
        *divergence.parameters,
    )  # fmt: skip


def sizes(call: Call) -> tuple[Tensor, Tensor]:
    """(1, N) what the roundings of f and of g + c·q are relative to: Σ (|f| + q) and Σ (|g| + |c·q| + q).

    An entry of small masses enters more than once, because a unit of rounding in a large exponent is many of the mass.
    """
    s, t = reference.common_vocabulary(call.student.double(), call.teacher.double())
    tau, of = call.temperature.double(), Normalizers.of(call.normalizers_tau.double())
    log_q, log_p = (reference._log_mass(z, Normalizer(*x), tau) for z, x in ((s, of[:2]), (t, of[2:])))
    f, g = (
        reference._Masses(log_p, log_q).entries(table, call.of()).abs()
        for table in (reference.SUMMANDS, reference.GRADIENTS)
    )
    p, q = log_p.exp(), log_q.exp()
    beside = torch.arange(s.shape[-1]) != call.peak.unsqueeze(-1)
    eps = torch.finfo(call.constant.dtype).eps
    units = 1.0 + (log_q.abs() + log_p.abs()).nan_to_num(0.0, 0.0) / 16.0
    of_f, of_g = (f + q) * units, (g + q * (1.0 + call.constant.double().abs().unsqueeze(-1))) * units
    if call.divergence == "total_variation":  # where p and q nearly meet, rounding decides on the sign
        of_g = of_g + q * ((p - q).abs() <= SIGN_ULPS * eps * torch.maximum(p, q)) / eps
    empty = ((of.sum_s == 0) | (of.sum_t == 0)).unsqueeze(-1)
    of_f, of_g = (x.where(beside & ~empty, 0.0).sum(-1) for x in (of_f, of_g))
    return of_f, of_g


def unit_of(dtype: torch.dtype) -> float:
    """What an error may be of the sizes above; in fp64 the truth rounds, too."""
    return (128.0 if dtype == torch.float64 else 8.0) * torch.finfo(dtype).eps


def assert_terms(call: Call, names: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """The operator's result, whose error is at most twice the reference's plus some ulp of the sizes above."""
    ours, unit = ops.token_terms(*call), unit_of(call.constant.dtype)
    failures = []
    for what, found, eager, exact, size in zip(
        ("Σf", "Σ(g + cq)"), ours, call.terms(), call.terms(torch.float64), sizes(call), strict=True
    ):
        assert found.dtype == call.constant.dtype and found.shape == call.mask.shape
        error, of_eager = ((x.double() - exact).abs() for x in (found, eager))
        flushed = torch.finfo(found.dtype).tiny * call.student.shape[-1]  # masses below the smallest number are 0
        allowed = (2.0 * of_eager.nan_to_num(INF) + unit * size + flushed).where(call.mask, 0.0)
        for n in (call.mask & ~(error <= allowed)).nonzero()[:, 1].tolist():
            name = names[n] if names else f"token {n}"
            failures.append(f"{name}: {what} {found[0, n]:.6e}, exact {exact[0, n]:.6e}, off by {error[0, n]:.1e}")
        assert not found[~call.mask].any()
    assert not failures, "\n".join(failures)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@EACH
def test_parts_of_a_row_and_their_sum(divergence, dtype):
    call = call_of(*stack(ROWS, VOCAB, dtype), divergence)
    whole = assert_terms(call, list(ROWS))
    parts = [assert_terms(call.part(*cut), list(ROWS)) for cut in itertools.pairwise(CUTS)]
    assert all(not x.any() for x in parts[1])  # which has no entry
    unit = unit_of(call.constant.dtype)
    for i, size in enumerate(sizes(call)):
        difference = sum(part[i].double() for part in parts) - whole[i].double()
        assert (difference.abs() <= 4.0 * unit * size + VOCAB * torch.finfo(whole[i].dtype).tiny).all()
    for x in whole:
        assert not x[0, [name.endswith("empty") for name in ROWS]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=name_of)
@EACH
def test_with_the_rows_own_numbers_it_is_the_forward_of_one_device(divergence, dtype):
    """Σf with f of the peak is D, and −q·Σ(g + c·q) is the peak's gradient, if c is the one that the forward took."""
    cases = {name: case for name, case in ROWS.items() if not name.endswith("empty")}
    student, teacher, tau = (x.unsqueeze(0) for x in stack(cases, VOCAB, dtype))
    mask, args = torch.ones_like(tau, dtype=torch.bool), (divergence.name, *divergence.parameters)
    d, sum_g, of, peak, peak_grad = ops.token_divergence(student, teacher, tau, mask, *args)
    wide = Normalizers.of(of.double())
    at = peak.clamp_min(0).unsqueeze(-1)
    z_s, z_t = student.double(), teacher.double()
    log_q = reference._log_mass(z_s, Normalizer(*wide[:2]), tau.double()).gather(-1, at)
    log_p = reference._log_mass(z_t, Normalizer(*wide[2:]), tau.double()).gather(-1, at)
    log_q, log_p = (x.where(peak.unsqueeze(-1) >= 0, -INF) for x in (log_q, log_p))
    f_peak = reference._Masses(log_p, log_q).entries(reference.SUMMANDS, divergence).squeeze(-1)
    q = log_q.exp().squeeze(-1)
    c = (-peak_grad.double() / q - sum_g.double()).where(peak >= 0, 0.0)
    if divergence.name == "total_variation":
        c = (2.0 * c).round() / 2.0
    call = Call(student, teacher, tau, mask, of, c.to(of.dtype), peak, *args)
    f, g = ops.token_terms(*call)
    of_f, of_g = sizes(call)
    unit = unit_of(of.dtype)
    assert ((f.double() + f_peak - d.double()).abs() <= unit * (of_f + d.double().abs() + q)).all()
    # Where the teacher has −inf at the peak, there is none, c is 0 and Σ (g + c·q) is Σg.
    expected = peak_grad.double().where(peak >= 0, sum_g.double())
    assert ((g.double() * (-q).where(peak >= 0, 1.0) - expected).abs() <= unit * of_g).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@EACH
def test_equal_rows_give_zero(divergence, dtype):
    """g and c·q cancel in every entry: not at all if either was added up first."""
    row = logits(1, VOCAB, dtype=dtype, seed=5)
    of_q = {"skew_forward_kl": lambda a: 1.0 - a, "skew_reverse_kl": lambda a: a}
    c = of_q.get(divergence.name, lambda a: 0.0)(divergence.parameters[0])
    for peak in (row.argmax().item(), -1):
        call = call_of(row, row.clone(), torch.ones(1), divergence)
        call = call._replace(constant=torch.full_like(call.constant, c), peak=torch.full_like(call.peak, peak))
        f, g = ops.token_terms(*call)
        # The library's logarithms and the GPU's approximate reciprocals may be a unit off.
        eps = torch.finfo(g.dtype).eps
        assert f.abs() <= eps and g.abs() <= (0.0 if NATIVE else eps), (f, g)


def test_log_ratios_of_nearly_equal_rows_have_the_digits_of_the_normalisers():
    """The logarithm of a row's sum, rounded by itself as eager rounds it, would shift all log-ratios against c."""
    if not NATIVE:
        pytest.skip("the C++ kernels take the difference of the logarithms of both sums in double")
    student, teacher = (torch.stack(rows) for rows in zip(*(nearly_equal(seed) for seed in range(8)), strict=True))
    call = call_of(student, teacher, torch.ones(8), registry.SkewReverseKL())
    exact = call.terms(torch.float64)[1]
    ours, eager = ((found[1] - exact).norm() for found in (ops.token_terms(*call), call.terms()))
    assert ours <= 0.5 * eager, (ours, eager)


def nearly_equal(seed: int) -> tuple[Tensor, Tensor]:
    teacher = logits(3000, seed=seed)
    return teacher + logits(3000, seed=100 + seed, scale=0.01), teacher


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@EACH
def test_any_constant_and_any_entry_left_out(divergence, dtype):
    cases = some(ROWS, "ordinary", "near", "−inf", "surer 1e-03")
    call = call_of(*stack(cases, VOCAB, dtype), divergence)
    for constant, peak in ((0.0, -1), (0.37, 0), (-2.5, VOCAB - 1)):
        given = {"constant": torch.full_like(call.constant, constant), "peak": torch.full_like(call.peak, peak)}
        assert_terms(call._replace(**given), list(cases))


@EACH
def test_uneven_vocabularies_strides_types_and_masks(divergence):
    """Rows that no alignment helps, of two types, with tokens that are not read."""
    b, l, vocab = 2, 3, 301 if INTERPRETING else 4200
    mask = torch.tensor([[True, False, True], [True, True, False]])
    for n, (of_s, of_t) in enumerate(
        (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.bfloat16),
            (torch.float32, torch.float64),
        )
    ):
        # Token by token as batch by batch, from the third entry of longer rows on.
        student = logits(l, b, vocab + 9, dtype=of_s, seed=10 + n)[..., 3 : 3 + vocab].transpose(0, 1)
        teacher = logits(b, l, vocab + 4, dtype=of_t, seed=20 + n)
        tau = 0.5 + torch.arange(b * l).view(b, l) / 4.0
        common = (*(x[..., :vocab].flatten(0, 1) for x in (student, teacher)), tau.flatten(), divergence)
        flat = call_of(*common)
        of, peak = flat.normalizers_tau.view(4, b, l), flat.peak.view(b, l)
        masked = student.clone(), teacher.clone()
        for z in masked:
            z[~mask] = math.nan
        call = Call(
            *masked, tau.to(of.dtype), mask, of, flat.constant.view(b, l), peak, divergence.name, *divergence.parameters
        )
        expected = assert_terms(flat)
        for strided in (call, call._replace(student=student, teacher=teacher)):
            for found, whole in zip(ops.token_terms(*strided), expected, strict=True):
                assert torch.equal(found, whole.view(b, l).where(mask, 0.0))


@EACH
def test_finite_extremes_and_temperatures_give_no_nan(divergence):
    cases = some(EXTREME, "all lowest", "about 3e38", "lowest in both", "opposite largest")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        student, teacher, _ = stack(cases, VOCAB, dtype)
        for tau in (1e-3, 1e3):
            taus = torch.full((len(cases),), tau, dtype=reference.accumulation_dtype(student))
            call = call_of(student, teacher, taus, divergence)
            for given in (call, call.part(CUTS[2], VOCAB)):
                assert all(x.isfinite().all() for x in ops.token_terms(*given)), (dtype, tau)


@EACH
def test_nan_is_loud(divergence):
    """In the part, or in another one and so in the normalisers only; the token beside it stays as it is."""
    student, teacher = logits(2, VOCAB, seed=30), logits(2, VOCAB, seed=31)
    clean = call_of(student, teacher, torch.ones(2), divergence)
    expected = ops.token_terms(*clean)
    for side in ("student", "teacher"):
        for place in (0, VOCAB // 2, VOCAB - 1):
            z = getattr(clean, side).clone()
            z[0, 0, place] = math.nan
            assert_only_first_is_nan(ops.token_terms(*clean._replace(**{side: z})), expected)
    for which in range(4):
        of = clean.normalizers_tau.clone()
        of[which, 0, 0] = math.nan
        assert_only_first_is_nan(ops.token_terms(*clean._replace(normalizers_tau=of)), expected)
    c = clean.constant.clone()
    c[0, 0] = math.nan
    assert ops.token_terms(*clean._replace(constant=c))[1][0, 0].isnan()


def assert_only_first_is_nan(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x[0, 0].isnan() and torch.equal(x[0, 1:], y[0, 1:])


def test_two_runs_are_equal_in_every_bit():
    for divergence in TWO_SWEEPS:
        call = call_of(*stack(ROWS, VOCAB, torch.bfloat16), divergence).part(3, VOCAB)
        first, second = ops.token_terms(*call), ops.token_terms(*call)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@EACH
def test_opcheck(divergence, unpoisoned):
    student, teacher = (logits(3, 33, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    torch.library.opcheck(ops.token_terms, tuple(call_of(student, teacher, torch.ones(3), divergence)))


def test_other_parameters_reach_the_terms():
    for divergence in (JensenShannon(beta=0.0001), registry.SkewForwardKL(alpha=0.9), registry.AlphaBeta(alpha=0.5)):
        assert_terms(call_of(*stack(some(ROWS, "near", "disagree 1e-06"), VOCAB, torch.float32), divergence))


@pytest.mark.parametrize("divergence", [x for x in ONE_OF_EACH if x.sweeps == 1], ids=name_of)
def test_a_divergence_of_one_sweep_is_refused(divergence):
    call = call_of(*stack({"ordinary": ordinary}, 50, torch.float32), divergence)
    with pytest.raises(RuntimeError, match=f"takes divergences of two sweeps, and '{divergence.name}' takes one"):
        ops.token_terms(*call)
