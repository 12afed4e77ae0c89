"""What only a GPU can show: real vocabularies, memory, streams, graphs. Without one, each body runs small on the CPU.

`-m gpu` runs them at full size. In the `interpret` tier the real kernels run at small sizes, in the `fast` tier the
reference does, with `instruments.devices.Cpu` in the GPU's place, so that no body goes untested.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from adakd_kernels import AdaKDLoss, adakd_loss, ops, reference, token_difficulty, token_divergence
from instruments.devices import device_of, produced

from .cases import assert_close_as_eager, gradient, logits, temperatures, tokens

pytestmark = [pytest.mark.fast, pytest.mark.interpret, pytest.mark.gpu]

BF16 = torch.bfloat16


@pytest.fixture
def device():
    return device_of(torch.get_default_device().type)


def batch(vocab, tokens_=4, dtype=BF16, seed=0):
    """(student, teacher, labels) of one sequence, the second label ignored."""
    labels = tokens(vocab, 1, tokens_, seed=seed)
    labels[0, 1] = -100
    return (
        logits(1, tokens_, vocab, dtype=dtype, seed=seed),
        logits(1, tokens_, vocab, dtype=dtype, seed=seed + 1),
        labels,
    )


def needs_the_kernels(device):
    if ops.backend(device.device).name == "reference":
        pytest.skip("the reference copies rows and waits for their number; the interpret and gpu tiers run the kernels")


def as_leaf(student):
    return student.detach().clone().requires_grad_()


def loss_and_gradient(student, teacher, labels, **options):
    """The loss and its gradient in a student that requires grad."""
    out = adakd_loss(student, teacher, labels, focus_ratio=0.5, ce_weight=0.1, **options)
    return out.loss, *torch.autograd.grad(out.loss, student)


@pytest.mark.parametrize("vocab", [128_256, 151_936, 262_144])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_real_vocabularies(device, vocab, divergence):
    vocab = device.size(vocab, vocab // 128)
    student, teacher, _ = batch(vocab)
    tau, weight = temperatures(1, 4), torch.tensor([[1.0, -0.5, 0.0, 2.0]])
    yardstick = [(reference, student), (reference, student.double())]
    values, grads = [], []
    for of, z in [(None, student), *yardstick]:

        def value(s, of=of):
            if of is None:
                return token_divergence(s, teacher, tau, divergence)
            return of.token_divergence(s, teacher.to(s.dtype), tau, divergence)

        values.append(value(z))
        grads.append(gradient(value, z, weight))
    assert_close_as_eager(*values)
    assert_close_as_eager(*grads)
    exact = reference.squared_hellinger(student.double(), teacher.double())
    assert_close_as_eager(token_difficulty(student, teacher), reference.squared_hellinger(student, teacher), exact)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_peak_memory_is_the_gradient_and_numbers_per_token(device, inplace):
    needs_the_kernels(device)
    vocab, length = device.size(151_936, 20_011), device.size(512, 6)
    student, teacher, labels = batch(vocab, length)
    leaf = produced(student.requires_grad_())
    loss_and_gradient(as_leaf(student), teacher, labels)  # compiles, and fills the allocator's caches
    peak = device.peak_bytes(lambda: loss_and_gradient(leaf, teacher, labels, inplace=inplace))
    of_logits = student.numel() * student.element_size()
    # Sorting needs a few more numbers a token than the loss keeps, and the allocator rounds each tensor to 512 bytes.
    per_token = 64 * 8 * length + 128 * 512
    expected = 0 if inplace else of_logits
    assert expected <= peak <= expected + per_token < 1.5 * of_logits


def test_more_than_two_to_the_31_entries(device):
    """The last rows of a tensor whose offsets need 64 bits have the values that they have alone."""
    vocab = device.size(131_072, 67)
    length = device.size(2**31 // 131_072 + 8, 9)
    needed = 3 * length * vocab * 2
    if device.free_bytes() < 1.2 * needed:
        pytest.skip(f"needs {1.2 * needed / 2**30:.0f} GiB of free memory")
    student, teacher = (torch.zeros(1, length, vocab, dtype=BF16) for _ in range(2))
    rows = [0, length // 2, length - 2, length - 1]
    few_student, few_teacher = logits(1, 4, vocab, dtype=BF16, seed=1), logits(1, 4, vocab, dtype=BF16, seed=2)
    student[:, rows], teacher[:, rows] = few_student, few_teacher
    assert torch.equal(token_difficulty(student, teacher)[:, rows], token_difficulty(few_student, few_teacher))
    for divergence in ("reverse_kl", "jensen_shannon"):

        def value(s, t, divergence=divergence):
            return token_divergence(s, t, 1.3, divergence)

        alone = as_leaf(few_student)
        (expected,) = torch.autograd.grad(value(alone, few_teacher).sum(), alone)
        leaf = student.detach().requires_grad_()
        found = value(leaf, teacher)
        assert torch.equal(found[:, rows], value(few_student, few_teacher))
        (grad,) = torch.autograd.grad(found.sum(), leaf)
        assert torch.equal(grad[:, rows], expected)
        assert not grad[0, 1 : min(length // 2, 64)].any()  # rows in which student and teacher are equal
        del grad, found, leaf


def test_runs_on_the_current_stream(device):
    """On a stream that is late, so that a kernel on any other would read zeros."""
    vocab = device.size(128_256, 1003)
    student, teacher, labels = batch(vocab)
    expected = loss_and_gradient(as_leaf(student), teacher, labels)
    late_student, late_teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    with device.side_stream():
        late_student.copy_(student)
        late_teacher.copy_(teacher)
        found = loss_and_gradient(late_student.requires_grad_(), late_teacher, labels)
    for result, value in zip(found, expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_a_graph_of_forward_and_backward_replays(device, divergence, unpoisoned):
    vocab = device.size(151_936, 1003)
    student, teacher, labels = batch(vocab)
    student.requires_grad_()
    replay = device.capture(lambda: loss_and_gradient(student, teacher, labels, divergence=divergence))
    for seed in (10, 20):
        fresh = batch(vocab, seed=seed)
        with torch.no_grad():
            for static, new in zip((student, teacher, labels), fresh, strict=True):
                static.copy_(new)
        expected = loss_and_gradient(as_leaf(fresh[0]), *fresh[1:], divergence=divergence)
        for result, value in zip(replay(), expected, strict=True):
            assert torch.equal(result, value)


@pytest.mark.parametrize("options", [{}, {"difficulty": "jensen_shannon"}, {"shift": True}], ids=str)
@pytest.mark.parametrize("num_items", [None, 7])
def test_nothing_waits_for_the_device(device, options, num_items):
    needs_the_kernels(device)
    student, teacher, labels = batch(device.size(128_256, 1003))
    loss_fn = AdaKDLoss("jeffreys", total_steps=10, ce_weight=0.1, **options).to(student.device)
    student.requires_grad_()
    for waits in (contextlib.nullcontext, device.refusing_to_wait):  # the first run compiles
        with waits():
            loss_fn(student, teacher, labels, num_items=num_items).loss.backward()
            token_divergence(student, teacher, 1.5, "reverse_kl").sum().backward()
            loss_fn.step()
    assert loss_fn.focus.steps == 2 and student.grad.isfinite().all()


def test_waiting_is_seen(device):
    mask = torch.tensor([True, False])
    for waits in (lambda: mask.sum().item(), lambda: mask.nonzero(), lambda: mask[mask], lambda: torch.tensor(1.0)):
        with pytest.raises(RuntimeError), device.refusing_to_wait():
            waits()


@pytest.mark.parametrize("first", [0, 1], ids=["whole", "view"])
def test_compiled_with_fullgraph_equals_eager(device, unpoisoned, first):
    """The gradient of a view of an odd vocabulary starts off an aligned entry, as the view does."""
    torch._dynamo.reset()
    student, teacher, labels = batch(device.size(151_669 if first else 151_936, 1003))

    def loss(s, t, y):
        return adakd_loss(s[:, first:], t[:, first:], y[:, first:], focus_ratio=0.5, ce_weight=0.1)

    results = []
    for function in (torch.compile(loss, fullgraph=True, backend=device.compiler), loss):
        leaf = as_leaf(student)
        out = function(leaf, teacher, labels)
        results.append((*out, *torch.autograd.grad(out.loss, leaf)))
    exact = as_leaf(student.double())
    out = loss(exact, teacher.double(), labels)
    yardstick = (*out, *torch.autograd.grad(out.loss, exact))
    for found, eager, value in zip(*results, yardstick, strict=True):
        if found.dtype == torch.bool:
            assert torch.equal(found, eager)
        else:
            assert_close_as_eager(found, eager, value)
    torch._dynamo.reset()


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_reruns_are_equal_bit_for_bit(device, divergence):
    student, teacher, labels = batch(device.size(262_144, 1003), device.size(512, 6))
    first = loss_and_gradient(as_leaf(student), teacher, labels, divergence=divergence)
    for _ in range(device.size(20, 2)):
        again = loss_and_gradient(as_leaf(student), teacher, labels, divergence=divergence)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
