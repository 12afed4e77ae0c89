"""Rows that are split over programs, in the interpreter: values, bytes and launches, and into how many parts."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch

from adakd_kernels import adakd_loss, ops, reference, token_divergence
from adakd_kernels.divergences import JensenShannon, ReverseKL
from adakd_kernels.reference import Normalizers
from instruments.devices import produced

from .cases import (
    CONFIDENT,
    EXTREME,
    FAR,
    ONE_OF_EACH,
    Row,
    assert_hellinger_rows,
    check_divergence,
    gradient,
    logits,
    name_of,
    some,
    stack,
    temperatures,
    tokens,
)
from .conftest import INTERPRETING

if not INTERPRETING:
    pytest.skip("runs in Triton's interpreter: start with TRITON_INTERPRET=1", allow_module_level=True)

from adakd_kernels.kernels import launch
from instruments.memory import guarded
from instruments.traffic import counting

pytestmark = pytest.mark.interpret

FP32, BF16, INF = torch.float32, torch.bfloat16, math.inf
# Seven steps of two tiles of a warp in fp32, of which the last is not whole, or four in bf16.
VOCAB = 1785
# Each of the three ways to merge: both KL divergences, Hellinger, two sweeps.
SOME = [divergence for divergence in ONE_OF_EACH if divergence.name in ("jeffreys", "hellinger", "jensen_shannon")]


@contextlib.contextmanager
def split_into(parts: int):
    """Inside, launches take one warp, and rows that many parts if they have as many steps."""

    def one_warp(family, kernel, divergences, itemsize):
        return 1 if kernel in launch.ONE_TILE else 2, 1

    with (
        mock.patch.object(launch, "wanted_parts", lambda *_: parts),
        mock.patch.object(launch, "tiles_and_warps", one_warp),
        mock.patch.object(launch, "_SHORT_ROW", 512),
    ):
        yield


def ordinary(vocab, dtype):
    return Row(logits(vocab, dtype=dtype, seed=1), logits(vocab, dtype=dtype, seed=2), 0.8)


def without(side, part):
    """Ordinary rows with −inf in a part of one of them or of both."""

    def case(vocab, dtype):
        row = ordinary(vocab, dtype)
        for name, z in (("student", row.student), ("teacher", row.teacher)):
            if side in (name, "both"):
                z[part] = -INF
        return row

    return case


def tie(vocab, dtype):
    """The student's maximum in two parts, of which the first has the teacher's, too."""
    row = ordinary(vocab, dtype)
    row.student[100] = row.student[1500] = row.teacher[100] = 12.0
    return row


def without_peak(vocab, dtype):
    """The teacher has −inf at the student's peak."""
    row = ordinary(vocab, dtype)
    row.student[900], row.teacher[900] = 11.0, -INF
    return row


ROWS = {
    "tie": tie,
    "student's part −inf": without("student", slice(256, 768)),
    "teacher's part −inf": without("teacher", slice(1536, None)),
    "teacher −inf at the peak": without_peak,
    **some(CONFIDENT, "surer 1e-03", "disagree 1e-07"),
    "agree 1e-09": CONFIDENT["agree 1e-09"],
    "one-hot both of 200": FAR["one-hot both of 200"],
}


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_divergence_and_gradient(divergence, parts):
    with split_into(parts):
        check_divergence(*stack(ROWS, VOCAB, FP32), divergence, names=list(ROWS))


@pytest.mark.parametrize("divergence", SOME, ids=name_of)
def test_far_rows(divergence):
    cases = some(EXTREME, "all largest", "opposite largest", "-1e7 at tau 1e-3")
    with split_into(3):
        check_divergence(*stack(cases, VOCAB, FP32), divergence, names=list(cases), ulps=64.0)


def test_statistics(parts=7):
    student, teacher, _ = stack(ROWS, VOCAB, FP32)
    with split_into(parts):
        difficulty, found = ops.token_stats(
            student.unsqueeze(0), teacher.unsqueeze(0), torch.ones(1, len(ROWS), dtype=torch.bool)
        )
    exact = reference.squared_hellinger(student.double(), teacher.double())
    assert_hellinger_rows(difficulty[0], exact, names=list(ROWS))
    for z, m, l in ((student, *found[:2, 0]), (teacher, *found[2:, 0])):
        assert torch.equal(m, z.amax(-1))
        assert torch.allclose(m + l.log(), z.logsumexp(-1), rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon()], ids=name_of)
def test_equal_rows_empty_rows_and_nan(divergence):
    student = logits(1, 6, VOCAB, seed=3)
    teacher = student.clone()
    student[0, 2], teacher[0, 3] = -INF, -INF
    student[0, 4, 700], teacher[0, 5, 1784] = math.nan, math.nan
    mask = torch.ones(1, 6, dtype=torch.bool)
    with split_into(3):
        leaf = student.clone().requires_grad_()
        d = token_divergence(leaf, teacher, torch.ones(1, 6), divergence, mask)
        d.sum().backward()
        difficulty, normalizers = ops.token_stats(student, teacher, mask)
    assert (d[0, :2].abs() <= 1e-6).all() and (leaf.grad[0, :2].abs() <= 1e-6).all()
    assert not d[0, 2:4].any() and not leaf.grad[0, 2:4].any() and not difficulty[0, 2:4].any()
    assert d[0, 4:].isnan().all() and difficulty[0, 4:].isnan().all() and leaf.grad[0, 4:].isnan().any(-1).all()
    of = Normalizers.of(normalizers)
    assert of.max_s[0, 2] == of.max_t[0, 3] == -INF and of.sum_s[0, 2] == of.sum_t[0, 3] == 0.0


def call(student, teacher, mask, divergence):
    """All results of statistics, divergence and gradient, and the launches."""
    tau, weight = temperatures(*mask.shape).float(), torch.linspace(0.5, 2.0, mask.numel()).view(mask.shape)
    name, parameters = divergence.name, divergence.parameters
    with counting() as traffic:
        results = [*ops.token_stats(student, teacher, mask)]
        results += ops.token_divergence(student, teacher, tau, mask, name, *parameters)
        saved = results[3:]
        args = (teacher, tau, weight * mask, *saved, None, None, None, name, *parameters)
        ops.token_divergence_backward_(student, *args)
        results.append(student.clone())
    return results, traffic


def lanes_read_again(student, teacher, rows, parts, divergence):
    """Bytes that the parts of some rows are read beside the sweeps, see `test_traffic.py`: of each, its peak's lane."""
    config = launch.launch_config("forward", divergence.name, VOCAB, student, teacher)
    if divergence.sweeps == 2:
        config["TILES"] = 1
    number, length = launch.row_parts(config, student[..., 0].numel(), VOCAB, student.device)
    assert number == parts
    lanes, width, total = config["LANES"], config["WIDTH"], 0
    for row in student[rows].float():
        for first in range(0, VOCAB, length):
            part = row[first : min(first + length, VOCAB)]
            lane = part.argmax() // width % lanes
            entries = int((torch.arange(len(part)) // width % lanes == lane).sum())
            total += 2 * entries * student.element_size() + (entries + divergence.sweeps) * teacher.element_size()
    return total


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon()], ids=name_of)
def test_bytes_launches_and_bits(divergence, parts=3):
    """What a whole row reads and writes; a masked token reads nothing; a rerun gives the same bits, in place, too."""
    mask = torch.tensor([[True, False, True]])
    student, again, teacher = (guarded(logits(1, 3, VOCAB, seed=seed)) for seed in (1, 1, 2))
    student[~mask], again[~mask], teacher[~mask] = math.nan, math.nan, math.nan
    kept = student._base.isnan().sum()
    with split_into(parts):
        more = lanes_read_again(student, teacher, mask, parts, divergence)
        results, traffic = call(student, teacher, mask, divergence)
        repeated, _ = call(again, teacher, mask, divergence)
    for a, b in zip(results, repeated, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
    assert kept - student._base.isnan().sum() == VOCAB  # no guard was overwritten, and the masked row is zeros
    row = VOCAB * 4
    assert traffic.passes() == ((2 + 2 * divergence.sweeps + 2) * 2 * row + more, 3 * row)
    faults = [fault for fault in traffic.faults() if "of Sums" not in fault and "PartPeak" not in fault]
    # Of masked tokens, the parts store nothing.
    assert all("row_parts_kernel" in fault and "never written and 0 more" in fault for fault in faults), faults
    second = ["merge_normalizers_kernel", "token_terms_fwd_kernel", "merge_terms_kernel"]
    assert [x.kernel for x in traffic] == [
        "row_parts_kernel", "merge_stats_kernel", "row_parts_kernel",
        *(["merge_one_sweep_kernel"] if divergence.sweeps == 1 else second), "token_divergence_bwd_kernel",
    ]  # fmt: skip


def contiguous(dtype, seed, vocab=VOCAB):
    return logits(1, 3, vocab, dtype=dtype, seed=seed)


def shifted(dtype, seed, vocab=VOCAB):
    return logits(1, 4, vocab, dtype=dtype, seed=seed)[:, 1:]


@pytest.mark.parametrize(
    ("student", "teacher", "skewed", "width"),
    [
        (contiguous(BF16, 1), contiguous(BF16, 2), True, 8),
        (shifted(BF16, 1), shifted(BF16, 2), True, 8),
        (shifted(BF16, 1), contiguous(BF16, 2), False, 1),
        (contiguous(BF16, 1, VOCAB + 700), contiguous(FP32, 2), False, 1),
        (contiguous(BF16, 1, 1792), contiguous(BF16, 2, 1808), False, 8),
    ],
    ids=["skewed", "views", "apart", "longer student", "aligned"],
)
@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon()], ids=name_of)
def test_rows_wherever_they_start(divergence, student, teacher, skewed, width):
    """Every row starts at another place modulo 8 entries; the gradient in place, and beyond the common vocabulary."""
    vocab = min(student.shape[-1], teacher.shape[-1])
    labels = tokens(vocab, *student.shape[:2])
    labels[0, 1] = -100
    numbers = []
    for parts in (1, 7):
        with split_into(parts):
            config = launch.launch_config("forward", divergence.name, vocab, student, teacher)
            assert (config["SKEWED"], config["WIDTH"]) == (skewed, width)
            assert (launch.row_parts(config, 3, vocab, student.device)[0] > 3) == (parts == 7)
            leaf = produced(student.clone(memory_format=torch.preserve_format).requires_grad_())
            out = adakd_loss(leaf, teacher, labels, divergence=divergence, focus_ratio=0.5, ce_weight=0.1, inplace=True)
            numbers.append((*out[:4], *torch.autograd.grad(out.loss, leaf)))
    for whole, split in zip(*numbers, strict=True):
        unit = 2.0**-8 if whole.dtype == BF16 else 4e-6
        assert torch.allclose(split, whole, rtol=unit, atol=1e-6 * whole.abs().max().item())
    assert not numbers[1][-1][..., vocab:].any() and numbers[1][-1][0, -1, vocab - 3 : vocab].all()


@pytest.mark.parametrize(("vocab", "parts"), [(3 * 512 - 1, 3), (3 * 512 + 1, 4)])
def test_the_last_part_has_an_entry_and_up_to_seven_more_than_a_part(vocab, parts):
    """Rows begin up to seven entries after an aligned one: the last part of the first ends one step later for it."""
    student, teacher = logits(1, 3, vocab, dtype=BF16, seed=1), logits(1, 3, vocab, dtype=BF16, seed=2)
    with split_into(parts):
        config = launch.launch_config("forward", "reverse_kl", vocab, student, teacher)
        assert config["SKEWED"] and launch.row_parts(config, 3, vocab, student.device)[0] == parts
        found = gradient(lambda s: token_divergence(s, teacher, 1.0, "reverse_kl"), student)
    exact = gradient(lambda s: reference.token_divergence(s, teacher.double(), 1.0, "reverse_kl"), student.double())
    assert torch.allclose(found.double(), exact, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("divergence", [JensenShannon()], ids=name_of)
def test_terms_of_a_shard(divergence):
    """The operator of rows that are split over the vocabulary adds the parts up."""
    student, teacher = logits(1, 3, VOCAB, seed=1), logits(1, 3, VOCAB, seed=2)
    mask, of = torch.tensor([[True, False, True]]), torch.tensor([9.0, 40.0, 9.0, 50.0]).view(4, 1, 1).repeat(1, 1, 3)
    args = (torch.ones(1, 3), mask, of, torch.full((1, 3), 0.3), torch.tensor([[1700, 0, -1]]))
    found = []
    for parts in (1, 7):
        with split_into(parts):
            found.append(ops.token_terms(student, teacher, *args, divergence.name, *divergence.parameters))
    for whole, split in zip(*found, strict=True):
        assert torch.allclose(whole, split, rtol=1e-5) and whole[mask].all() and not split[~mask].any()


def test_how_many_parts():
    """Programs that 132 multiprocessors take at once, in one wave; parts of 8,192 entries and more."""

    def parts(tokens, vocab=151_936):
        return launch.wanted_parts(tokens, vocab, torch.device("cuda", 0))

    with mock.patch.object(launch, "machine", lambda device: launch.Machine(132, 50 * 2**20)):
        assert [parts(tokens) for tokens in (1, 16, 64, 131, 132, 4096)] == [18, 18, 8, 4, 1, 1]
        assert [parts(1, vocab) for vocab in (8191, 16_383, 16_384, 50_257, 2_000_000)] == [1, 1, 2, 6, 32]
        assert [parts(4096, vocab) for vocab in (262_143, 262_144, 524_288)] == [1, 2, 4]
    assert launch.machine(torch.device("cpu")).processors == 0
    assert launch.wanted_parts(1, 151_936, torch.device("cpu")) == 1
