"""Losses of rows that are split over the vocabulary, against those of whole rows.

On the reference (fast), the C++ kernels (native), in the interpreter (interpret). The ranks are threads here, and
processes in `test_vocab_ranks.py`.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from adakd_kernels import (
    AdaKDLoss,
    TokenChoice,
    VocabParallel,
    adakd_loss,
    linear_adakd_loss,
    linear_token_divergence,
    reference,
    token_difficulty,
    token_divergence,
)
from adakd_kernels.checks import DIFFICULTIES
from adakd_kernels.ops import shards

from .cases import (
    CONFIDENT,
    DIVERGENCES,
    DRIFTING,
    EXTREME,
    FAR,
    ONE_OF_EACH,
    check_divergence,
    logits,
    name_of,
    some,
    stack,
    temperatures,
    tokens,
)
from .conftest import INTERPRETING
from .simulated_ranks import on_ranks

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.interpret]
VOCAB = 37 if INTERPRETING else 4500
# Where the shards begin and end; of the last one but one, a rank has no column.
CUTS = {
    2: lambda vocab: (0, vocab // 3, vocab),
    3: lambda vocab: (0, vocab // 2 + 1, vocab // 2 + 1, vocab),
    4: lambda vocab: (0, 5, vocab // 4, vocab - 3, vocab),
}
DEEP = 128.0  # ulp of a mass, as in `test_any_row.py`


@pytest.fixture(autouse=True)
def without_processes(monkeypatch):
    """The ranks are threads, so there is no process group to look for."""
    monkeypatch.setattr("adakd_kernels.vocab_parallel.check_vocab_parallel", lambda value: None)


def equal(a, b):
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def split_divergence(student, teacher, tau, divergence, *, ranks):
    """`token_divergence` of the whole rows; its gradient is put together from those of the shards."""
    vocab = min(student.shape[-1], teacher.shape[-1])
    each, _ = on_ranks(
        CUTS[ranks](vocab),
        vocab,
        lambda rank, columns: token_divergence(
            student[..., columns], teacher[..., columns], tau, divergence, vocab_parallel=rank
        ),
    )
    assert all(equal(each[0], value) for value in each)
    return each[0] + sum(value - value.detach() for value in each[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_rows_of_any_kind(divergence, ranks, dtype):
    """By the rule of the whole rows: far, confident, drifting and extreme ones."""
    check = partial(check_divergence, divergence=divergence, function=partial(split_divergence, ranks=ranks))
    far = some({**FAR, **DRIFTING, **EXTREME}, *list({**FAR, **DRIFTING, **EXTREME})[ranks % 3 :: 3])
    confident = some(CONFIDENT, "agree 1e-06", "surer 1e-03") if INTERPRETING else CONFIDENT
    # What is rounded once more than in whole rows: normalisers, c of the peak, and the numbers of the messages.
    for cases, ulps in ((confident, 4.0), (far, DEEP)):
        check(*stack(cases, VOCAB, dtype), names=list(cases), ulps=ulps)


def near_and_missing_rows(dtype=torch.float32, vocab=VOCAB):
    """(8, V) rows: ordinary, nearly equal, equal, with an offset, and with −inf in entries, in a shard, in the row."""
    student, teacher = logits(8, vocab, dtype=dtype, seed=1), logits(8, vocab, dtype=dtype, seed=2)
    teacher[1] = student[1] + 1e-3 * logits(vocab, seed=3).to(dtype)
    teacher[2] = student[2]
    teacher[3] = student[3] + 7.0
    student[4, ::3] = -math.inf
    teacher[4, ::5] = -math.inf
    student[5, : vocab // 2 + 1] = -math.inf
    teacher[6, vocab // 4 :] = -math.inf
    student[6, : vocab // 4] = -math.inf  # no entry is finite on both sides
    student[7] = -math.inf
    return student, teacher


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_near_rows_and_missing_entries(divergence, ranks):
    student, teacher = near_and_missing_rows()
    tau = temperatures(8).float()
    check_divergence(
        student, teacher, tau, divergence, ulps=DEEP, function=partial(split_divergence, ranks=ranks)
    )  # fmt: skip


def batch_of_logits(dtype=torch.float32):
    """(2, 9, V) logits of either side, the teacher's with 5 entries more, and labels, some of them ignored."""
    student, teacher = logits(2, 9, VOCAB, dtype=dtype, seed=5), logits(2, 9, VOCAB + 5, dtype=dtype, seed=6)
    teacher[0, :3, :VOCAB] = student[0, :3] + 1e-2 * teacher[0, :3, :VOCAB]
    student[1, 2, : VOCAB // 2] = -math.inf
    labels = tokens(VOCAB, 2, 9, seed=7)
    labels[0, 4:6] = -100
    labels[1, 2] = VOCAB - 1
    return student, teacher, labels


def cut(teacher, columns, vocab=VOCAB):
    """The teacher's columns of a shard; the last one has its other entries, too."""
    return teacher[..., columns.start : columns.stop if columns.stop < vocab else None]


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_loss_of_a_batch(divergence, ranks, ce_weight):
    student, teacher, labels = batch_of_logits()
    options = {"divergence": divergence, "focus_ratio": 0.6, "ce_weight": ce_weight}

    def whole(dtype):
        leaf = student.to(dtype, copy=True).requires_grad_()
        out = adakd_loss(leaf, teacher.to(dtype), labels, **options)
        out.loss.backward()
        return out, leaf.grad

    def shard(rank, columns):
        leaf = student[..., columns].clone().requires_grad_()
        out = adakd_loss(leaf, cut(teacher, columns), labels, vocab_parallel=rank, **options)
        out.loss.backward()
        return out, leaf.grad

    (one, one_grad), (exact, exact_grad) = whole(torch.float32), whole(torch.float64)
    found, meeting = on_ranks(CUTS[ranks](VOCAB), VOCAB, shard)
    first, grad = found[0][0], torch.cat([grad for _, grad in found], dim=-1)
    for out, _ in found:
        assert all(torch.equal(a, b) for a, b in zip(out, first, strict=True))
    assert torch.equal(first.selected, one.selected)
    assert torch.allclose(first.loss.double(), exact.loss, rtol=1e-6, atol=0.0)
    ratio = (grad.double() * exact_grad).sum() / exact_grad.square().sum()
    assert abs(ratio - 1.0) <= 1e-6
    error, yardstick = ((x.double() - exact_grad).norm() for x in (grad, one_grad))
    assert error <= 2.0 * yardstick + 4.0 * torch.finfo(torch.float32).eps * exact_grad.norm()
    # Message 1 of six numbers a token, and one or two of at most six together.
    sizes = [len(numbers) for numbers in meeting.sent]
    assert sizes == {"jeffreys": [6, 6]}.get(divergence.name, [6, 4] if divergence.sweeps == 1 else [6, 4, 2])


@pytest.mark.parametrize("measure", DIFFICULTIES)
def test_difficulty(measure):
    student, teacher, labels = batch_of_logits()
    mask, valid_labels = labels != -100, labels.clamp_min(0)
    exact = token_difficulty(student.double(), teacher.double(), mask, measure, labels=valid_labels)
    each, _ = on_ranks(
        CUTS[4](VOCAB),
        VOCAB,
        lambda rank, columns: token_difficulty(
            student[..., columns], cut(teacher, columns), mask, measure, labels=valid_labels, vocab_parallel=rank
        ),
    )
    assert all(torch.equal(each[0], value) for value in each)
    assert torch.allclose(each[0].double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_labels_of_no_entry_rows_of_nothing_and_no_valid_token(ce_weight):
    student, teacher, labels = batch_of_logits()
    student[0, 0] = -math.inf
    labels[0, 1] = VOCAB  # no common entry
    for mine in (labels, torch.full_like(labels, -100)):
        whole = student.clone().requires_grad_()
        one = adakd_loss(whole, teacher, mine, ce_weight=ce_weight)
        one.loss.backward()

        def shard(rank, columns, mine=mine):
            leaf = student[..., columns].clone().requires_grad_()
            out = adakd_loss(leaf, cut(teacher, columns), mine, ce_weight=ce_weight, vocab_parallel=rank)
            out.loss.backward()
            return out, leaf.grad

        found, _ = on_ranks(CUTS[4](VOCAB), VOCAB, shard)
        grad = torch.cat([grad for _, grad in found], dim=-1)
        assert torch.allclose(found[0][0].loss, one.loss, rtol=1e-6, equal_nan=True)
        assert one.loss.isnan() == (ce_weight > 0 and bool((mine != -100).any()))
        assert torch.equal(grad.isnan(), whole.grad.isnan())
        difference = (grad - whole.grad).nan_to_num(0.0)
        assert difference.norm() <= 1e-5 * whole.grad.nan_to_num(0.0).norm()


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_nan_in_one_shard_is_loud_in_all(divergence):
    student, teacher = logits(3, VOCAB, seed=1), logits(3, VOCAB, seed=2)
    student[1, 2] = math.nan

    def shard(rank, columns):
        leaf = student[..., columns].clone().requires_grad_()
        d = token_divergence(leaf, teacher[..., columns], 2.0, divergence, vocab_parallel=rank)
        d.sum().backward()
        return d.detach(), leaf.grad

    for d, grad in on_ranks(CUTS[4](VOCAB), VOCAB, shard)[0]:
        assert d.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().all()
        assert not grad[[0, 2]].isnan().any()


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_in_place_shifted_and_columns_beyond_the_vocabulary(divergence):
    student, teacher, labels = batch_of_logits()
    student = torch.cat((student, logits(2, 9, 4, seed=9)), dim=-1)  # as many as the teacher has but for one
    options = {"divergence": divergence, "shift": True, "num_items": 11}
    whole = student.clone().requires_grad_()
    one = adakd_loss(whole, teacher, labels, **options)
    one.loss.backward()
    cuts, vocab = (0, 11, VOCAB + 2, VOCAB + 4), VOCAB + 4

    def shard(rank, columns):
        leaf = student[..., columns].clone().requires_grad_()
        own = leaf * 1.0
        out = adakd_loss(own, teacher[..., columns], labels, inplace=True, vocab_parallel=rank, **options)
        out.loss.backward()
        assert torch.equal(own.detach(), leaf.grad)
        return out, leaf.grad

    found, _ = on_ranks(cuts, vocab, shard)
    assert torch.allclose(found[0][0].loss, one.loss, rtol=1e-6)
    error = (torch.cat([grad for _, grad in found], -1) - whole.grad).norm() / whole.grad.norm()
    # Where p and q nearly meet, rounding decides on the sign in total variation.
    assert error <= (1e-3 if divergence.name == "total_variation" else 1e-5)
    # Entries that are common to no one get gradient 0, wherever the common ones end.
    found, _ = on_ranks((0, 11, VOCAB + 2, VOCAB + 4), VOCAB - 3, shard)
    assert all(not grad[..., max(0, VOCAB - 3 - start) :].any() for (_, grad), start in zip(found, cuts, strict=False))


def test_upstream_weights_and_a_choice():
    student, teacher, labels = batch_of_logits()
    mask, weight = labels != -100, temperatures(2, 9, seed=3).float()
    whole = student.clone().requires_grad_()
    (token_divergence(whole, teacher, weight, "skew_reverse_kl", mask) * weight).sum().backward()

    def shard(rank, columns):
        leaf = student[..., columns].clone().requires_grad_()
        d = token_divergence(
            leaf, cut(teacher, columns), weight, "skew_reverse_kl", mask, vocab_parallel=rank
        )  # fmt: skip
        (d * weight).sum().backward()
        return leaf.grad

    grads, meeting = on_ranks(CUTS[3](VOCAB), VOCAB, shard)
    assert torch.allclose(torch.cat(grads, -1), whole.grad, rtol=1e-4, atol=1e-7)
    assert [len(numbers) for numbers in meeting.sent] == [6, 2]

    of = adakd_loss(student, teacher, labels)
    choice = TokenChoice(of.difficulty, mask, of.temperature, of.selected, mask.sum(), torch.tensor(7.5))
    one = adakd_loss(student, teacher, labels, ce_weight=0.2, choice=choice)
    each, _ = on_ranks(
        CUTS[3](VOCAB),
        VOCAB,
        lambda rank, columns: adakd_loss(
            student[..., columns], cut(teacher, columns), labels, ce_weight=0.2, choice=choice, vocab_parallel=rank
        ),
    )
    assert all(torch.allclose(out.loss, one.loss, rtol=1e-6) for out in each)


HIDDEN = 16


def heads(vocab=VOCAB):
    """Hidden states (2, 30, H), weights of unequal vocabularies, a bias, labels."""
    hidden, teacher_hidden = logits(2, 30, HIDDEN, seed=1, scale=1.0), logits(2, 30, HIDDEN, seed=2, scale=1.0)
    weight, teacher_weight = logits(vocab, HIDDEN, seed=3, scale=1.0), logits(vocab + 5, HIDDEN, seed=4, scale=1.0)
    labels = tokens(vocab, 2, 30, seed=5)
    labels[1, 10:] = -100
    return hidden, weight, logits(vocab, seed=6, scale=1.0), teacher_hidden, teacher_weight, labels


def eager_gradients(divergence, options):
    """Gradients of hidden states, weight and bias by autograd through the logits."""
    hidden, weight, bias, teacher_hidden, teacher_weight, labels = heads()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    student = (leaves[0] @ leaves[1].T + leaves[2]).flatten(0, 1)
    teacher = options.get("teacher_scale", 1.0) * (teacher_hidden @ teacher_weight.T).flatten(0, 1)
    if cap := options.get("student_softcap"):
        student = cap * torch.tanh(student / cap)
    reference.adakd_loss(
        student, teacher, labels.flatten(), divergence, options["focus_ratio"],
        options.get("temperature_scale", 0.5), 1.0, options.get("difficulty", "hellinger"),
        options.get("ce_weight", 0.0),
    ).backward()  # fmt: skip
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce_weight": 0.3, "student_softcap": 20.0, "teacher_scale": 0.5},
        {"focus_ratio": 1.0, "temperature_scale": 0.0, "ce_weight": 0.2},
        {"focus_ratio": 1.0, "keep_bytes": 12 * 8 * VOCAB, "difficulty": "reverse_kl"},
    ],
    ids=["defaults", "cap", "one temperature", "kept"],
)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_loss_from_hidden_states(divergence, options, ranks):
    hidden, weight, bias, teacher_hidden, teacher_weight, labels = heads()
    options = {"divergence": divergence, "focus_ratio": 0.6, "chunk_tokens": 12, **options}

    def whole(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, bias)]
        teacher = teacher_hidden.to(dtype), teacher_weight.to(dtype)
        out = linear_adakd_loss(*leaves[:2], *teacher, labels, student_bias=leaves[2], **options)
        out.loss.backward()
        return out, [leaf.grad for leaf in leaves]

    def shard(rank, columns):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[columns], bias[columns])]
        other = teacher_weight[columns.start : columns.stop if columns.stop < VOCAB else None]
        out = linear_adakd_loss(
            *leaves[:2], teacher_hidden, other, labels, student_bias=leaves[2], vocab_parallel=rank, **options
        )
        out.loss.backward()
        return out, [leaf.grad for leaf in leaves]

    (_, one_grads), (exact, exact_grads) = whole(torch.float32), whole(torch.float64)
    if divergence.name == "total_variation":
        # Of whole rows the C++ kernels know Σg with more digits than a number holds: eager torch is the yardstick.
        one_grads = eager_gradients(divergence, options)
    found, meeting = on_ranks(CUTS[ranks](VOCAB), VOCAB, shard)
    for out, _ in found:
        assert all(torch.equal(a, b) for a, b in zip(out, found[0][0], strict=True))
    assert torch.equal(found[0][0].selected, exact.selected)
    assert torch.allclose(found[0][0].loss.double(), exact.loss, rtol=1e-6, atol=0.0)
    of_hidden, *of_rows = zip(*(grads for _, grads in found), strict=True)
    for grad, one, right in zip((sum(of_hidden), *map(torch.cat, of_rows)), one_grads, exact_grads, strict=True):
        error, yardstick = ((x.double() - right).norm() for x in (grad, one))
        assert error <= 2.0 * yardstick + 4.0 * torch.finfo(torch.float32).eps * right.norm()
    n = int((labels != -100).sum())
    selected = math.floor(options["focus_ratio"] * n) if not options.get("ce_weight") else n
    chunks = -(-selected // 12) if not options.get("keep_bytes") else -(-12 // 12) + -(-(n - 12) // 12)
    if options.get("temperature_scale") == 0.0:  # no token waits for the others: statistics come with each chunk
        assert len(meeting.sent) == chunks * (1 + divergence.sweeps)
    else:
        assert len(meeting.sent) == 1 + chunks * divergence.sweeps
    bytes_a_token = sum(numbers.numel() for numbers in meeting.sent) * 4 / n
    assert bytes_a_token <= (48 if options.get("difficulty", "hellinger") == "hellinger" else 52)


def test_modules_as_heads_and_the_sum_of_the_hidden_states_gradient():
    hidden, weight, _, teacher_hidden, teacher_weight, labels = heads()
    whole = hidden.clone().requires_grad_()
    linear_adakd_loss(whole, weight, teacher_hidden, teacher_weight[:VOCAB], labels).loss.backward()

    def shard(rank, columns):
        leaf, head = hidden.clone().requires_grad_(), nn.Linear(HIDDEN, columns.stop - columns.start, bias=False)
        head.weight.data = weight[columns].clone()
        teacher = partial(torch.nn.functional.linear, weight=teacher_weight[columns])
        loss_fn = AdaKDLoss(focus=1.0)
        out = loss_fn.from_hidden(leaf, head, teacher_hidden, teacher, labels, vocab_parallel=rank, reduce_hidden=True)
        out.loss.backward()
        return leaf.grad

    for grad in on_ranks(CUTS[2](VOCAB), VOCAB, shard)[0]:
        assert (grad - whole.grad).norm() <= 1e-5 * whole.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_hidden_states_gradient_where_its_parts_cancel(dtype):
    """The rows of a head have much in common, and the models' masses lie on different shards."""
    vocab, tokens_count = 2 * VOCAB, 12
    weight = (0.02 * logits(vocab, HIDDEN, seed=1) + logits(HIDDEN, seed=2)).to(dtype)
    hidden, teacher_hidden = (logits(2, tokens_count // 2, HIDDEN, seed=seed, scale=1.0).to(dtype) for seed in (3, 4))
    bias = (torch.arange(vocab) < VOCAB).to(dtype)
    labels = tokens(vocab, 2, tokens_count // 2, seed=5)

    def gradient(columns, to, **options):
        leaf, rows, of_rows = hidden.to(to, copy=True).requires_grad_(), weight[columns].to(to), bias[columns].to(to)
        linear_adakd_loss(
            leaf, rows, teacher_hidden.to(to), rows, labels, student_bias=of_rows, teacher_bias=-of_rows, **options
        ).loss.backward()
        return leaf.grad

    exact, one = (gradient(slice(None), to).double() for to in (torch.float64, dtype))
    found, _ = on_ranks(
        CUTS[2](vocab), vocab,
        lambda rank, columns: gradient(columns, dtype, vocab_parallel=rank, reduce_hidden=True),
    )  # fmt: skip
    for grad in found:
        assert grad.dtype == dtype
        assert (grad.double() - exact).norm() <= 2.0 * (one - exact).norm()


def test_masses_far_below_the_largest_and_of_shards_without_any():
    """Shares of the mass that underflow, and logarithms of none."""
    maxima = torch.tensor([0.0, -2000.0, -math.inf, 3e38], dtype=torch.float64).view(4, 1, 1)
    for rows, total in (((0, 1, 2), 2.0), ((0, 3), 2.0), ((2, 2), 0.0)):
        picked = maxima[list(rows)]
        sums = 2.0 * (picked != -math.inf).double()
        of = shards.row_masses(picked, sums, torch.ones(1, 1, dtype=torch.float64))
        assert of.sum.item() == pytest.approx(total)
        assert of.log.isfinite().all()
        assert of.share.sum().item() == pytest.approx(float(total > 0))


class TestErrors:
    """What does not fit is refused where it is given."""

    @pytest.fixture(autouse=True)
    def without_processes(self):
        """The checks are at work here."""

    @pytest.mark.parametrize(
        ("value", "error", "match"),
        [
            ((None, 0, 10), TypeError, "vocab_parallel must be a VocabParallel, got tuple"),
            (VocabParallel(None, -1, 10), ValueError, "vocab_parallel.first must be at least 0"),
            (VocabParallel(None, 0, 0), ValueError, "vocab_parallel.vocab_size must be at least 1"),
            (VocabParallel(None, 0.5, 10), TypeError, "vocab_parallel.first must be an integer"),
            (VocabParallel(None, 0, 10), ValueError, "needs a process group"),
        ],
    )
    @pytest.mark.parametrize("function", [adakd_loss, token_divergence, token_difficulty])
    def test_vocab_parallel(self, function, value, error, match):
        student = logits(3, 10)
        args = (tokens(10, 3),) if function is adakd_loss else ()
        with pytest.raises(error, match=match):
            function(student, student, *args, vocab_parallel=value)

    def test_shards_of_other_columns(self, monkeypatch):
        monkeypatch.setattr("adakd_kernels.vocab_parallel.check_vocab_parallel", lambda value: None)
        parallel = VocabParallel(None, 10, 30)
        with pytest.raises(
            ValueError, match=r"must hold the same columns of the vocabulary, got 7 and 8 from entry 10"
        ):
            token_divergence(logits(3, 7), logits(3, 8), vocab_parallel=parallel)
        with pytest.raises(ValueError, match=r"student_weight and teacher_weight must hold the same columns"):
            linear_adakd_loss(
                logits(3, 4), logits(7, 4), logits(3, 4), logits(8, 4), tokens(7, 3), vocab_parallel=parallel
            )

    def test_options_of_the_hidden_route(self, monkeypatch):
        monkeypatch.setattr("adakd_kernels.vocab_parallel.check_vocab_parallel", lambda value: None)
        args = (logits(3, 4), logits(7, 4), logits(3, 4), logits(7, 4), tokens(7, 3))
        with pytest.raises(ValueError, match="reduce_hidden must be False where the vocabulary is not split"):
            linear_adakd_loss(*args, reduce_hidden=True)
        with pytest.raises(ValueError, match="difficulty must not be 'jensen_shannon' where the vocabulary is split"):
            linear_adakd_loss(*args, difficulty="jensen_shannon", vocab_parallel=VocabParallel(None, 0, 7))
        with pytest.raises(ValueError, match="entropy_out must be None where the vocabulary is split"):
            linear_adakd_loss(*args, entropy_out=torch.empty(3), vocab_parallel=VocabParallel(None, 0, 7))
        assert linear_token_divergence(*args[:4]).shape == (3,)
