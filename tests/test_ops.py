"""The operators: opcheck, `torch.compile`, no wait for the device, no N x V temporary."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adakd_kernels import (
    AdaKDLoss,
    JensenShannon,
    SkewReverseKL,
    adakd_loss,
    ops,
    token_difficulty,
    token_divergence,
)

from .cases import ONE_OF_EACH, logits, name_of, temperatures, tokens


@pytest.mark.fast
@pytest.mark.native
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_opcheck(dtype, unpoisoned):
    student, teacher = logits(2, 3, 33, dtype=dtype, seed=1), logits(2, 3, 35, dtype=dtype, seed=2)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    torch.library.opcheck(ops.token_stats, (student, teacher, mask))
    _, normalizers_1 = ops.token_stats(student, teacher, mask)
    tau = temperatures(2, 3).float()
    for div in ONE_OF_EACH:
        args = (div.name, *div.parameters)
        torch.library.opcheck(ops.token_divergence, (student, teacher, tau, mask, *args))
        _, *saved = ops.token_divergence(student, teacher, tau, mask, *args)
        for labels in (None, torch.tensor([[1, 2, 3], [4, 5, 6]])):
            ce = (None,) * 3 if labels is None else (labels, mask.float(), normalizers_1)
            backward = (student, teacher, tau, mask.float(), *saved, *ce, *args)
            torch.library.opcheck(ops.token_divergence_backward, backward)
            torch.library.opcheck(ops.token_divergence_backward_, (student.clone(), *backward[1:]))
            at_once = (teacher, tau, mask, *args, mask.float(), *ce)
            torch.library.opcheck(ops.token_divergence_with_gradient, (student, *at_once))
            torch.library.opcheck(ops.token_divergence_with_gradient_, (student.clone(), *at_once))
    numbers = torch.tensor(div.parameters, dtype=torch.float64).unbind()  # as a graph of torch.compile gives them
    in_graph = (student, teacher, tau, mask, div.name, *numbers)
    torch.library.opcheck(torch.ops.adakd.token_divergence.in_graph, in_graph)
    torch.library.opcheck(torch.ops.adakd.token_divergence_backward.in_graph, (*backward[:-2], *numbers))
    for of in (None, torch.tensor(4.0)):
        scaled = (student.clone(), mask.float().unsqueeze(0), torch.tensor(0.5), of)
        torch.library.opcheck(ops.scale_gradient_, scaled)


@pytest.mark.fast
@pytest.mark.native
@pytest.mark.interpret
@pytest.mark.parametrize("ce_weight", [0.0, 0.2])
def test_compile_gives_the_eager_result_without_recompiling(ce_weight, unpoisoned):
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = True
    try:

        def loss(student, teacher, labels, share):
            return adakd_loss(student, teacher, labels, focus_ratio=share, ce_weight=ce_weight)

        compiled = torch.compile(loss, fullgraph=True, dynamic=True)
        per_token = torch.compile(
            lambda s, t, tau: token_divergence(s, t, tau, "jensen_shannon"), fullgraph=True, dynamic=True
        )
        for b, l, share, seed in ((2, 5, 0.5, 1), (3, 4, 0.9, 2), (5, 7, 0.29, 3)):
            student, teacher = logits(b, l, 65, seed=seed), logits(b, l, 65, seed=seed + 10)
            labels = tokens(65, b, l, seed=seed)
            labels[0, 0] = -100
            ratio = torch.tensor(share, dtype=torch.float64)
            results = []
            for function in (loss, compiled):
                leaf = student.clone().requires_grad_()
                out = function(leaf, teacher, labels, ratio)
                out.loss.backward()
                results.append((*out, leaf.grad))
            for eager, other in zip(*results, strict=True):
                assert torch.allclose(eager.double(), other.double(), rtol=1e-4, atol=1e-7)
            tau = temperatures(b, l, seed=seed)
            value = per_token(student, teacher, tau)
            assert torch.allclose(value, token_divergence(student, teacher, tau, "jensen_shannon"), rtol=1e-5)
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()


@pytest.mark.fast
@pytest.mark.native
@pytest.mark.interpret
def test_compile_of_a_model_with_inplace_and_the_module(unpoisoned):
    """`inplace` is a request about memory; a compiled graph may not honour it and must not be wrong."""
    torch._dynamo.reset()
    head = torch.nn.Linear(8, 50, bias=False)
    hidden, teacher = logits(2, 4, 8, scale=1.0), logits(2, 4, 50, seed=1)
    labels = tokens(50, 2, 4)
    loss_fn = AdaKDLoss(total_steps=10, inplace=True)

    def step(h, t, y):
        return loss_fn(head(h), t, y).loss

    step(hidden, teacher, labels).backward()
    expected = head.weight.grad.clone()
    head.weight.grad = None
    torch.compile(step, fullgraph=True)(hidden, teacher, labels).backward()
    assert torch.allclose(head.weight.grad, expected, rtol=1e-5, atol=1e-7)
    loss_fn.step()
    assert loss_fn.focus.steps == 1
    torch._dynamo.reset()


@pytest.mark.fast
@pytest.mark.native
def test_no_number_that_follows_a_schedule_compiles_anew(unpoisoned):
    """The first value is a constant of its graph, as any number is to torch.compile; the second graph takes all others.

    AOTAutograd is what makes constants of numbers that an operator takes; Dynamo alone leaves them.
    """
    teacher, labels = logits(2, 4, 50, seed=1), tokens(50, 2, 4)

    def loss(student, number, items):
        whole = adakd_loss(
            student, teacher, labels, divergence=JensenShannon(beta=number), focus_ratio=number,
            temperature_scale=number, base_temperature=1.0 + number, ce_weight=0.3 * number, num_items=items,
        ).loss  # fmt: skip
        return whole + token_divergence(student, teacher, 1.0 + number, SkewReverseKL(alpha=number)).sum()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for i in range(1, 7):
        results = []
        for function in (loss, compiled):
            student = logits(2, 4, 50, scale=1.0).requires_grad_()
            function(student, i / 8, 3 * i + 5).backward()
            results.append((function(student, i / 8, 3 * i + 5).detach(), student.grad))
        for eager, other in zip(*results, strict=True):
            assert torch.allclose(eager, other, rtol=1e-5, atol=1e-7)
        assert counters["stats"]["unique_graphs"] == min(i, 2)
    torch._dynamo.reset()


@pytest.mark.fast
def test_nothing_waits_for_the_device(unpoisoned):
    """Fake tensors have no values, so whatever asks for one (`.item()`, `nonzero`, a branch on a tensor) raises."""
    with FakeTensorMode():
        student = torch.randn(2, 6, 101, requires_grad=True)
        teacher, labels = torch.randn(2, 6, 101), torch.randint(101, (2, 6))
        loss_fn = AdaKDLoss("jeffreys", total_steps=10, ce_weight=0.1, shift=True)
        for _ in range(2):
            out = loss_fn(student, teacher, labels, num_items=torch.tensor(10))
            out.loss.backward()
            loss_fn.step()
        assert out.loss.shape == () and out.selected.shape == (2, 6) and student.grad.shape == student.shape
        token_difficulty(student, teacher, labels > 3, "cross_entropy", labels=labels)


class Allocations(TorchDispatchMode):
    """The largest storage that an operator made, in bytes; views and results in place are left out."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage().data_ptr()
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if torch.is_tensor(x)
        }
        for x in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in inputs:
                self.sizes.append(x.untyped_storage().nbytes())
        return out


@pytest.mark.interpret
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_no_temporary_of_the_size_of_the_logits(inplace, monkeypatch, unpoisoned):
    """Neither beside the kernels (dispatched operators) nor in their launchers (`torch.empty`)."""
    student = logits(1, 6, 5003, dtype=torch.bfloat16, seed=3, grad=True)
    teacher = logits(1, 6, 5019, dtype=torch.bfloat16, seed=4)
    labels = torch.tensor([[3, 4, -100, 5, 6, 7]])
    produced = student * 1.0
    launched, allocate = [], torch.empty

    def empty(*args, **kwargs):
        out = allocate(*args, **kwargs)
        launched.append(out.untyped_storage().nbytes())
        return out

    monkeypatch.setattr(torch, "empty", empty)
    with Allocations() as seen:
        out = adakd_loss(
            produced,
            teacher,
            labels,
            focus_ratio=0.5,
            ce_weight=0.1,
            shift=True,
            inplace=inplace,
            divergence="jeffreys",
        )
        out.loss.backward()
    of_logits = 6 * 5003 * 2
    large = [size for size in launched if size > 4096]
    assert large == ([] if inplace else [of_logits])  # the gradient
    accumulated = [size for size in seen.sizes if size > 4096]
    assert len(accumulated) <= (1 if inplace else 2), accumulated  # the gradient, and that of `student * 1.0`
    assert student.grad is not None and math.isfinite(student.grad.float().sum())


@pytest.mark.fast
def test_backends_name_their_reason(monkeypatch):
    from adakd_kernels.ops import backends

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_triton_installed", lambda: True)
    assert backends.backend("cuda") == ("triton", "Triton is installed and compiles for cuda")
    assert backends.backend("mps") == ("reference", "there is no kernel for mps")
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    assert backends.backend("cuda").name == "reference" and "pip install triton" in backends.backend("cuda").reason
    monkeypatch.setattr(backends, "_triton_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.backend("cpu").name == "triton-interpreter"
