"""`linear_token_divergence`, and losses whose choice of tokens is given: as from logits, without the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adakd_kernels import (
    TokenChoice,
    adakd_loss,
    inverse_difficulty_temperature,
    linear_adakd_loss,
    linear_token_divergence,
    select_tokens,
    token_divergence,
)

from .cases import ONE_OF_EACH, assert_close_as_eager, logits, name_of, temperatures, uniform
from .linear_cases import EXACT, Calls, Case, LoRAHead, without_operators

pytestmark = [pytest.mark.fast, pytest.mark.gpu]

CAPPED = {"student_scale": 0.8, "student_softcap": 1.5, "teacher_scale": 1.7, "teacher_softcap": 2.0}


def mask_of(case: Case) -> Tensor:
    return case.labels != -100


def from_hidden(case: Case, *args: Any, **options: Any) -> Tensor:
    given = {"student_bias": case.bias, "teacher_bias": case.bias_t, "chunk_tokens": 5, **options}
    return linear_token_divergence(case.hidden, case.weight, case.hidden_t, case.weight_t, *args, **given)


def assert_equal(case: Case, *args: Any, **options: Any) -> None:
    """Values, and gradients under upstream weights of both signs and of 0, equal those from the logits."""
    upstream = torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(9), device="cpu")
    upstream = upstream.to(case.hidden)
    upstream[1, 1] = 0.0
    ours, expected = from_hidden(case, *args, **options), token_divergence(*case.logits(**options), *args)
    torch.testing.assert_close(ours, expected, **EXACT)
    grads, plain = (torch.autograd.grad((upstream * x).sum(), case.leaves()) for x in (ours, expected))
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.native
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_every_divergence(divergence):
    case = Case()
    assert_equal(case, temperatures(3, 7), divergence, mask_of(case))


@pytest.mark.parametrize("name", ["all", "float", "0-d", "masked", "capped"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100, None])
def test_every_option(name, chunk_tokens):
    case = Case()
    args, options = {
        "all": ((temperatures(3, 7),), {}),
        "float": ((1.7, "forward_kl"), {}),
        "0-d": ((torch.tensor(1.7), "jeffreys"), {}),
        "masked": ((temperatures(3, 7), "reverse_kl", mask_of(case)), {}),
        "capped": ((temperatures(3, 7), "jensen_shannon", mask_of(case)), CAPPED),
    }[name]
    assert_equal(case, *args, chunk_tokens=chunk_tokens, **options)


def test_defaults_and_shapes():
    """At temperature 1, reverse KL, all tokens; (N,) for (N, H); a weight with more rows gets zeros there."""
    case = Case(vocab=67, vocab_t=61)
    ours = from_hidden(case)
    torch.testing.assert_close(ours, token_divergence(*case.logits()), **EXACT)
    flat = linear_token_divergence(
        case.hidden.flatten(0, 1), case.weight, case.hidden_t.flatten(0, 1), case.weight_t,
        student_bias=case.bias, teacher_bias=case.bias_t,
    )  # fmt: skip
    torch.testing.assert_close(flat, ours.flatten(), **EXACT)
    (grad,) = torch.autograd.grad(ours.sum(), case.weight)
    assert (grad[61:] == 0).all() and (grad[:61] != 0).any(1).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("module", [False, True])
def test_gradcheck(unpoisoned, divergence, module):
    """One-sweep and two-sweep, heads that are a weight and a module; `gradcheck` weights every output at random."""
    case = Case(bias=not module)
    head = LoRAHead(case.weight)
    options = {"chunk_tokens": 4, "student_softcap": 3.0, "student_scale": 0.8}
    tau, mask = temperatures(3, 7), mask_of(case)

    def of_weight(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_token_divergence(
            hidden, weight, case.hidden_t, case.weight_t, tau, divergence, mask, student_bias=bias, **options
        )

    def of_module(hidden: Tensor, down: Tensor, up: Tensor) -> Tensor:
        assert head.down is down and head.up is up  # they are changed in their place
        return linear_token_divergence(hidden, head, case.hidden_t, case.weight_t, tau, divergence, mask, **options)

    function, inputs = of_weight, (case.hidden, case.weight, case.bias)
    if module:
        function, inputs = of_module, (case.hidden, head.down, head.up)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.interpret
@pytest.mark.native
@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
def test_as_exact_as_from_logits(dtype, options):
    """Both routes against fp64, by the tolerance rule."""
    case = Case(dtype=dtype)
    exact = case.double()
    upstream = uniform(3, 7, seed=3) - 0.5
    results = []
    for of in (case, case, exact):
        if results:
            value = token_divergence(*of.logits(**options), 1.3, "forward_kl", mask_of(of))
        else:
            value = from_hidden(of, 1.3, "forward_kl", mask_of(of), **options)
        grads = torch.autograd.grad((value * upstream.to(value.dtype)).sum(), of.leaves())
        assert all(grad.dtype == x.dtype for grad, x in zip(grads, of.leaves(), strict=True))
        results.append((value, *grads))
    for ours, eager, true in zip(*results, strict=True):
        assert_close_as_eager(ours.detach(), eager.detach(), true.detach())


def test_small_gradients_in_fp16_are_no_zeros():
    """Upstream weights below the smallest number of fp16, as a mean over many tokens has them."""
    hidden, weight, weight_t = logits(64, 8, seed=1), logits(997, 8, seed=2, scale=0.2), logits(997, 8, seed=3)
    grads = []
    for enabled in (True, False):
        leaf = weight.clone().requires_grad_()
        with torch.autocast(hidden.device.type, dtype=torch.float16, enabled=enabled):
            value = linear_token_divergence(hidden, leaf, hidden, weight_t)
        grads += torch.autograd.grad(2.0**-26 * value.sum(), leaf)
    assert grads[1].abs().max() < 2.0**-14  # the smallest normal number of fp16
    assert (grads[0] - grads[1]).abs().max() <= 0.02 * grads[1].abs().max()


def test_autocast():
    """fp32 hidden states and weights, products in bf16 in the backward too, which autocast does not reach itself."""
    case = Case(dtype=torch.float32)
    exact = case.double()
    with torch.autocast(case.hidden.device.type, dtype=torch.bfloat16):
        values = [from_hidden(case, 1.3), token_divergence(*case.logits(), 1.3)]
    values.append(token_divergence(*exact.logits(), 1.3))
    grads = [
        torch.autograd.grad(value.sum(), of.leaves()) for value, of in zip(values, (case, case, exact), strict=True)
    ]
    for ours, eager, true in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        assert_close_as_eager(ours, eager, true)
    with torch.no_grad():
        assert not torch.equal(from_hidden(case, 1.3), values[0])  # bf16 was used at all
    case.weight = head = LoRAHead(case.weight)
    case.bias, made = None, []
    head.register_forward_hook(lambda module, args, out: made.append(out.dtype))
    with torch.autocast(case.hidden.device.type, dtype=torch.bfloat16):
        value = from_hidden(case, 1.3)
    before = len(made)
    value.sum().backward()
    assert set(made) == {torch.bfloat16} and len(made) > before


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_only_what_is_asked_for(frozen):
    case = Case()
    getattr(case, frozen).requires_grad_(False)
    assert_equal(case, 1.3)
    with torch.no_grad():
        assert not from_hidden(case, 1.3).requires_grad
    for name in ("hidden", "weight", "bias"):
        getattr(case, name).requires_grad_(False)
    assert not from_hidden(case, 1.3).requires_grad
    case.hidden.requires_grad_()
    for name in ("hidden_t", "weight_t", "bias_t"):
        getattr(case, name).requires_grad_()
        with pytest.raises(ValueError, match=r"teacher_\w+ requires grad, but the teacher is a constant"):
            from_hidden(case)
        getattr(case, name).requires_grad_(False)


def test_backward_again_and_what_is_refused():
    case = Case()
    value = from_hidden(case, 1.3)
    first = torch.autograd.grad(value.sum(), case.leaves(), retain_graph=True)
    for grad, again in zip(first, torch.autograd.grad(value.sum(), case.leaves(), retain_graph=True), strict=True):
        assert torch.equal(grad, again)
    (grad,) = torch.autograd.grad(value.sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="the loss has no second derivative"):
        grad.sum().backward()
    with torch.no_grad():
        case.weight.mul_(2.0)  # an optimizer step before the backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_no_token_in_the_mask():
    case = Case()
    value = from_hidden(case, 1.3, "reverse_kl", torch.zeros(3, 7, dtype=torch.bool))
    assert (value == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(value.sum(), case.leaves()))


def test_a_teacher_run_in_inference_mode():
    case, plain = Case(), Case()
    with torch.inference_mode():
        for name in ("hidden_t", "weight_t", "bias_t"):
            setattr(case, name, getattr(case, name).clone())
        mask = mask_of(case)
    results = []
    for each, chosen in ((case, mask), (plain, mask_of(plain))):
        value = from_hidden(each, 1.3, "reverse_kl", chosen)
        results.append([value, *torch.autograd.grad(value.sum(), each.leaves())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_module_and_its_hooks():
    """As its merged weight; each parameter's hook sees one gradient, the whole one."""
    case, head = Case(bias=False), LoRAHead(Case().weight)
    weight_t, weight = case.weight_t, (head.weight + head.up @ head.down)
    leaves = [case.hidden, head.down, head.up]
    case.weight = weight
    expected = torch.autograd.grad(3.0 * from_hidden(case, 1.3).sum(), leaves)
    case.weight, case.weight_t = head, lambda hidden: F.linear(hidden, weight_t)
    seen: list[Tensor] = []
    head.up.register_hook(lambda grad: seen.append(grad.clone()))
    (3.0 * from_hidden(case, 1.3).sum()).backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad, **EXACT)
    assert len(seen) == 1 and torch.equal(seen[0], head.up.grad)


@pytest.mark.parametrize("masked", [False, True])
def test_waits_and_memory(monkeypatch, masked):
    """One wait where there is a mask, none in the backward; no tensor of N x V; no product of tokens without."""
    n, vocab, chunk = 64, 5000, 8
    hidden, weight, weight_t = logits(n, 4, grad=True), logits(vocab, 4, seed=1), logits(vocab, 4, seed=2)
    computed: list[int] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: computed.append(len(a)) or mm(a, b, out=out))
    without_operators(monkeypatch)
    mask = torch.arange(n) < 20 if masked else None
    with Calls() as calls:
        value = linear_token_divergence(
            hidden, weight, hidden.detach(), weight_t, mask=mask, chunk_tokens=chunk
        )  # fmt: skip
        value.sum().backward()
    assert calls.waits() == int(masked)
    assert chunk * vocab <= max(math.prod(shape) for _, shape in calls.made) <= chunk * vocab + vocab
    assert sum(computed) == 5 * (20 if masked else n)  # both heads twice, and dH


def test_bad_arguments():
    case, mask = Case(), torch.ones(3, 7)
    for match, args, options in (
        ("mask must be bool", (1.0, "reverse_kl", mask), {}),
        ("temperature must be > 0", (0.0,), {}),
        (r"temperature must have the shape \(3, 7\)", (torch.ones(7),), {}),
        ("temperature requires grad", (torch.ones(3, 7, requires_grad=True),), {}),
        ("divergence must be one of", (1.0, "kl"), {}),
        ("chunk_tokens must be at least 1", (1.0,), {"chunk_tokens": 0}),
        ("student_softcap must be None or > 0", (1.0,), {"student_softcap": -1.0}),
        (r"student_bias must be \(61,\)", (1.0,), {"student_bias": torch.ones(3)}),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            from_hidden(case, *args, **options)


# A choice that was made over more than one batch.


def whole_choice(difficulty: Tensor, valid: Tensor, ratio: float) -> TokenChoice:
    """(3)-(6) by the public functions."""
    selected = select_tokens(difficulty, ratio, valid)
    temperature = inverse_difficulty_temperature(difficulty, selected).where(valid, 1.0)
    n = valid.sum()
    k = torch.floor(ratio * n.double()).clamp_min(1)
    return TokenChoice(difficulty, valid, temperature, selected, n.to(difficulty), k.to(difficulty))


@pytest.mark.parametrize("route", ["logits", pytest.param("hidden", marks=pytest.mark.interpret), "module"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_micro_batches_of_one_choice_add_up_to_the_batch(route, ce_weight):
    """At a share of which no micro-batch has its own ⌊r·n⌋; a token whose rows are empty is valid nowhere."""
    case = Case(bias=False)
    options = {"focus_ratio": 0.3, "ce_weight": ce_weight, "student_softcap": 1.5, "divergence": "jensen_shannon"}
    whole = case.from_logits(**options)
    choice = whole_choice(whole.difficulty, mask_of(case), 0.3)
    assert torch.equal(choice.selected, whole.selected)
    expected = torch.autograd.grad(whole.loss, case.leaves())
    head = LoRAHead(case.weight)
    with torch.no_grad():
        head.up.zero_()
    head.weight.requires_grad_()
    total, loss = [torch.zeros_like(x) for x in expected], 0.0
    leaves = case.leaves() if route != "module" else [case.hidden, head.weight]
    for row in range(3):
        part = slice(row, row + 1)
        own = choice.each(lambda values, part=part: values[part])
        given = {"divergence": "jensen_shannon", "ce_weight": ce_weight, "choice": own}
        if route == "logits":
            student, teacher = case.logits(student_softcap=1.5)
            out = adakd_loss(student[part], teacher[part], case.labels[part], **given)
        else:
            weight = head if route == "module" else case.weight
            out = linear_adakd_loss(
                case.hidden[part], weight, case.hidden_t[part], case.weight_t, case.labels[part], chunk_tokens=2,
                student_softcap=1.5, **given,
            )  # fmt: skip
        loss += out.loss.item()
        assert torch.equal(out.selected, own.selected) and torch.equal(out.difficulty, own.difficulty)
        torch.testing.assert_close(out.token_loss, whole.token_loss[part], **EXACT)
        for sum_, grad in zip(total, torch.autograd.grad(out.loss, leaves), strict=True):
            sum_ += grad
    assert loss == pytest.approx(whole.loss.item(), rel=1e-12)
    for sum_, grad in zip(total, expected, strict=True):
        torch.testing.assert_close(sum_, grad, **EXACT)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_tokens_of_a_choice_go_through_the_heads_once(monkeypatch, ce_weight):
    """The selected ones, and with a cross-entropy the valid ones; nothing is measured that is known."""
    case, computed = Case(bias=False), []
    out = case.from_hidden(focus_ratio=0.5)
    choice = whole_choice(out.difficulty, mask_of(case), 0.5)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: computed.append((len(a), len(b))) or mm(a, b, out=out))
    with torch.no_grad(), Calls() as calls:
        again = case.from_hidden(choice=choice, ce_weight=ce_weight)
    assert sum(rows for rows, _ in computed) == 2 * (17 if ce_weight else 8)
    assert any("token_stats" in name for name in calls.names) == bool(ce_weight)
    torch.testing.assert_close(again.token_loss, out.token_loss, **EXACT)


@pytest.mark.parametrize("route", ["from_logits", "from_hidden"])
def test_bad_choices(route):
    case = Case()
    good = whole_choice(case.from_logits().difficulty, mask_of(case), 0.5)
    function: Callable[..., Any] = getattr(case, route)
    for match, change in (
        (r"choice.temperature must have the shape \(3, 7\)", {"temperature": torch.ones(7)}),
        ("choice.temperature must be fp16, bf16, fp32 or fp64", {"temperature": good.selected}),
        ("choice.temperature requires grad", {"temperature": torch.ones(3, 7, requires_grad=True)}),
        ("choice.selected must be bool", {"selected": torch.ones(3, 7)}),
        ("choice.k must be a 0-d tensor", {"k": 8}),
        ("choice.n must be a 0-d tensor", {"n": torch.ones(2)}),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            function(choice=good._replace(**change))
    with pytest.raises(TypeError, match="choice must be a TokenChoice, got tuple"):
        function(choice=tuple(good))
