"""The numerics contract, line by line: on the reference (fast), the C++ kernels (native), in the interpreter
(interpret), on a GPU (gpu)."""

from __future__ import annotations

import math

import pytest
import torch

from adakd_kernels import adakd_loss, ops, reference, token_difficulty, token_divergence
from instruments.devices import produced

from .cases import (
    DIVERGENCES,
    DTYPES,
    ONE_OF_EACH,
    VOCABULARIES,
    assert_close_as_eager,
    gradient,
    logits,
    name_of,
    temperatures,
    tokens,
    uniform,
)

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.interpret, pytest.mark.gpu]
INF = float("inf")
# The long rows take their time in the interpreter; fp16 and fp64 differ from the others in nothing but the cast.
TYPES_AND_VOCABULARIES = [
    (dtype, vocab)
    for dtype in DTYPES
    for vocab in VOCABULARIES
    if vocab < 10_000 or dtype in (torch.bfloat16, torch.float32)
]


def rows_for(vocab: int) -> tuple[int, int]:
    """Few rows where a row is long: the interpreter pays for every tile."""
    return (2, 3) if vocab < 10_000 else (1, 2)


@pytest.mark.parametrize("dtype, vocab", TYPES_AND_VOCABULARIES, ids=name_of)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_divergence_and_gradient_are_as_exact_as_eager(divergence, dtype, vocab):
    b, l = rows_for(vocab)
    student, teacher = logits(b, l, vocab, dtype=dtype, seed=1), logits(b, l, vocab, dtype=dtype, seed=2)
    tau = temperatures(b, l)
    weight = torch.linspace(-1.0, 2.0, b * l, dtype=torch.float64).view(b, l)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def exact(s):
        return reference.token_divergence(s, teacher.double(), tau, divergence)

    def eager(s):
        return reference.token_divergence(s, teacher, tau, divergence)

    def ours(s):
        return token_divergence(s, teacher, tau, divergence)

    value = ours(student)
    assert value.dtype == acc
    assert_close_as_eager(value, eager(student), exact(student.double()))
    grad = gradient(ours, student, weight)
    assert grad.dtype == dtype
    assert_close_as_eager(grad, gradient(eager, student, weight), gradient(exact, student.double(), weight))


@pytest.mark.parametrize("dtype, vocab", TYPES_AND_VOCABULARIES, ids=name_of)
def test_statistics_are_as_exact_as_eager(dtype, vocab):
    b, l = rows_for(vocab)
    student, teacher = logits(b, l, vocab, dtype=dtype, seed=3), logits(b, l, vocab, dtype=dtype, seed=4)
    mask = torch.ones(b, l, dtype=torch.bool)
    difficulty, normalizers_1 = ops.token_stats(student, teacher, mask)
    of = reference.Normalizers.of(normalizers_1)
    assert_close_as_eager(
        difficulty,
        reference.squared_hellinger(student, teacher),
        reference.squared_hellinger(student.double(), teacher.double()),
    )
    for z, z_max, z_sum in ((student, of.max_s, of.sum_s), (teacher, of.max_t, of.sum_t)):
        assert torch.equal(z_max.double(), z.double().amax(-1))
        log_normalizer = z_max.double() + z_sum.double().log()
        eager = z.to(z_max.dtype).logsumexp(-1)
        assert_close_as_eager(log_normalizer.to(z_max.dtype), eager, z.double().logsumexp(-1))


@pytest.mark.parametrize("distance", [1e-4, 3e-4, 1e-3, 1e-2, 0.1, 0.5])
@pytest.mark.parametrize("vocab", [1003, 4097])
def test_hellinger_does_not_cancel(distance, vocab):
    teacher = logits(1, 4, vocab, seed=5)
    step = logits(1, 4, vocab, seed=6, scale=1.0)
    student = teacher + 2.8 * distance * step + torch.tensor([0.0, 3.0, -40.0, 700.0]).view(1, 4, 1)
    exact = reference.squared_hellinger(student.double(), teacher.double()).sqrt()
    assert (exact > 0.3 * min(distance, 0.5)).all() and (exact < 1.0).all()
    relative = (token_difficulty(student, teacher).double().sqrt() - exact).abs() / exact
    assert (relative <= 1e-3).all(), relative


@pytest.mark.parametrize("vocab", [7, 4097])
def test_hellinger_of_far_and_disjoint_rows(vocab):
    student, teacher = torch.full((5, vocab), -30.0), torch.full((5, vocab), -30.0)
    student[0, 0], teacher[0, vocab - 1] = 0.0, 0.0  # late peak in the teacher
    student[1, vocab - 1], teacher[1, 0] = 0.0, 0.0  # and in the student
    student[2, 2], teacher[2, 2] = 0.0, 0.0
    half = vocab // 2
    student[3, :half], teacher[3, half:] = -INF, -INF  # disjoint supports
    student[4, 0], teacher[4, 1] = -16.4, -16.4  # rows that differ in two entries only
    exact = reference.squared_hellinger(student.double(), teacher.double())
    assert exact[0] > 0.999 and exact[3] > 1.0 - 1e-12
    assert torch.allclose(token_difficulty(student, teacher).double(), exact, rtol=1e-5, atol=1e-12)


def test_hellinger_when_the_rows_drift_apart_between_tiles():
    """The frame of the first tile holds nowhere else: shifts of every size against each other, in both directions."""
    vocab, tile = 3 * 4096 + 5, 4096
    teacher = logits(6, vocab, seed=7, scale=1.0)
    student = teacher.clone()
    for row, shift in enumerate((0.5, -0.5, 3.0, -3.0, 40.0, -40.0)):
        student[row, tile : 2 * tile] += shift
        teacher[row, 2 * tile :] += 0.5 * shift
    exact = reference.squared_hellinger(student.double(), teacher.double())
    assert torch.allclose(token_difficulty(student, teacher).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_hellinger_of_a_confident_token_outside_the_first_tile(noise):
    """Both rows agree on one late entry; what they differ in is far below it, and the first tile is shifted."""
    student, teacher = logits(2, 8200, seed=40, scale=1.0), logits(2, 8200, seed=41, scale=1.0)
    student, teacher = noise * student, noise * teacher
    student[:, :4096] += 2.0
    student[:, 8000], teacher[:, 8000] = 24.0, 24.0
    exact = reference.squared_hellinger(student.double(), teacher.double()).sqrt()
    assert (exact > 1e-4).all() and (exact < 1e-2).all()
    assert torch.allclose(token_difficulty(student, teacher).double().sqrt(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_equal_rows_give_zero_and_a_constant_changes_nothing(divergence):
    teacher = logits(3, 5003, seed=8)
    teacher[2] = 1.0  # uniform: every entry rounds the same way
    for constant in (0.0, 64.0, -1024.0):
        # the constant is added to the values that fp32 holds exactly
        same = (teacher * 64).round() / 64
        student = same + constant
        value = token_divergence(student, same, 0.7, divergence)
        assert value.abs().max() <= 1e-6
        grad = gradient(lambda s, same=same: token_divergence(s, same, 0.7, divergence), student)
        p = (same / 0.7).softmax(-1)
        assert grad.abs().max() <= 1e-6 * max(1.0, p.max().item())
        assert (token_difficulty(student, same) <= 1e-12).all()
    moved = token_divergence(same + 64.0, logits(3, 5003, seed=9), 0.7, divergence)
    still = token_divergence(same, logits(3, 5003, seed=9), 0.7, divergence)
    assert torch.allclose(moved, still, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_divergence_is_not_negative(divergence):
    teacher = logits(8, 1003, seed=10)
    for distance in (1e-4, 1e-2, 1.0, 10.0):
        student = teacher + distance * logits(8, 1003, seed=11, scale=1.0)
        value = token_divergence(student, teacher, 1.0, divergence)
        assert (value >= -1e-6).all()


@pytest.mark.parametrize("student_vocab, teacher_vocab", [(1003, 1019), (1019, 1003), (7, 4097), (2500, 1003)])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_vocabularies_of_different_length(divergence, student_vocab, teacher_vocab):
    student, teacher = logits(2, 2, student_vocab, seed=12), logits(2, 2, teacher_vocab, seed=13)
    common = min(student_vocab, teacher_vocab)
    tau = temperatures(2, 2)
    cut_s, cut_t = student[..., :common].contiguous(), teacher[..., :common].contiguous()
    assert torch.equal(
        token_divergence(student, teacher, tau, divergence), token_divergence(cut_s, cut_t, tau, divergence)
    )
    assert torch.equal(token_difficulty(student, teacher), token_difficulty(cut_s, cut_t))
    grad = gradient(lambda s: token_divergence(s, teacher, tau, divergence), student)
    assert torch.equal(grad[..., :common], gradient(lambda s: token_divergence(s, cut_t, tau, divergence), cut_s))
    assert torch.equal(grad[..., common:], torch.zeros_like(grad[..., common:]))


@pytest.mark.parametrize("vocab", [7, 4097])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_minus_infinity_takes_an_entry_out(divergence, vocab):
    student, teacher = logits(6, vocab, seed=14), logits(6, vocab, seed=15)
    student[0, 2] = -INF
    teacher[1, 3] = -INF
    student[2, 4], teacher[2, 4] = -INF, -INF
    student[3, : vocab // 2] = -INF
    teacher[4, : vocab - 2] = -INF  # one entry left, in the last tile
    teacher[5, 1:] = -INF
    tau, weight = temperatures(6), torch.linspace(-1.0, 1.5, 6, dtype=torch.float64)

    def exact(s):
        return reference.token_divergence(s, teacher.double(), tau, divergence)

    value = token_divergence(student, teacher, tau, divergence)
    eager = reference.token_divergence(student, teacher, tau, divergence)
    assert_close_as_eager(value, eager, exact(student.double()))
    grad = gradient(lambda s: token_divergence(s, teacher, tau, divergence), student, weight)
    expected = gradient(exact, student.double(), weight)
    assert_close_as_eager(grad, expected.float(), expected, ulps=16)
    out = (student == -INF) | (teacher == -INF)
    assert torch.equal(grad[out], torch.zeros_like(grad[out]))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_large_finite_negative_logits_do_not_make_nan(divergence):
    """Masks are often the smallest finite number of the type instead of −inf."""
    lowest = torch.finfo(torch.float32).min
    student, teacher = logits(3, 1003, seed=16), logits(3, 1003, seed=17)
    student[0, :500], teacher[1, 500:], student[2, 3], teacher[2, 3] = lowest, lowest, lowest, lowest
    value = token_divergence(student, teacher, 0.6, divergence)
    grad = gradient(lambda s: token_divergence(s, teacher, 0.6, divergence), student)
    assert not value.isnan().any() and not grad.isnan().any()
    assert torch.allclose(value[2], token_divergence(logits(3, 1003, seed=16), teacher, 0.6, divergence)[2], rtol=1.0)
    assert (token_difficulty(student, teacher) <= 1.0).all()


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_an_empty_row_is_an_ignored_token(divergence):
    student, teacher, labels = logits(6, 1003, seed=18), logits(6, 1003, seed=19), torch.arange(6)
    student[1], teacher[3] = -INF, -INF
    kept = torch.tensor([0, 2, 4, 5])
    value = token_divergence(student, teacher, 1.3, divergence)
    assert torch.equal(value[torch.tensor([1, 3])], torch.zeros(2))
    assert torch.equal(value[kept], token_divergence(student[kept], teacher[kept], 1.3, divergence))
    grad = gradient(lambda s: token_divergence(s, teacher, 1.3, divergence), student)
    assert torch.equal(grad[1], torch.zeros(1003)) and torch.equal(grad[3], torch.zeros(1003))

    whole = adakd_loss(student, teacher, labels, divergence=divergence, focus_ratio=0.5, ce_weight=0.2)
    without = adakd_loss(
        student[kept], teacher[kept], labels[kept], divergence=divergence, focus_ratio=0.5, ce_weight=0.2
    )
    assert torch.allclose(whole.loss, without.loss, rtol=1e-6)
    assert torch.equal(whole.selected[kept], without.selected) and not whole.selected[[1, 3]].any()


@pytest.mark.parametrize("place", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_nan_in_a_valid_row_is_seen(divergence, place):
    student, teacher = logits(3, 4100, seed=20), logits(3, 4100, seed=21)
    (student if place == "student" else teacher)[1, 4098] = math.nan
    value = token_divergence(student, teacher, 1.0, divergence)
    assert value.isnan().tolist() == [False, True, False]
    grad = gradient(lambda s: token_divergence(s, teacher, 1.0, divergence), student)
    assert grad[1].isnan().any() and not grad[[0, 2]].isnan().any()
    assert token_difficulty(student, teacher).isnan().tolist() == [False, True, False]
    labels = torch.tensor([5, 6, 7])
    assert adakd_loss(student, teacher, labels, divergence=divergence, focus_ratio=0.4).loss.isnan()
    labels[1] = -100
    assert not adakd_loss(student, teacher, labels, divergence=divergence, focus_ratio=0.4).loss.isnan()


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_no_valid_token(ce_weight):
    student, teacher = logits(2, 3, 101, seed=22, grad=True), logits(2, 3, 101, seed=23)
    out = adakd_loss(student, teacher, torch.full((2, 3), -100), focus_ratio=0.5, ce_weight=ce_weight)
    assert out.loss.item() == 0.0 and out.loss.requires_grad
    out.loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert not out.selected.any() and torch.equal(out.temperature, torch.ones(2, 3))


def test_no_token_at_all():
    student = torch.zeros(0, 11, requires_grad=True)
    out = adakd_loss(student, torch.zeros(0, 11), torch.zeros(0, dtype=torch.long))
    out.loss.backward()
    assert out.loss.item() == 0.0 and out.selected.shape == (0,) and student.grad.shape == (0, 11)


def test_one_valid_token_keeps_the_base_temperature():
    student, teacher = logits(4, 101, seed=24), logits(4, 101, seed=25)
    labels = torch.tensor([-100, -100, 3, -100])
    out = adakd_loss(student, teacher, labels, focus_ratio=0.1, base_temperature=1.7)
    assert out.selected.tolist() == [False, False, True, False]
    assert out.temperature[2] == 1.7
    expected = 1.7**2 * reference.token_divergence(student[2].double(), teacher[2].double(), 1.7, "reverse_kl")
    assert math.isclose(out.loss.item(), expected.item(), rel_tol=1e-5)


VIEWS = {
    "2-D": lambda z: z.reshape(-1, z.shape[-1]),
    "last position cut off": lambda z: torch.cat((z, z[:, :1] + 1), 1)[:, :-1],
    "time first in memory": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "every second position": lambda z: torch.stack((z, z + 1), 2).flatten(1, 2)[:, ::2],
    "padded rows": lambda z: torch.nn.functional.pad(z, (0, 13))[..., : z.shape[-1]],
    "a row offset in memory": lambda z: torch.cat((torch.zeros(3), z.flatten()))[3:].view_as(z),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_strided_views(view, inplace):
    student, teacher = logits(3, 5, 1003, seed=26), logits(3, 5, 1003, seed=27)
    labels = tokens(1003, 3, 5)
    labels[1, 2] = -100

    def loss(s, t, targets):
        return adakd_loss(s, t, targets, focus_ratio=0.5, ce_weight=0.1, inplace=inplace)

    plain = student.clone().requires_grad_()
    expected = loss(plain * 1.0, teacher, labels)
    expected.loss.backward()
    leaf = student.clone().requires_grad_()
    viewed = VIEWS[view](leaf * 1.0)
    assert viewed.is_contiguous() is (view in ("2-D", "a row offset in memory"))
    out = loss(viewed, VIEWS[view](teacher), labels.flatten() if view == "2-D" else labels)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.token_loss.flatten(), expected.token_loss.flatten())
    assert torch.equal(leaf.grad, plain.grad)


def test_one_teacher_row_for_all(divergence="reverse_kl"):
    student, row = logits(2, 3, 1003, seed=28), logits(1, 1, 1003, seed=29)
    expanded, copied = row.expand(2, 3, 1003), row.expand(2, 3, 1003).contiguous()
    assert torch.equal(token_divergence(student, expanded), token_divergence(student, copied))


def test_offsets_beyond_31_bits(unpoisoned):
    """Two rows more than 2³¹ entries apart; only their pages of the storage are ever touched."""
    vocab, apart = 1003, 2**31 + 16
    storage = torch.empty(apart + vocab, dtype=torch.bfloat16)
    student = storage.as_strided((1, 2, vocab), (apart * 2, apart, 1))
    plain, teacher = logits(1, 2, vocab, dtype=torch.bfloat16, seed=30), logits(1, 2, vocab, seed=31)
    student.copy_(plain)
    assert torch.equal(token_difficulty(student, teacher), token_difficulty(plain, teacher))
    expected = gradient(lambda s: token_divergence(s, teacher, 0.8), plain)
    far = produced(student.detach().requires_grad_())
    value = token_divergence(far, teacher, 0.8, inplace=True)
    assert torch.equal(value, token_divergence(plain, teacher, 0.8))
    value.sum().backward()
    assert torch.equal(storage.as_strided((1, 2, vocab), (apart * 2, apart, 1)), expected)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_reruns_agree_bit_for_bit(divergence):
    student, teacher = logits(2, 4, 4500, dtype=torch.bfloat16, seed=32), logits(2, 4, 4500, seed=33)
    labels = torch.arange(8).view(2, 4)

    def run():
        leaf = student.clone().requires_grad_()
        out = adakd_loss(leaf, teacher, labels, divergence=divergence, focus_ratio=0.6, ce_weight=0.1)
        out.loss.backward()
        return out, leaf.grad

    (first, first_grad), (second, second_grad) = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first_grad, second_grad)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_gradient_rows_sum_to_zero_and_a_permutation_permutes(divergence):
    student, teacher = logits(3, 1003, dtype=torch.float64, seed=34), logits(3, 1003, dtype=torch.float64, seed=35)
    order = uniform(1003, seed=1).argsort()
    grad = gradient(lambda s: token_divergence(s, teacher, 0.9, divergence), student)
    assert (grad.sum(-1).abs() <= 1e-12 * grad.abs().sum(-1)).all()
    value = token_divergence(student, teacher, 0.9, divergence)
    permuted = token_divergence(student[:, order], teacher[:, order], 0.9, divergence)
    assert torch.allclose(value, permuted, rtol=1e-12)
    permuted_grad = gradient(lambda s: token_divergence(s, teacher[:, order], 0.9, divergence), student[:, order])
    assert torch.allclose(permuted_grad, grad[:, order], rtol=1e-10, atol=1e-15)


def test_total_variation_has_one_sign_in_both_directions():
    """Where p and q nearly meet, rounding decides on the sign; were it not the same, a gradient would not sum to 0."""
    student = logits(1, 100, 24, seed=8, scale=20.0)
    teacher = student.where(logits(1, 100, 24, seed=9, scale=1.0) > 0.0, student - 1.0)
    found = gradient(lambda s: token_divergence(s, teacher, 0.8, "total_variation"), student)
    assert found.double().sum(-1).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_weight_zero_is_as_if_the_row_were_absent():
    student, teacher = logits(5, 1003, seed=36), logits(5, 1003, seed=37)
    student[2] = math.nan  # would be seen if the row were read
    mask = torch.tensor([True, True, False, True, True])
    value = token_divergence(student, teacher, 1.1, "jeffreys", mask)
    assert torch.equal(value[mask], token_divergence(student[mask], teacher[mask], 1.1, "jeffreys"))
    assert value[2] == 0
    grad = gradient(lambda s: token_divergence(s, teacher, 1.1, "jeffreys", mask), student)
    assert torch.equal(grad[2], torch.zeros(1003))
    weight = torch.tensor([1.0, 0.0, 5.0, 1.0, 1.0])
    weighted = gradient(lambda s: token_divergence(s, teacher, 1.1, "jeffreys", mask), student, weight)
    assert torch.equal(weighted[1:3], torch.zeros(2, 1003)) and torch.equal(weighted[3:], grad[3:])


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_gradcheck(divergence, unpoisoned):
    student = logits(1, 3, 7, dtype=torch.float64, seed=38, scale=1.0, grad=True)
    teacher = logits(1, 3, 9, dtype=torch.float64, seed=39, scale=1.0)
    tau, mask = temperatures(1, 3), torch.tensor([[True, True, False]])

    def check(function):
        # entry by entry, but in the interpreter, which pays for each evaluation, along one direction
        interpreted = ops.backend("cpu").name == "triton-interpreter"
        assert torch.autograd.gradcheck(function, (student,), fast_mode=interpreted)

    check(lambda s: token_divergence(s, teacher, tau, divergence, mask))

    # with every token selected and one temperature nothing is detached, so the whole loss is differentiated
    labels = torch.tensor([[1, -100, 5]])
    options = {"divergence": divergence, "temperature_scale": 0.0, "base_temperature": 0.8, "ce_weight": 0.25}
    check(lambda s: adakd_loss(s, teacher, labels, **options).loss)
