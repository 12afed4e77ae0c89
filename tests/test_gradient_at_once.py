"""The gradient that the forward computes: which backward gets it, what is kept meanwhile, and what it is in fp16."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from adakd_kernels import AdaKDLoss, adakd_loss, ops, token_divergence

from .cases import DTYPES, ONE_OF_EACH, gradient, logits, name_of, temperatures, tokens, uniform

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.gpu]

OPTIONS = {"focus_ratio": 0.5, "ce_weight": 0.1}


def batch(dtype=torch.float32, vocab=301, teacher_vocab=301):
    labels = tokens(290, 2, 5)
    labels[0, 1] = -100
    student, teacher = logits(2, 5, vocab, dtype=dtype, seed=1), logits(2, 5, teacher_vocab, dtype=dtype, seed=2)
    return student.requires_grad_(), teacher, labels


@pytest.fixture
def backwards(monkeypatch):
    """The names of the operators that compute a gradient, as they are called."""
    called, autograd = [], importlib.import_module("adakd_kernels.ops.token_losses")
    for name in (
        "token_divergence_with_gradient", "token_divergence_with_gradient_",
        "token_divergence_backward", "token_divergence_backward_", "scale_gradient_",
    ):  # fmt: skip
        operator = getattr(autograd, name)

        def noted(*args, name=name, operator=operator):
            called.append(name)
            return operator(*args)

        monkeypatch.setattr(autograd, name, noted)
    return called


@pytest.mark.interpret
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_the_operator_equals_the_pair(divergence):
    """Tokens with a weight of each, of D alone, of the cross-entropy alone, of none; and one that is NaN."""
    student, teacher, labels = (x.detach()[:, :3] for x in batch(vocab=301, teacher_vocab=290))
    mask = torch.tensor([[True, True, False], [False, False, True]])
    weight = uniform(2, 3, seed=3).float().where(mask, 0.0)
    weight[1, 1] = math.nan
    of_ce = uniform(2, 3, seed=4).float() * torch.tensor([[1, 0, 1], [0, 0, 1]])
    student[0, 1, 7], teacher[0, 0, 3], teacher[1, 2] = -math.inf, -math.inf, -math.inf
    _, normalizers_1 = ops.token_stats(student, teacher, torch.ones_like(mask))
    tau = temperatures(2, 3).float()
    for ce in ((labels, of_ce, normalizers_1), (None, None, None)):
        args = (student, teacher, tau, mask, divergence.name, *divergence.parameters)
        expected = [*ops.token_divergence(*args)]
        of_backward = (tau, weight, *expected[1:], *ce, divergence.name, *divergence.parameters)
        expected.append(ops.token_divergence_backward(student, teacher, *of_backward))
        found = ops.token_divergence_with_gradient(*args, weight, *ce)
        over = student.clone()
        inplace = (*ops.token_divergence_with_gradient_(over, *args[1:], weight, *ce), over)
        for one, other, third in zip(expected, found, inplace, strict=True):
            assert torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7))
            assert torch.equal(other.nan_to_num(7e7), third.nan_to_num(7e7))
        assert expected[-1][1, 1, :290].isnan().all() and not expected[-1][1, 0].any()


@pytest.mark.interpret
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_a_backward_of_the_loss_multiplies_what_the_forward_computed(inplace, backwards):
    student, teacher, labels = batch()
    own = student * 1.0
    loss = adakd_loss(own, teacher, labels, inplace=inplace, **OPTIONS).loss
    assert backwards == ["token_divergence_with_gradient" + "_" * inplace]
    if inplace:
        assert not torch.equal(own, student)
    (0.25 * loss).backward()
    assert backwards[1:] == ["scale_gradient_"]
    exact = batch(torch.float64)
    (0.25 * adakd_loss(*exact, **OPTIONS).loss).backward()
    assert torch.allclose(student.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-8)


def test_gradients_of_the_tokens_and_second_backwards_take_the_operator_of_the_backward(backwards):
    student, teacher, labels = batch()
    out = adakd_loss(student, teacher, labels, **OPTIONS)
    weights = uniform(2, 5, seed=5).float()
    grads = [
        torch.autograd.grad(result, student, retain_graph=True)[0]
        for result in (
            (weights * out.token_loss).sum() + out.loss,
            out.loss,
            out.loss,
            (weights * out.token_loss).sum(),
        )
    ]
    # The first one takes the memory of the gradient that it cannot use.
    assert backwards[1:] == ["token_divergence_backward_", *["token_divergence_backward"] * 3]
    assert torch.equal(grads[1], grads[2]) and len({grad.data_ptr() for grad in grads}) == 4
    assert (grads[1] + grads[3] - grads[0]).norm() <= 1e-6 * grads[0].norm()
    assert torch.equal(gradient(lambda s: adakd_loss(s, teacher, labels, **OPTIONS).loss, student), grads[1])


def test_inplace_refuses_what_it_has_no_logits_for():
    student, teacher, labels = batch()
    out = adakd_loss(student * 1.0, teacher, labels, inplace=True, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"token_loss has no gradient with inplace=True.*inplace=False"):
        out.token_loss.sum().backward(retain_graph=True)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"no second one.*inplace=False"):
        out.loss.backward()
    # What the message advises.
    with torch.no_grad():
        chosen = adakd_loss(student, teacher, labels, focus_ratio=0.5)
    of_tokens = token_divergence(
        student * 1.0, teacher, chosen.temperature, "reverse_kl", chosen.selected, inplace=True
    )
    expected = gradient(lambda s: adakd_loss(s, teacher, labels, focus_ratio=0.5).token_loss, student)
    student.grad = None
    (chosen.temperature**2 * of_tokens).sum().backward()
    assert torch.allclose(student.grad, expected, rtol=1e-6, atol=1e-9)


def test_inplace_logits_that_change_before_the_backward_are_seen():
    student, teacher, labels = batch()
    own = student * 1.0
    loss = adakd_loss(own, teacher, labels, inplace=True).loss
    with torch.no_grad():
        own.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_logits_that_get_no_gradient_are_not_overwritten(context, backwards):
    student, teacher, labels = batch()
    for requires_grad in (True, False):
        with context():
            own = student.detach().requires_grad_(requires_grad) * 1.0
            out = adakd_loss(own, teacher, labels, inplace=True, **OPTIONS)
        assert torch.equal(own, student) and not out.loss.requires_grad
    frozen = student.detach().clone()
    adakd_loss(frozen, teacher, labels, inplace=True, **OPTIONS)
    assert torch.equal(frozen, student) and not backwards


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_logits_are_free_before_the_backward_of_the_model(inplace):
    """In place, the teacher's are free as soon as the loss is there. The caller has left all of them."""
    head, (_, teacher, labels) = logits(8, 301, seed=7).requires_grad_(), batch()
    teacher = teacher.clone()
    student = logits(2, 5, 8, seed=6) @ head
    memory = [StorageWeakRef(x.untyped_storage()) for x in (student, teacher)]
    alive = {}

    def note(when):
        alive[when] = [not of.expired() for of in memory]

    node = student.grad_fn
    node.register_prehook(lambda grads: note("backward of the model"))
    loss = adakd_loss(student, teacher, labels, inplace=inplace, **OPTIONS).loss
    del student, teacher
    note("loss")
    loss.backward()
    assert head.grad.any()
    # The gradient is in the memory of the student's logits, or in memory of its own.
    assert alive == {"loss": [True, not inplace], "backward of the model": [inplace, False]}


@pytest.mark.interpret
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("factor", [0.0, math.inf, math.nan])
def test_an_upstream_gradient_that_is_0_or_no_number(factor, inplace):
    """Rows and entries that have no part in the loss keep their zeros."""
    student, teacher, labels = batch(vocab=301, teacher_vocab=290)
    out = adakd_loss(student * 1.0, teacher, labels, focus_ratio=0.5, inplace=inplace)
    (out.loss * factor).backward()
    selected, rest = student.grad[out.selected], student.grad[~out.selected]
    assert not rest.any() and not selected[:, 290:].any()
    assert not selected.any() if factor == 0.0 else not selected[:, :290].isfinite().any()


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_scaled_gradient(dtype):
    rows = torch.empty(2, 3, 400, dtype=dtype)[..., :301]
    rows[:] = logits(2, 3, 301, dtype=dtype, seed=8)
    weights = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], [[0.0, 1.0, 1.0], [0.0, 0.0, math.nan]]])
    read = torch.tensor([[True, True, True], [False, False, True]])
    rows[~read] = 0.0
    for upstream, scaled_by in ((1.0, None), (0.3, None), (1.0, 1024.0), (1024.0, 1024.0)):
        of = None if scaled_by is None else torch.tensor(scaled_by)
        found = rows.clone()
        ops.scale_gradient_(
            found[..., :290], weights.to(torch.promote_types(dtype, torch.float32)), torch.tensor(upstream), of
        )
        factor = torch.tensor(upstream) / (scaled_by or 1.0)
        expected = (rows.to(torch.promote_types(dtype, torch.float32)) * factor).to(dtype)
        assert torch.equal(found[..., :290], expected[..., :290]) and torch.equal(found[..., 290:], rows[..., 290:])


@pytest.mark.interpret
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_fp16_keeps_what_a_mean_over_many_tokens_would_lose(inplace):
    """A `GradScaler`'s factor comes in the backward, when the gradient is rounded to fp16 already."""
    scale, items = 2.0**16, 2.0**20
    exact = batch(torch.float64)
    (scale * adakd_loss(*exact, num_items=items, **OPTIONS).loss).backward()
    student, teacher, labels = batch(torch.float16)
    student = student.detach().requires_grad_()
    loss = adakd_loss(student * 1.0, teacher, labels, num_items=items, inplace=inplace, **OPTIONS).loss
    (scale * loss).backward()
    rows = exact[0].grad.norm(dim=-1) > 0
    error = (student.grad.double() - exact[0].grad).norm(dim=-1) / exact[0].grad.norm(dim=-1)
    assert (error[rows] < 2e-3).all(), error
    assert (student.grad.double().abs().amax(-1)[rows] < 1.0).all()


def test_fp16_takes_the_largest_difference_of_logits():
    """±65,504 against its opposite: the gradient of 1 is in the type's range, so that of the forward has to be."""
    student, teacher = torch.zeros(1, 3, 16, dtype=torch.float16), torch.zeros(1, 3, 16, dtype=torch.float16)
    student[..., 2:], teacher[..., 0], teacher[..., 1] = -65504.0, 65504.0, -65504.0
    for tau in (0.25, 1.0, 4.0):
        for divergence in ("reverse_kl", "jeffreys"):
            leaf = student.clone().requires_grad_()
            mask = torch.ones(1, 3, dtype=torch.bool)
            adakd_loss(
                leaf, teacher, mask, base_temperature=tau, temperature_scale=0.0, divergence=divergence
            ).loss.backward()
            assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_a_scaler_and_accumulation_give_the_gradient_of_one_batch():
    student, teacher, labels = batch()
    expected = gradient(lambda s: adakd_loss(s, teacher, labels, num_items=9, temperature_scale=0.0).loss, student)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD([student], lr=0.0)
    for row in range(2):
        part = slice(row, row + 1)
        out = adakd_loss(
            student[part] * 1.0, teacher[part], labels[part], num_items=9, temperature_scale=0.0, inplace=True
        )
        scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    assert torch.allclose(student.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_a_loss_inside_of_activation_checkpointing(inplace, reentrant):
    _, teacher, labels = batch()
    hidden, head = logits(2, 5, 8, seed=6).requires_grad_(), logits(8, 301, seed=7).requires_grad_()

    def loss(hidden):
        return adakd_loss(hidden @ head, teacher, labels, inplace=inplace, **OPTIONS).loss

    expected = torch.autograd.grad(loss(hidden), (hidden, head))
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(head.grad, expected[1])


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_saved_tensors_may_be_moved(inplace):
    student, teacher, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = adakd_loss(student * 1.0, teacher, labels, inplace=inplace, **OPTIONS).loss
    loss.backward()
    assert torch.equal(student.grad, gradient(lambda s: adakd_loss(s, teacher, labels, **OPTIONS).loss, student))


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_a_second_derivative_is_refused(inplace):
    student, teacher, labels = batch()
    loss = adakd_loss(student * 1.0, teacher, labels, inplace=inplace, **OPTIONS).loss
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="the loss has no second derivative"):
        grad.sum().backward()


def test_the_module_writes_over_no_logits_in_an_evaluation():
    student, teacher, labels = batch()
    loss_fn = AdaKDLoss(total_steps=10, inplace=True)
    own = student * 1.0
    with torch.no_grad():
        loss_fn(own, teacher, labels)
    assert torch.equal(own, student)
