"""`adakd_loss`, `token_difficulty`, `token_divergence` and `AdaKDLoss` as users call them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from adakd_kernels import (
    AdaKDLoss,
    JensenShannon,
    LossAdaptiveFocus,
    adakd_loss,
    linear_adakd_loss,
    reference,
    token_difficulty,
    token_divergence,
)
from adakd_kernels.functional import DIFFICULTIES

from .cases import DIVERGENCES, gradient, logits, name_of, tokens, uniform

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.interpret, pytest.mark.gpu]


def batch(b=2, l=6, vocab=301, teacher_vocab=None, dtype=torch.float64, seed=0):
    """(student, teacher, labels) with some labels ignored."""
    student = logits(b, l, vocab, dtype=dtype, seed=seed)
    teacher = logits(b, l, teacher_vocab or vocab, dtype=dtype, seed=seed + 1)
    labels = tokens(min(vocab, teacher_vocab or vocab), b, l, seed=seed)
    labels[0, 1], labels[1, -1] = -100, -100
    return student, teacher, labels


@pytest.mark.parametrize(
    "divergence, measure",
    [(div, "hellinger") for div in DIVERGENCES] + [("reverse_kl", measure) for measure in DIFFICULTIES[1:]],
    ids=name_of,
)
def test_loss_and_gradient_equal_the_reference(divergence, measure):
    student, teacher, labels = batch(teacher_vocab=307)
    for ratio, ce_weight in ((1.0, 0.0), (0.45, 0.0), (0.7, 0.3)):

        def ours(s, ratio=ratio, ce_weight=ce_weight):
            return adakd_loss(
                s, teacher, labels, divergence=divergence, focus_ratio=ratio, ce_weight=ce_weight, difficulty=measure,
                temperature_scale=0.8, base_temperature=1.4,
            ).loss  # fmt: skip

        def plain(s, ratio=ratio, ce_weight=ce_weight):
            return reference.adakd_loss(
                s.flatten(0, 1),
                teacher.flatten(0, 1),
                labels.flatten(),
                divergence,
                ratio,
                0.8,
                1.4,
                measure,
                ce_weight,
            )

        assert torch.allclose(ours(student), plain(student), rtol=1e-10)
        assert torch.allclose(gradient(ours, student), gradient(plain, student), rtol=1e-8, atol=1e-13)


def test_the_outputs_are_those_of_the_equations():
    student, teacher, labels = batch()
    out = adakd_loss(student, teacher, labels, focus_ratio=0.5, divergence="forward_kl")
    valid = labels != -100
    assert torch.allclose(out.difficulty[valid], reference.squared_hellinger(student, teacher)[valid])
    assert (
        (out.difficulty[~valid] == 0).all() and (out.temperature[~valid] == 1).all() and not out.selected[~valid].any()
    )
    assert out.selected.sum() == 5
    chosen = out.difficulty[out.selected]
    assert chosen.min() >= out.difficulty[valid & ~out.selected].max()
    median = chosen.sort().values[2]
    tau = torch.exp(-0.5 * (out.difficulty - median) / (out.difficulty + median))
    assert torch.allclose(out.temperature[valid], tau[valid])
    per_token = out.temperature**2 * reference.token_divergence(student, teacher, out.temperature, "forward_kl")
    assert torch.allclose(out.token_loss, per_token.where(out.selected, 0.0))
    assert torch.allclose(out.loss, out.token_loss.sum() / 5)


def test_token_loss_is_differentiable_for_any_weight():
    student, teacher, labels = batch()
    weight = uniform(*labels.shape, seed=9) - 0.3
    out = adakd_loss(student, teacher, labels, focus_ratio=0.6)
    tau = out.temperature

    def plain(s):
        return (tau**2 * reference.token_divergence(s, teacher, tau, "reverse_kl")).where(out.selected, 0.0)

    grad = gradient(lambda s: adakd_loss(s, teacher, labels, focus_ratio=0.6).token_loss, student, weight)
    assert torch.allclose(grad, gradient(plain, student, weight), rtol=1e-8, atol=1e-14)


def test_shift_takes_labels_aligned_with_the_inputs():
    student, teacher, labels = batch()
    for ce_weight in (0.0, 0.4):
        shifted = adakd_loss(student, teacher, labels, shift=True, ce_weight=ce_weight, focus_ratio=0.5)
        by_hand = adakd_loss(
            student[:, :-1].contiguous(),
            teacher[:, :-1].contiguous(),
            labels[:, 1:],
            ce_weight=ce_weight,
            focus_ratio=0.5,
        )
        assert torch.allclose(shifted.loss, by_hand.loss, rtol=1e-12)
        grad = gradient(
            lambda s, a=ce_weight: adakd_loss(s, teacher, labels, shift=True, ce_weight=a, focus_ratio=0.5).loss,
            student,
        )
        expected = gradient(
            lambda s, a=ce_weight: (
                adakd_loss(s[:, :-1], teacher[:, :-1], labels[:, 1:], ce_weight=a, focus_ratio=0.5).loss
            ),
            student,
        )
        assert torch.allclose(grad, expected, rtol=1e-10, atol=1e-15)
        assert (grad[:, -1] == 0).all()


def test_cross_entropy_part_is_torchs():
    student, teacher, labels = batch()
    ours = adakd_loss(student, teacher, labels, ce_weight=1.0).loss
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(ours, expected, rtol=1e-12)
    grad = gradient(lambda s: adakd_loss(s, teacher, labels, ce_weight=1.0).loss, student)
    theirs = gradient(lambda s: F.cross_entropy(s.flatten(0, 1), labels.flatten(), ignore_index=-100), student)
    assert torch.allclose(grad, theirs, rtol=1e-8, atol=1e-15)


def test_logits_far_from_zero():
    """A valid token that is not selected has a cross-entropy, but no normaliser at its temperature."""
    student, teacher, labels = batch(dtype=torch.float32)

    def loss(s):
        return adakd_loss(s, teacher, labels, focus_ratio=0.3, ce_weight=0.5).loss

    assert torch.allclose(gradient(loss, student + 512.0), gradient(loss, student), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("label", [299, 301, 1000, -1])
def test_a_label_outside_the_common_vocabulary_is_loud(label, inplace):
    """In the loss, and in its row's gradient over the common vocabulary; no other entry changes."""
    student, teacher, labels = batch(vocab=301, teacher_vocab=256)
    labels[0, 0] = label
    assert adakd_loss(student, teacher, labels, ce_weight=0.5).loss.isnan()
    assert not adakd_loss(student, teacher, labels).loss.isnan()
    for ratio in (0.3, 1.0):  # the token is valid alone, and selected too

        def loss(s, targets, ratio=ratio):
            options = {"focus_ratio": ratio, "ce_weight": 0.5, "inplace": inplace}
            return adakd_loss(s * 1.0, teacher, targets, **options).loss

        grad = gradient(lambda s: loss(s, labels), student)
        assert grad[0, 0, :256].isnan().all()
        assert torch.equal(grad[..., 256:], torch.zeros_like(grad[..., 256:]))
        inside = labels.clone()
        inside[0, 0] = 0
        expected = gradient(lambda s, inside=inside: loss(s, inside), student)
        assert torch.equal(grad.flatten(0, 1)[1:], expected.flatten(0, 1)[1:])
    # What leaves the cross-entropy out does not see it.
    grad = gradient(lambda s: adakd_loss(s, teacher, labels, ce_weight=0.5).token_loss, student)
    assert grad.isfinite().all()


@pytest.mark.parametrize("place", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_a_loss_of_nan_has_a_gradient_of_nan(divergence, place):
    student, teacher, labels = batch(vocab=301, teacher_vocab=256, dtype=torch.float32)
    (student if place == "student" else teacher)[1, 2, 17] = math.nan
    grad = gradient(lambda s: adakd_loss(s, teacher, labels, divergence=divergence, ce_weight=0.1).loss, student)
    assert grad[1, 2, :256].isnan().all()
    assert torch.equal(grad[..., 256:], torch.zeros_like(grad[..., 256:]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=name_of)
def test_labels_of_every_integer_type(dtype):
    student, teacher, labels = batch(vocab=101)
    ignored = 120  # fits in all of them
    labels[labels == -100] = ignored
    options = {"ce_weight": 0.3, "difficulty": "cross_entropy", "focus_ratio": 0.5, "ignore_index": ignored}
    for shift in (False, True):

        def loss(s, targets, shift=shift):
            return adakd_loss(s, teacher, targets, shift=shift, **options)

        for a, b in zip(loss(student, labels.to(dtype)), loss(student, labels), strict=True):
            assert torch.equal(a, b)
        grad = gradient(lambda s: loss(s, labels.to(dtype)).loss, student)
        assert torch.equal(grad, gradient(lambda s: loss(s, labels).loss, student))
    measured = [
        token_difficulty(student, teacher, difficulty="cross_entropy", labels=x)
        for x in (labels.clamp_max(100).to(dtype), labels.clamp_max(100))
    ]
    assert torch.equal(*measured)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_a_mask_stands_in_the_place_of_labels(ignore_index, shift):
    student, teacher, labels = batch()
    mask = labels != -100
    labels = torch.where(mask, labels.clamp_min(1), ignore_index)
    hidden, head = logits(2, 6, 5, seed=7), logits(301, 5, seed=8)
    options = {"focus_ratio": 0.5, "ignore_index": ignore_index, "shift": shift}
    for loss in (
        lambda labels: adakd_loss(student, teacher, labels, **options),
        lambda labels: linear_adakd_loss(hidden, head, hidden.flip(0), head, labels, **options),
    ):
        for got, expected in zip(loss(mask), loss(labels), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_micro_batches_add_up_to_the_batch(as_tensor, ce_weight):
    student, teacher, labels = batch(b=4)
    options = {"temperature_scale": 0.0, "base_temperature": 1.3, "ce_weight": ce_weight}
    n = int((labels != -100).sum())
    whole = gradient(lambda s: adakd_loss(s, teacher, labels, **options).loss, student)
    items = torch.tensor(n) if as_tensor else n
    parts, loss = [], 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        out = adakd_loss(student[rows], teacher[rows], labels[rows], num_items=items, **options)
        loss += out.loss.item()
        parts.append(
            gradient(
                lambda s, rows=rows: adakd_loss(s, teacher[rows], labels[rows], num_items=items, **options).loss,
                student[rows],
            )
        )
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-9, atol=1e-15)
    assert math.isclose(loss, adakd_loss(student, teacher, labels, **options).loss.item(), rel_tol=1e-12)
    halved = adakd_loss(student, teacher, labels, num_items=2 * n, focus_ratio=0.5, **options)
    assert torch.allclose(
        halved.token_loss.sum() / n * (1 - ce_weight), halved.loss - ce_weight * 0.5 * _ce(student, labels)
    )


def test_num_items_below_one():
    """With fewer tokens in the step than ranks, each rank is told its part of one."""
    student, teacher, labels = batch()
    whole = adakd_loss(student, teacher, labels, num_items=1, ce_weight=0.2).loss
    assert torch.allclose(adakd_loss(student, teacher, labels, num_items=0.25, ce_weight=0.2).loss, 4 * whole)
    assert adakd_loss(student, teacher, torch.full_like(labels, -100), num_items=0, ce_weight=0.2).loss == 0.0


def _ce(student, labels):
    return F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=-100)


def test_share_as_float_and_as_tensor():
    student, teacher, labels = batch()
    for ratio in (0.29, 0.5, 1.0):
        a = adakd_loss(student, teacher, labels, focus_ratio=ratio)
        b = adakd_loss(student, teacher, labels, focus_ratio=torch.tensor(ratio, dtype=torch.float64))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_teacher_run_in_inference_mode():
    """Its tensors cannot be saved for a backward; they are used as they are, without a copy of the logits."""
    student, teacher, labels = batch(teacher_vocab=307)
    tau, mask = uniform(*labels.shape) + 0.5, labels != -100
    with torch.inference_mode():
        made = [x.clone() for x in (teacher, labels, tau, mask)]
    assert all(x.is_inference() for x in made)

    def calls(teacher, labels, tau, mask):
        module = AdaKDLoss(total_steps=10, ce_weight=0.2)
        return (
            lambda s: adakd_loss(s, teacher, labels, focus_ratio=0.5).loss,
            lambda s: adakd_loss(s, teacher, labels, focus_ratio=0.5, ce_weight=0.2).loss,
            lambda s: adakd_loss(s * 1.0, teacher, labels, ce_weight=0.2, shift=True, inplace=True).loss,
            lambda s: module(s, teacher, labels).loss,
            lambda s: token_divergence(s, teacher, tau, "jensen_shannon", mask),
            lambda s: token_difficulty(s, teacher, mask) * s[..., 0],
        )

    for function, plain in zip(calls(*made), calls(teacher, labels, tau, mask), strict=True):
        assert torch.equal(gradient(function, student), gradient(plain, student))

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        leaf = student.clone().requires_grad_()
        loss = adakd_loss(leaf, made[0], made[1], ce_weight=0.2).loss
    gradients = {x.data_ptr() for x in kept if x.numel() >= leaf.numel()} - {leaf.data_ptr(), made[0].data_ptr()}
    assert len(gradients) == 1  # no copy of the logits
    loss.backward()


def test_a_teacher_that_is_changed_before_the_backward_is_seen():
    student, teacher, labels = batch()
    loss = adakd_loss(student.requires_grad_(), teacher, labels).loss
    teacher.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_after_an_evaluation_in_inference_mode():
    student, teacher, labels = batch()
    loss_fn = AdaKDLoss(total_steps=10)
    with torch.inference_mode():
        evaluated = loss_fn(student, teacher, labels).loss
    assert torch.equal(loss_fn(student, teacher, labels).loss, evaluated)
    loss_fn.step()
    assert loss_fn.focus.steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("extreme", ["scale", "base below", "base above"])
def test_temperatures_beyond_the_types_range(extreme, dtype):
    """τ and τ² are kept within it, so nothing is NaN."""
    student, teacher, labels = batch(dtype=dtype)
    options = {
        "scale": {"temperature_scale": 1e300},
        "base below": {"base_temperature": 1e-300},
        "base above": {"base_temperature": 1e300},
    }[extreme]
    out = adakd_loss(student, teacher, labels, **options)
    tau = out.temperature
    assert out.loss.isfinite() and tau.isfinite().all() and (tau > 0).all()
    assert tau.square().isfinite().all() and (tau.square() > 0).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "total_variation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_temperature_0_and_infinity_give_the_limit(dtype, divergence):
    """As numbers they are refused; as tensors, whose values nobody reads, they are the ends of the type's range."""
    student, teacher, labels = batch(dtype=dtype)
    for value in (0.0, -1.0, math.inf, 1e300, 1e-300):
        one = torch.tensor(value, dtype=torch.float64)
        values = [token_divergence(student, teacher, tau, divergence) for tau in (one, one.expand(labels.shape))]
        assert torch.equal(*values) and not values[0].isnan().any()
        if value > 1.0:
            assert (values[0].abs() <= 1e-6).all()
        elif 0.0 < value < math.inf:
            assert torch.equal(token_divergence(student, teacher, value, divergence), values[0])
    assert token_divergence(student, teacher, torch.tensor(math.nan), divergence).isnan().all()


def test_an_infinite_difficulty():
    """A label at −inf is infinitely unlikely: the hardest token, at the lowest temperature."""
    student, teacher, labels = batch(dtype=torch.float32)
    student[0, 0, labels[0, 0]] = -math.inf
    out = adakd_loss(student, teacher, labels, difficulty="cross_entropy", focus_ratio=0.6)
    assert out.difficulty[0, 0] == math.inf and out.selected[0, 0]
    assert math.isclose(out.temperature[0, 0].item(), math.exp(-0.5), rel_tol=1e-6)
    assert out.loss.isfinite() and out.temperature.isfinite().all()
    grad = gradient(lambda s: adakd_loss(s, teacher, labels, difficulty="cross_entropy", focus_ratio=0.6).loss, student)
    assert grad.isfinite().all() and grad[0, 0].any()


@pytest.mark.parametrize("ce_weight", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_inplace_writes_the_same_gradient_over_the_logits(dtype, ce_weight):
    student, teacher, labels = batch(dtype=dtype, vocab=301, teacher_vocab=290)
    expected = gradient(lambda s: adakd_loss(s, teacher, labels, focus_ratio=0.5, ce_weight=ce_weight).loss, student)
    leaf = student.clone().requires_grad_()
    produced = leaf * 1.0
    out = adakd_loss(produced, teacher, labels, focus_ratio=0.5, ce_weight=ce_weight, inplace=True)
    pointer = produced.data_ptr()
    out.loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected)
    assert produced.data_ptr() == pointer and torch.equal(produced.detach(), expected)
    with pytest.raises(RuntimeError, match="inplace=False"):
        out.loss.backward()


def test_second_backward_with_retain_graph():
    student, teacher, labels = batch()
    leaf = student.clone().requires_grad_()
    loss = adakd_loss(leaf, teacher, labels, focus_ratio=0.5, ce_weight=0.1).loss
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_double_backward_is_refused():
    student, teacher, labels = batch()
    leaf = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(adakd_loss(leaf, teacher, labels).loss, leaf, create_graph=True)
    assert torch.equal(grad, gradient(lambda s: adakd_loss(s, teacher, labels).loss, student))
    with pytest.raises(RuntimeError, match="the loss has no second derivative"):
        grad.sum().backward()


def test_no_gradient_is_asked_for():
    student, teacher, labels = batch()
    out = adakd_loss(student, teacher, labels)
    assert not out.loss.requires_grad
    with torch.no_grad():
        assert torch.equal(adakd_loss(student.requires_grad_(), teacher, labels).loss, out.loss)


def test_mixed_types():
    student, teacher, labels = batch(dtype=torch.float32)
    out = adakd_loss(student.bfloat16(), teacher, labels)
    exact = adakd_loss(student.bfloat16().double(), teacher.double(), labels)
    assert out.loss.dtype == torch.float32 and math.isclose(out.loss.item(), exact.loss.item(), rel_tol=1e-5)
    assert gradient(lambda s: adakd_loss(s, teacher, labels).loss, student.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("measure", DIFFICULTIES)
def test_token_difficulty(measure):
    student, teacher, labels = batch()
    labels = labels.clamp_min(0)
    mask = uniform(*labels.shape, seed=2) > 0.4
    expected = reference.difficulty(student, teacher, labels, measure)
    value = token_difficulty(student, teacher, difficulty=measure, labels=labels)
    assert torch.allclose(value, expected, rtol=1e-10) and not value.requires_grad
    masked = token_difficulty(student, teacher, mask, measure, labels=labels)
    assert torch.equal(masked, value.where(mask, 0.0))
    flat = token_difficulty(student[0], teacher[0], difficulty=measure, labels=labels[0])
    assert torch.allclose(flat, expected[0], rtol=1e-10)


def test_temperature_of_every_kind():
    student, teacher, _ = batch()
    per_token = torch.full(student.shape[:2], 1.7, dtype=torch.float64)
    values = [token_divergence(student, teacher, t) for t in (1.7, torch.tensor(1.7, dtype=torch.float64), per_token)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_module_drives_its_focus_by_the_distillation_loss():
    student, teacher, labels = batch()
    focus = LossAdaptiveFocus(10, beta=0.5)
    loss_fn = AdaKDLoss("forward_kl", focus=focus, ce_weight=0.5, temperature_scale=0.2)
    losses = []
    for scale in (1.0, 0.5):  # two micro-batches of one step
        loss_fn(student * scale, teacher, labels)
        distillation = reference.adakd_loss(
            (student * scale).flatten(0, 1), teacher.flatten(0, 1), labels.flatten(), "forward_kl", 1.0, 0.2
        )
        losses.append(distillation.item())
    with torch.no_grad():
        loss_fn(student * 7.0, teacher, labels)  # an evaluation is no part of the step
    loss_fn.step()
    assert focus.steps == 1 and math.isclose(focus.loss_ema.item(), sum(losses) / 2, rel_tol=1e-9)
    loss_fn.step()  # nothing since the last step
    assert focus.steps == 1
    n = int((labels != -100).sum())
    focus.focus_ratio.fill_(0.5)
    for _ in range(2):
        out = loss_fn(student, teacher, labels, num_items=2 * n)
    loss_fn.step()
    expected = 0.5 * sum(losses) / 2 + 0.5 * (2 * out.token_loss.sum().item() / (0.5 * 2 * n))
    assert out.selected.sum() == n // 2 and math.isclose(focus.loss_ema.item(), expected, rel_tol=1e-9)


def test_module_equals_the_function_and_resumes():
    student, teacher, labels = batch()
    loss_fn = AdaKDLoss(JensenShannon(beta=0.3), total_steps=100, ce_weight=0.1, base_temperature=1.2)
    loss_fn.focus.focus_ratio.fill_(0.4)
    out = loss_fn(student, teacher, labels)
    plain = adakd_loss(
        student,
        teacher,
        labels,
        divergence=JensenShannon(beta=0.3),
        focus_ratio=0.4,
        ce_weight=0.1,
        base_temperature=1.2,
    )
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    other = AdaKDLoss(JensenShannon(beta=0.3), total_steps=100)
    other.load_state_dict(loss_fn.state_dict())
    assert other.focus_ratio == torch.tensor(0.4, dtype=torch.float64)
    fixed = AdaKDLoss(focus=0.25)
    assert fixed.focus_ratio == 0.25 and fixed(student, teacher, labels).selected.sum() == 2
    fixed.step()
