"""`linear_adakd_loss` and `LinearAdaKDLoss`: the loss from hidden states equals the one from logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adakd_kernels import AdaKDLoss, LinearAdaKDLoss, linear_adakd_loss
from adakd_kernels.functional import TokenChoice
from adakd_kernels.linear import chunks, heads

from .cases import ONE_OF_EACH, assert_close_as_eager, logits, name_of, tokens
from .linear_cases import AT_ONCE, EXACT, ROW, Calls, Case, LoRAHead, V, without_operators

pytestmark = [pytest.mark.fast, pytest.mark.gpu]  # and the tests of the kernels' numbers: interpret


def assert_equal_routes(case: Case, **options: Any) -> None:
    """All outputs, and the gradients of everything that has one, under an upstream gradient that is not 1."""
    ours, expected = case.from_hidden(**options), case.from_logits(**options)
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    grads = torch.autograd.grad(-2.5 * ours.loss, case.leaves())
    for grad, plain in zip(grads, torch.autograd.grad(-2.5 * expected.loss, case.leaves()), strict=True):
        torch.testing.assert_close(grad, plain, **EXACT)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_every_divergence(divergence):
    assert_equal_routes(Case(), divergence=divergence, focus_ratio=0.6, base_temperature=1.3)
    assert_equal_routes(Case(), divergence=divergence, ce_weight=0.3, focus_ratio=0.4, keep_bytes=6 * ROW)
    assert_equal_routes(Case(), divergence=divergence, base_temperature=1.3, **AT_ONCE)


OPTIONS = {
    "all tokens": {},
    "another difficulty": {"difficulty": "jensen_shannon", "focus_ratio": 0.5},
    "difficulty by cross-entropy": {"difficulty": "cross_entropy", "focus_ratio": 0.5},
    "cross-entropy alone": {"ce_weight": 1.0},
    "soft-caps": {"student_softcap": 1.5, "teacher_softcap": 2.0, "focus_ratio": 0.7},
    "scales": {"student_scale": 0.3, "teacher_scale": 1.7, "ce_weight": 0.2},
    "scale and soft-cap": {"student_scale": 0.3, "student_softcap": 1.5, "ce_weight": 0.2, "focus_ratio": 0.3},
    "shift": {"shift": True, "focus_ratio": 0.5},
    "num_items": {"num_items": 40, "focus_ratio": 0.5, "ce_weight": 0.1},
    "num_items as a tensor": {"num_items": torch.tensor(0.25), "ce_weight": 0.1},
    "share as a tensor": {"focus_ratio": torch.tensor(0.29, dtype=torch.float64)},
    "other ignore_index": {"ignore_index": 7},
    "at once": {"base_temperature": 1.3, "ce_weight": 0.3, **AT_ONCE},
    "at once with num_items": {"num_items": 40, "difficulty": "cross_entropy", "ce_weight": 0.3, **AT_ONCE},
    "at once with scale and soft-cap": {"student_scale": 0.3, "student_softcap": 1.5, "keep_bytes": 999, **AT_ONCE},
    "one temperature for a share": {"focus_ratio": 0.5, **AT_ONCE},
    "one temperature for a share that is a tensor": {"focus_ratio": torch.tensor(1.0), **AT_ONCE},
}


INTERPRETED = ("scale and soft-cap", "num_items", "at once", "one temperature for a share")
"""A few: the kernels' own tests interpret them in every way, and here it takes its time."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.interpret] * (name in INTERPRETED)) for name in OPTIONS]
)
def test_every_option(name):
    case = Case()
    if name == "other ignore_index":
        case.labels[case.labels == -100] = 7
    assert_equal_routes(case, **OPTIONS[name])


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 17, 100, None])
@pytest.mark.parametrize("keep", [0, 1, 4, 7, 16, 17, 1000])
def test_chunks_and_kept_logits(chunk_tokens, keep):
    """17 labelled tokens, of which 8 are selected; some chunk sizes divide neither."""
    for options in ({"focus_ratio": 0.5}, {"focus_ratio": 0.5, "ce_weight": 0.3}, {"student_softcap": 1.5}, AT_ONCE):
        assert_equal_routes(Case(), chunk_tokens=chunk_tokens, keep_bytes=keep * ROW + 5, **options)


@pytest.mark.parametrize("vocabularies", [(61, 61), (61, 40), (40, 61)])
@pytest.mark.parametrize("bias", [False, True])
def test_vocabularies_of_different_length(vocabularies, bias):
    case = Case(bias=bias, vocab=vocabularies[0], vocab_t=vocabularies[1])
    assert_equal_routes(case, ce_weight=0.2, focus_ratio=0.5)
    (grad,) = torch.autograd.grad(case.from_hidden().loss, case.weight)
    assert (grad[40:] == 0).all() if vocabularies[1] == 40 else (grad != 0).any(1).all()


def test_shapes_and_strides():
    case = Case()
    whole = case.from_hidden(focus_ratio=0.5)
    flat = linear_adakd_loss(
        case.hidden.flatten(0, 1), case.weight, case.hidden_t.flatten(0, 1), case.weight_t, case.labels.flatten(),
        student_bias=case.bias, teacher_bias=case.bias_t, focus_ratio=0.5,
    )  # fmt: skip
    torch.testing.assert_close(flat.loss, whole.loss, **EXACT)
    assert flat.difficulty.shape == (21,) and whole.difficulty.shape == (3, 7)
    longer = torch.cat((case.hidden, case.hidden), 1).detach().requires_grad_()
    case.hidden, plain = longer[:, :7], torch.autograd.grad(whole.loss, case.hidden)[0]
    (grad,) = torch.autograd.grad(case.from_hidden(focus_ratio=0.5).loss, longer)
    torch.testing.assert_close(grad[:, :7], plain, **EXACT)
    assert (grad[:, 7:] == 0).all()


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("valid", [0, 1, 2])
def test_few_valid_tokens(valid, keep):
    case = Case()
    case.labels.fill_(-100)
    case.labels[1, :valid] = 3
    for options in ({"focus_ratio": 0.3}, {"ce_weight": 0.5}, {"focus_ratio": 0.3, "num_items": 0}, AT_ONCE):
        assert_equal_routes(case, keep_bytes=keep * ROW, **options)
    assert case.from_hidden(focus_ratio=0.3).selected.sum() == min(valid, 1)
    if valid == 0:
        for options in ({"focus_ratio": 0.3}, AT_ONCE):
            out = case.from_hidden(**options)
            assert out.loss == 0.0
            assert all((grad == 0).all() for grad in torch.autograd.grad(out.loss, case.leaves()))


@pytest.mark.parametrize("keep", [0, pytest.param(3, marks=pytest.mark.interpret), 1000])
def test_rows_that_are_empty_or_nan(keep):
    """A token whose logits are all −inf is ignored although it has a label, and NaN is loud."""
    case = Case(bias=False)
    with torch.no_grad():
        case.weight.abs_()
        case.hidden[1, 2] = -math.inf
    assert_equal_routes_without_weight(case, keep)
    with torch.no_grad():
        case.hidden[1, 3] = math.nan
    assert case.from_hidden(keep_bytes=keep * ROW, focus_ratio=0.5).loss.isnan()
    assert case.from_hidden(**AT_ONCE).loss.isnan()


def assert_equal_routes_without_weight(case: Case, keep: int) -> None:
    """The weight's gradient is 0·∞ in both routes where hidden states are infinite."""
    case.weight.requires_grad_(False)
    for selected, options in (
        (14, {"focus_ratio": 0.9}),
        (14, {"focus_ratio": 0.9, "ce_weight": 0.3}),
        (16, AT_ONCE),
        (16, {"ce_weight": 0.3, **AT_ONCE}),
    ):
        ours, expected = case.from_hidden(keep_bytes=keep * ROW, **options), case.from_logits(**options)
        assert ours.selected.sum() == selected and not ours.selected[1, 2]
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
        torch.testing.assert_close(
            torch.autograd.grad(ours.loss, case.hidden), torch.autograd.grad(expected.loss, case.hidden), **EXACT
        )


def test_equal_difficulties_are_kept_as_they_are_selected():
    """Ties go to the lower index in the selection, and so they must where rows take the place of others."""
    case = Case()
    with torch.no_grad():
        for hidden in (case.hidden, case.hidden_t):  # one feature, so that no product rounds
            hidden.zero_()[..., 0] = 1.0
    for keep in range(9):
        assert_equal_routes(case, keep_bytes=keep * ROW, focus_ratio=0.5, chunk_tokens=3)


def test_tied_embeddings():
    weight, ids = logits(V, 12, dtype=torch.float64, grad=True), tokens(V, 3, 7, seed=8)
    case, grads = Case(bias=False), []
    for route in (case.from_hidden, case.from_logits):
        case.weight, case.hidden = weight, F.embedding(ids, weight).tanh()
        grads.append(torch.autograd.grad(route(focus_ratio=0.5).loss, weight)[0])
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_only_what_is_asked_for(frozen):
    case = Case()
    getattr(case, frozen).requires_grad_(False)
    with Calls() as calls:
        loss = case.from_hidden(focus_ratio=0.5).loss
    assert (torch.float64, (V, 12)) not in calls.made if frozen == "weight" else True
    grads = torch.autograd.grad(loss, case.leaves())
    for grad, plain in zip(
        grads, torch.autograd.grad(case.from_logits(focus_ratio=0.5).loss, case.leaves()), strict=True
    ):
        torch.testing.assert_close(grad, plain, **EXACT)


def test_no_gradient_is_computed_where_none_is_asked_for():
    case = Case()
    plain = case.from_logits(focus_ratio=0.5)
    with torch.no_grad(), Calls() as calls:
        out = case.from_hidden(focus_ratio=0.5)
    assert not any("gradient" in name for name in calls.names)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, plain.loss.detach(), **EXACT)
    with Calls() as calls:
        out = case.from_hidden(focus_ratio=0.5)
    assert any("gradient" in name for name in calls.names)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]


def test_second_backward_and_second_derivative():
    case = Case()
    loss = case.from_hidden(focus_ratio=0.5).loss
    first = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    for grad, again in zip(first, torch.autograd.grad(loss, case.leaves(), retain_graph=True), strict=True):
        assert torch.equal(grad, again)
    (grad,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="the loss has no second derivative"):
        grad.sum().backward()


def test_micro_batches_add_up_to_the_batch():
    case = Case()
    options = {"temperature_scale": 0.0, "base_temperature": 1.3, "ce_weight": 0.2}
    whole = torch.autograd.grad(case.from_hidden(**options).loss, case.leaves())
    n = int((case.labels != -100).sum())
    total = [torch.zeros_like(x) for x in whole]
    for row in range(3):
        loss = linear_adakd_loss(
            case.hidden[row : row + 1], case.weight, case.hidden_t[row : row + 1], case.weight_t,
            case.labels[row : row + 1], student_bias=case.bias, teacher_bias=case.bias_t, num_items=n, **options,
        ).loss  # fmt: skip
        for part, grad in zip(total, torch.autograd.grad(loss, case.leaves()), strict=True):
            part += grad
    for part, grad in zip(total, whole, strict=True):
        torch.testing.assert_close(part, grad, **EXACT)


@pytest.mark.interpret
@pytest.mark.parametrize("options", [{}, {"student_softcap": 2.0, "ce_weight": 0.3}], ids=["plain", "soft-cap and CE"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("share", [1.0, torch.tensor(1.0)], ids=["at once", "two phases"])
def test_as_exact_as_the_logits_route(share, dtype, options):
    """Both routes against fp64, by the tolerance rule; one temperature, so that all compute the same function."""
    case = Case(dtype=dtype)
    options = {"focus_ratio": share, "divergence": "forward_kl", **AT_ONCE, **options}
    results = []
    for of, route in ((case, "from_hidden"), (case, "from_logits"), (case.double(), "from_logits")):
        out = getattr(of, route)(**options)
        grads = torch.autograd.grad(out.loss * 1.7, of.leaves())
        assert all(grad.dtype == x.dtype for grad, x in zip(grads, of.leaves(), strict=True))
        results.append((out.loss, out.difficulty, *grads))
    for ours, eager, exact in zip(*results, strict=True):
        assert_close_as_eager(ours.detach(), eager.detach(), exact.detach())


def test_weight_gradient_is_added_up_in_fp32():
    """A thousand bf16 chunks of one token each: added up in bf16, the sum would stop growing."""
    n, grads = 1000, []
    for dtype, chunk_tokens in ((torch.bfloat16, 1), (torch.float64, None)):
        hidden, weight = torch.ones(n, 1, dtype=dtype), torch.zeros(3, 1, dtype=dtype, requires_grad=True)
        teacher = torch.tensor([[4.0], [0.0], [0.0]], dtype=dtype)
        labels = torch.zeros(n, dtype=torch.long)
        linear_adakd_loss(
            hidden, weight, hidden, teacher, labels, divergence="forward_kl", chunk_tokens=chunk_tokens
        ).loss.backward()
        grads.append(weight.grad.double())
    torch.testing.assert_close(*grads, rtol=torch.finfo(torch.bfloat16).eps, atol=0.0)


def test_small_gradients_in_fp16_are_no_zeros():
    """As under a gradient scaler: the loss is scaled up after the gradients were computed."""
    n, scale, grads = 64, 2.0**24, []
    for dtype in (torch.float16, torch.float64):
        hidden = logits(n, 8, dtype=torch.float16, seed=1, scale=1.0).to(dtype).requires_grad_()
        weight, weight_t = (logits(997, 8, dtype=torch.float16, seed=s, scale=0.2).to(dtype) for s in (2, 3))
        loss = linear_adakd_loss(
            hidden, weight, hidden.detach(), weight_t, tokens(997, n), temperature_scale=0.0, num_items=2**20
        ).loss
        (grad,) = torch.autograd.grad(loss * scale, hidden)
        grads.append(grad.double())
    assert grads[1].abs().max() / scale < torch.finfo(torch.float16).tiny
    assert (grads[0] - grads[1]).abs().max() <= 0.02 * grads[1].abs().max()


def test_autocast():
    """fp32 hidden states and weights, products in bf16, gradients in fp32, as a linear layer does."""
    case = Case(dtype=torch.float32)
    options = {"temperature_scale": 0.0, "ce_weight": 0.2}
    device = case.hidden.device.type
    with torch.autocast(device, dtype=torch.bfloat16):
        results = [route(**options) for route in (case.from_hidden, case.from_logits)]
    exact = case.double()
    plain = exact.from_logits(**options)
    grads = [torch.autograd.grad(out.loss, case.leaves()) for out in results]
    grads.append(torch.autograd.grad(plain.loss, exact.leaves()))
    for ours, eager, true in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        assert_close_as_eager(ours, eager, true)
    with torch.no_grad():
        unscaled = case.from_hidden(**options).loss
    assert unscaled != results[0].loss  # bf16 was used at all


@pytest.mark.interpret
@pytest.mark.parametrize(
    "options", [{"focus_ratio": 0.5, "keep_bytes": 3 * ROW}, {"ce_weight": 0.3, "student_softcap": 1.5}, AT_ONCE]
)
@pytest.mark.parametrize("hidden_grad", [False, True])
def test_head_that_is_a_module(options, hidden_grad):
    case = Case(bias=False)
    case.hidden.requires_grad_(hidden_grad)
    head = LoRAHead(case.weight)
    weight_t = case.weight_t
    leaves = [*([case.hidden] if hidden_grad else []), head.down, head.up]
    case.weight, case.weight_t = head, lambda hidden: F.linear(hidden, weight_t)
    ours = case.from_hidden(**options)
    case.weight, case.weight_t = head.weight + head.up @ head.down, weight_t
    expected = case.from_logits(**options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    grads = torch.autograd.grad(3.0 * ours.loss, leaves)
    for grad, plain in zip(grads, torch.autograd.grad(3.0 * expected.loss, leaves), strict=True):
        torch.testing.assert_close(grad, plain, **EXACT)
    with torch.no_grad():
        case.weight = head
        torch.testing.assert_close(case.from_hidden(**options).loss, expected.loss.detach(), **EXACT)


def test_module_under_autocast():
    """The module casts, in both phases, although nothing else in them is under autocast."""
    case, head = Case(dtype=torch.float32, bias=False), nn.Linear(12, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(case.weight)
    options, made = {"temperature_scale": 0.0}, []
    head.register_forward_hook(lambda module, args, out: made.append(out.dtype))
    exact = case.double()
    (true,) = torch.autograd.grad(exact.from_logits(**options).loss, exact.weight)
    with torch.autocast(case.hidden.device.type, dtype=torch.bfloat16):
        (eager,) = torch.autograd.grad(case.from_logits(**options).loss, case.weight)
        case.weight = head
        case.from_hidden(**options).loss.backward()
    assert set(made) == {torch.bfloat16}
    assert_close_as_eager(head.weight.grad, eager, true)


@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize("options", [{"focus_ratio": 0.5}, {"focus_ratio": torch.tensor(0.5)}, AT_ONCE])
def test_one_wait_for_the_device(monkeypatch, options, keep):
    """That for the labelled tokens; what the reference body of an operator does is not counted."""
    case = Case()
    read: list[str] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: read.append(self.device.type) or tolist(self))
    without_operators(monkeypatch)
    with Calls() as calls:
        out = case.from_hidden(**options, ce_weight=0.2, keep_bytes=keep * ROW)
    out.loss.backward()
    assert calls.waits() == 1 and set(read) <= {"cpu"}


@pytest.mark.parametrize("keep", [0, 8])
def test_no_tensor_is_larger_than_a_chunk(monkeypatch, keep):
    """Beside the gradients: nothing of N x V, and nothing of V x H where the head is frozen."""
    n, hidden_size, vocab, chunk = 64, 4, 5000, 8
    hidden = logits(n, hidden_size, grad=True)
    weight, weight_t = logits(vocab, hidden_size, seed=1), logits(vocab, hidden_size, seed=2)
    without_operators(monkeypatch)
    with Calls() as calls:
        linear_adakd_loss(
            hidden, weight, hidden.detach(), weight_t, tokens(vocab, n), chunk_tokens=chunk, focus_ratio=0.5,
            keep_bytes=keep * 2 * vocab * 4,
        ).loss.backward()  # fmt: skip
    largest = max(math.prod(shape) for _, shape in calls.made)
    assert chunk * vocab <= largest <= (max(chunk, keep) + 1) * vocab
    large = [shape for _, shape in calls.made if math.prod(shape) >= vocab]
    assert len(large) <= 4, large


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_buffers_of_a_chunk_fit_in_the_budget(monkeypatch, softcap):
    budget, n, vocab = 1_000_000, 512, 1000
    hidden, weight = logits(1, n, 4), logits(vocab, 4)
    monkeypatch.setitem(chunks.CHUNK_BYTES, hidden.device.type, budget)
    student, teacher = (heads.HeadInput(hidden, weight, None, 1.0, cap).head(vocab) for cap in (softcap, None))
    labelled = chunks.Tokens(torch.arange(n, device=hidden.device), tokens(vocab, 1, n), n)
    objective = chunks.Objective()
    made = chunks.Chunks(student, teacher, labelled, objective, None)
    assert budget / 2 <= made.raw_s.nbytes + made.z_s.nbytes + made.z_t.nbytes <= budget


@pytest.mark.parametrize(
    "options, rows",
    [
        *(({"focus_ratio": 0.5, "keep_bytes": keep * ROW}, 17 + 8 - min(keep, 8)) for keep in (0, 3, 8, 100)),
        (AT_ONCE, 17),
    ],
)
def test_logits_are_not_computed_again_without_need(monkeypatch, options, rows):
    """With a share of 0.5, 8 of the 17 tokens are selected; each that is kept is one row less in the second phase."""
    computed = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda b, h, w, out: computed.append(len(h)) or addmm(b, h, w, out=out))
    Case().from_hidden(**options)
    assert sum(computed) == 2 * rows


@pytest.mark.interpret
def test_runs_agree_bit_for_bit():
    case = Case(dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        out = case.from_hidden(focus_ratio=0.5, keep_bytes=3 * ROW // 4)
        runs.append([*out, *torch.autograd.grad(out.loss, case.leaves())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("share", [1.0, torch.tensor(1.0)], ids=["at once", "two phases"])
def test_gradcheck(unpoisoned, share):
    case = Case()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_adakd_loss(
            hidden, weight, case.hidden_t, case.weight_t, case.labels, student_bias=bias, chunk_tokens=4,
            focus_ratio=share, ce_weight=0.2, student_softcap=3.0, student_scale=0.8, **AT_ONCE,
        ).loss  # fmt: skip

    inputs = (case.hidden, case.weight, case.bias)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_module_equals_the_function_and_drives_its_focus():
    case = Case()
    loss_fn, plain = (
        cls("forward_kl", total_steps=10, ce_weight=0.3, student_softcap=1.5, keep_bytes=5 * ROW)
        for cls in (LinearAdaKDLoss, AdaKDLoss)
    )
    loss_fn.load_state_dict(plain.state_dict())
    args = (case.hidden, case.weight, case.hidden_t, case.weight_t, case.labels)
    options = {"divergence": "forward_kl", "ce_weight": 0.3, "student_softcap": 1.5}
    for module in (loss_fn, plain):
        module.focus.focus_ratio.fill_(0.5)
    for num_items in (None, 30):
        out = loss_fn(*args, num_items, student_bias=case.bias, teacher_bias=case.bias_t)
        expected = case.from_hidden(focus_ratio=0.5, num_items=num_items, **options)
        assert out.selected.sum() == 8
        torch.testing.assert_close(out.loss, expected.loss, **EXACT)
        student = torch.tanh(F.linear(case.hidden, case.weight, case.bias) / 1.5) * 1.5
        teacher = F.linear(case.hidden_t, case.weight_t, case.bias_t)
        torch.testing.assert_close(
            loss_fn.from_logits(student, teacher, case.labels, num_items).loss, out.loss, **EXACT
        )
        same = plain.from_hidden(*args, num_items, student_bias=case.bias, teacher_bias=case.bias_t)
        assert all(torch.equal(a, b) for a, b in zip(same, out, strict=True))
        plain(student, teacher, case.labels, num_items)
        for module in (loss_fn, plain):
            module.step()
        torch.testing.assert_close(loss_fn.focus.loss_ema, plain.focus.loss_ema, **EXACT)


@pytest.mark.parametrize(
    "options", [{"focus_ratio": 0.6}, {"ce_weight": 0.3, **AT_ONCE}], ids=["two phases", "at once"]
)
def test_hooks_of_a_head_see_the_whole_gradient_once(options):
    case = Case(bias=False)
    head = LoRAHead(case.weight)
    weight_t = case.weight_t
    case.weight, case.weight_t = head, lambda hidden: F.linear(hidden, weight_t)
    parameters = [head.down, head.up]
    expected = torch.autograd.grad(2.0 * case.from_hidden(chunk_tokens=3, **options).loss, parameters)
    seen: list[tuple[str, Tensor]] = []
    head.down.register_hook(lambda grad: seen.append(("down", grad.clone())))
    head.up.register_hook(lambda grad: seen.append(("up", grad.clone())) or grad * 0.5)
    head.up.register_post_accumulate_grad_hook(lambda p: seen.append(("up accumulated", p.grad.clone())))
    ran = []
    head.register_forward_hook(lambda *_: ran.append(True))
    loss = case.from_hidden(chunk_tokens=3, **options).loss
    assert not seen and ran
    (2.0 * loss).backward()
    assert sorted(name for name, _ in seen) == ["down", "up", "up accumulated"]
    values = dict(seen)
    assert torch.equal(values["down"], expected[0]) and torch.equal(values["up"], expected[1])
    assert torch.equal(head.up.grad, 0.5 * expected[1]) and torch.equal(values["up accumulated"], head.up.grad)


def test_hooks_of_a_head_are_there_after_an_error():
    case = Case(bias=False)
    case.weight = head = LoRAHead(case.weight)
    calls = []
    head.up.register_hook(lambda grad: calls.append(True))
    with pytest.raises(RuntimeError, match="interrupted"), heads.without_hooks([head.up]):
        raise RuntimeError("interrupted")
    head.up.sum().backward()
    assert calls == [True]


@pytest.mark.interpret
@pytest.mark.parametrize("options", [{"focus_ratio": 0.5}, AT_ONCE], ids=["two phases", "at once"])
def test_a_label_outside_the_common_vocabulary_is_loud(options):
    case = Case()
    case.labels[1, 2] = V + 3
    loss = case.from_hidden(ce_weight=0.3, **options).loss
    grads = torch.autograd.grad(loss, case.leaves())
    assert loss.isnan() and grads[0][1, 2].isnan().all() and grads[1].isnan().all() and grads[2].isnan().all()
    expected = torch.autograd.grad(case.from_logits(ce_weight=0.3, **options).loss, case.leaves())
    others = [x.flatten(0, 1)[torch.arange(21) != 9] for x in (grads[0], expected[0])]
    torch.testing.assert_close(*others, **EXACT)
    assert not others[0].isnan().any()


@pytest.mark.parametrize("module", [False, True])
def test_a_teacher_run_in_inference_mode(module):
    case, plain = Case(bias=not module), Case(bias=not module)
    with torch.inference_mode():
        for name in ("hidden_t", "weight_t", "bias_t", "labels"):
            value = getattr(case, name)
            setattr(case, name, None if value is None else value.clone())
    for each in (case, plain):
        if module:
            weight_t, frozen = each.weight_t, LoRAHead(each.weight)
            each.weight, each.weight_t = frozen, lambda hidden, weight_t=weight_t: F.linear(hidden, weight_t)
    for options in ({"focus_ratio": 0.5, "ce_weight": 0.2, "keep_bytes": 3 * ROW}, {"shift": True, **AT_ONCE}):
        results = []
        for each in (case, plain):
            leaves = [each.hidden, each.weight.down, each.weight.up] if module else each.leaves()
            loss = each.from_hidden(**options).loss
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_labels_of_a_small_type():
    case = Case()
    expected = case.from_hidden(ce_weight=0.3, focus_ratio=0.5)
    for dtype in (torch.int8, torch.int32):
        case.labels = case.labels.to(dtype)
        assert all(
            torch.equal(a, b) for a, b in zip(case.from_hidden(ce_weight=0.3, focus_ratio=0.5), expected, strict=True)
        )


@pytest.mark.parametrize("options", [{"focus_ratio": 0.5, "ce_weight": 0.3}, {"keep_bytes": 3 * ROW}, AT_ONCE], ids=str)
def test_entropy_of_the_student(options):
    """That of softmax(z) at temperature 1 in nats, of the valid tokens; nothing else changes."""
    case = Case()
    with torch.no_grad():
        case.bias[3] = -math.inf
    entropy = torch.full((3, 7), math.nan, dtype=torch.float64)
    out = case.from_hidden(student_softcap=2.0, entropy_out=entropy, **options)
    student, _ = case.logits(student_softcap=2.0)
    expected = torch.special.entr(student.softmax(-1)).sum(-1) * (case.labels != -100)
    torch.testing.assert_close(entropy, expected.detach(), **EXACT)
    without = case.from_hidden(student_softcap=2.0, **options)
    assert all(torch.equal(a, b) for a, b in zip(out, without, strict=True))
    for wrong in (torch.zeros(21), torch.zeros(3, 7, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"entropy_out must be a floating tensor of shape \(3, 7\)"):
            case.from_hidden(entropy_out=wrong)
    choice = TokenChoice(out.difficulty, case.labels != -100, out.temperature, out.selected, *torch.ones(2))
    with pytest.raises(ValueError, match="entropy_out must be None with a choice"):
        case.from_hidden(entropy_out=entropy, choice=choice)
