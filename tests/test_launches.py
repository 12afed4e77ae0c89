"""What lies around the large kernels: how many operations a call dispatches, and the operators that keep it low."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adakd_kernels import (
    AdaKDLoss,
    LossAdaptiveFocus,
    adakd_loss,
    linear_adakd_loss,
    ops,
    reference,
    token_divergence,
)

from .cases import logits, name_of, tokens

pytestmark = [pytest.mark.fast, pytest.mark.native]

# Allocations and views: nothing runs on the device.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "select", "slice",
    "permute", "squeeze", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """The names of the operations that launch a kernel; each operator of ours launches one."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = tokens(65, 2, 5)
    labels[0, 1] = -100
    return logits(2, 5, 65, seed=1).requires_grad_(), logits(2, 5, 65, seed=2), labels


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(17)], ids=["own", "number", "tensor"])
def test_few_operations_launch_a_kernel(ce_weight, num_items, unpoisoned):
    given = batch()
    with Launches() as of_loss:
        adakd_loss(*given, focus_ratio=0.5, ce_weight=ce_weight, num_items=num_items).loss.backward()
    assert "token_divergence_with_gradient" in of_loss.names
    assert len(of_loss.names) <= 10 + (ce_weight > 0), of_loss.names
    given[0].grad = None
    loss_fn = AdaKDLoss(total_steps=10, ce_weight=ce_weight)
    with Launches() as of_step:
        loss_fn(*given, num_items).loss.backward()
        loss_fn.step()
    assert loss_fn.focus.steps == 1
    assert len(of_step.names) <= 15 + (ce_weight > 0), of_step.names


def launches_from_hidden(n, **options) -> int:
    """Of `linear_adakd_loss` and its backward, with n labelled tokens of n + 1, in chunks of 12 and parts of 6."""
    dtype, keep = options.pop("dtype", torch.float32), options.pop("keep", 0)
    heads = [logits(65, 8, dtype=dtype, seed=s) for s in (1, 2)]
    states = [logits(1, n + 1, 8, dtype=dtype, seed=s) for s in (3, 4)]
    biases = [logits(65, dtype=dtype, seed=s) for s in (5, 6)] if options.pop("bias", False) else [None, None]
    labels = tokens(65, 1, n + 1)
    labels[0, 1] = -100
    for leaf in (states[0], heads[0], biases[0]):
        if leaf is not None:
            leaf.requires_grad_()
    with Launches() as calls:
        linear_adakd_loss(
            states[0], heads[0], states[1], heads[1], labels, student_bias=biases[0], teacher_bias=biases[1],
            chunk_tokens=12, keep_bytes=keep * 2 * 65 * dtype.itemsize, **options,
        ).loss.backward()  # fmt: skip
    assert "token_divergence_with_gradient_" in calls.names
    return len(calls.names)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_few_operations_from_hidden_states(dtype, bias, ce_weight, unpoisoned):
    """A chunk whose teacher's logits are in one part takes six products; each further chunk, in two, up to nine."""
    options = {"dtype": dtype, "bias": bias, "ce_weight": ce_weight}
    for share in (0.5, 1.0, torch.tensor(0.5, dtype=torch.float64)):
        one, *more = (launches_from_hidden(n, focus_ratio=share, **options) for n in (6, 12, 24, 36, 48))
        assert one <= 36, one
        assert more[0] <= one + 7  # a product, statistics, and both again in phase 2; results in two parts
        assert all(b - a <= 20 for a, b in pairwise(more)), more


@pytest.mark.parametrize(
    "options, of_six, of_36",
    [
        ({"focus_ratio": 0.5, "keep": 100}, 57, 119),
        ({"focus_ratio": 0.5, "keep": 4}, 57, 195),
        ({"ce_weight": 0.3, "keep": 100}, 28, 60),
        ({"temperature_scale": 0.0}, 28, 65),
        ({"temperature_scale": 0.0, "ce_weight": 0.3}, 30, 73),
        ({"focus_ratio": 0.5, "student_softcap": 3.0, "ce_weight": 0.3}, 39, 103),
        ({"focus_ratio": 0.5, "difficulty": "cross_entropy"}, 31, 70),
        ({"focus_ratio": 0.5, "num_items": torch.tensor(9)}, 28, 56),
    ],
    ids=str,
)
def test_other_calls_from_hidden_states_take_no_more_than_counted(options, of_six, of_36, unpoisoned):
    found = [launches_from_hidden(n, **options) for n in (6, 36)]
    assert found[0] <= of_six and found[1] <= of_36, found


def chosen(difficulty, valid, share):
    """The indices of the hardest tokens by a plain sort, the hardest first."""
    of_valid = [i for i, is_valid in enumerate(valid) if is_valid]
    order = sorted(of_valid, key=lambda i: (not math.isnan(difficulty[i]), -difficulty[i], i))
    return order[: max(1, math.floor(share * len(of_valid)))]


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("size", [1, 7, 100, 300])
def test_the_choice_equals_a_plain_sort(dtype, size):
    gen = torch.Generator(device="cpu").manual_seed(size)
    special = torch.tensor([0.0, -0.0, math.inf, math.nan, 0.25, 0.25, 1e-40, 5e-324, -1e-9], dtype=dtype, device="cpu")
    for case, share in enumerate((1.0, 0.5, 0.29, 0.01, 0.9)):
        difficulty = torch.rand(size, generator=gen, dtype=dtype, device="cpu")
        places = torch.randint(size, (size // 3,), generator=gen, device="cpu")
        kinds = len(special) if case % 2 else 2  # without NaN, which every temperature would be, in every other case
        difficulty[places] = special[torch.randint(kinds, places.shape, generator=gen, device="cpu")]
        valid = torch.rand(size, generator=gen, device="cpu") < (0.0 if case == 4 else 0.8)
        ratio = share if case % 2 else torch.tensor(share, dtype=torch.float64)
        scale = -0.7 if case == 1 else 0.7
        selected, tau, n, k = ops.choose_tokens(
            difficulty.to(torch.ones(()).device).view(1, size), valid.to(torch.ones(()).device).view(1, size), ratio,
            None, scale, 1.5,
        )  # fmt: skip
        hardest = chosen(difficulty.tolist(), valid.tolist(), share)
        if not valid.any():
            hardest = []
        assert sorted(hardest) == selected.flatten().nonzero().flatten().tolist()
        assert n == max(1, int(valid.sum())) and k == max(1, math.floor(share * int(valid.sum())))
        at_least_0 = difficulty.clamp_min(0.0).tolist()
        median = at_least_0[hardest[len(hardest) // 2]] if hardest else 0.0
        for s, is_valid, found in zip(at_least_0, valid.tolist(), tau.flatten().tolist(), strict=True):
            if not is_valid:
                relative = 0.0
            elif math.isnan(median):
                relative = math.nan
            elif math.isinf(median) or math.isinf(s):
                relative = float(s > median) - float(s < median)
            else:
                relative = 0.0 if s == median == 0.0 else (s - median) / (s + median)
            expected = 1.5 * math.exp(-scale * relative)
            assert found == pytest.approx(expected, rel=2e-6, nan_ok=True), (s, median)


@pytest.mark.interpret
def test_the_divisors_of_a_step(unpoisoned):
    difficulty, valid = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for given in (8, 8.0, torch.tensor(8), torch.tensor(8.0), torch.tensor(8, dtype=torch.int32)):
        *_, n, k = ops.choose_tokens(difficulty, valid, 0.29, given, 0.5, 1.0)
        assert n == 8 and k.item() == pytest.approx(0.29 * 8, rel=1e-7)
    *_, n, k = ops.choose_tokens(difficulty, valid, torch.tensor(0.5), torch.tensor(0), 0.5, 1.0)
    assert n == 1 and k == 0.5
    count = ops.choose_tokens(torch.rand(1, 100), torch.ones(1, 100, dtype=torch.bool), 0.29, None, 0.5, 1.0)[3]
    assert count == 28  # 0.29·100 is below 29 in fp64


@pytest.mark.interpret
@pytest.mark.parametrize("losses", [(2.0, 2.0, 1.0, 0.5, 4.0, 4.0, 9.0), (1.0, math.nan, 3.0, math.inf, 0.1)])
def test_a_step_of_the_share_equals_the_reference(losses):
    focus = LossAdaptiveFocus(20, beta=0.3, delta=0.2, min_ratio=0.7)
    state = reference.FocusState()
    for loss in losses:
        focus.step(torch.tensor(loss))
        if math.isfinite(loss):
            state = reference.focus_step(state, loss, focus.warmup_steps, 0.3, 0.05, 0.2, 0.7)
        found = (focus.focus_ratio, focus.loss_ema, focus.loss_reference, focus.steps)
        assert [x.item() for x in found] == pytest.approx([*state], rel=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_upstream_gradients_of_loss_and_of_tokens_add_up(ce_weight):
    """Each alone, and both at once; a gradient of NaN reaches no row that has no part in the loss."""
    weights = torch.linspace(-1.0, 2.0, 10).view(2, 5)
    grads = []
    for of_loss, of_tokens in ((3.0, 0.0), (0.0, 1.0), (3.0, 1.0)):
        student, teacher, labels = batch()
        out = adakd_loss(student, teacher, labels, focus_ratio=0.5, ce_weight=ce_weight)
        parts = [of_loss * out.loss] * (of_loss > 0) + [(weights * out.token_loss).sum()] * (of_tokens > 0)
        sum(parts).backward()
        grads.append(student.grad)
    assert (grads[0] + grads[1] - grads[2]).norm() <= 1e-6 * grads[2].norm()
    student, teacher, _ = batch()
    per_token = token_divergence(student, teacher, out.temperature, mask=out.selected)
    (weights * out.temperature.square() * per_token).sum().backward()
    assert student.grad.any() and torch.allclose(grads[1], student.grad, rtol=1e-5, atol=1e-7)
    student, teacher, labels = batch()
    (adakd_loss(student, teacher, labels, focus_ratio=0.5).loss * math.nan).backward()
    assert not student.grad[0, 1].any() and student.grad.isnan().any()


@pytest.mark.interpret
def test_opcheck_of_the_operators(unpoisoned):
    student, teacher, labels = batch()
    student, mask = student.detach(), labels != -100
    difficulty, normalizers_1 = ops.token_stats(student, teacher, mask)
    check, ops_of = torch.library.opcheck, torch.ops.adakd
    check(ops_of.choose_tokens.default, (difficulty, mask, None, 0.5, None, None, 0.5, 1.0))
    share, items = torch.tensor(0.5, dtype=torch.float64), torch.tensor(7)
    check(ops_of.choose_tokens.default, (difficulty, mask, share, 1.0, items, None, 0.5, 1.0))
    check(ops_of.token_cross_entropy.default, (student, teacher, labels, mask, normalizers_1))
    ce = ops.token_cross_entropy(student, teacher, labels, mask, normalizers_1)
    _, tau, n, k = ops.choose_tokens(difficulty, mask, share, None, 0.5, 1.0)
    places, flat = torch.arange(10) * 2, difficulty.view(1, -1)
    bundle = (flat, normalizers_1.view(4, 1, -1), places, 30)
    check(ops_of.spread_statistics.default, (*bundle, None, None, 65))
    check(ops_of.spread_statistics.default, (*bundle, flat, labels.clamp_min(0).view(1, -1), 65))
    check(ops_of.loss_sums.default, (flat, tau.view(1, -1), k, None, None, 0.0, places, 30))
    for of_ce in ((None, None, 0.0), (ce, n, 0.3)):
        check(ops_of.loss_sums.default, (difficulty, tau, k, *of_ce))
        between = (of_ce[0], None if of_ce[0] is None else mask, *of_ce[1:])
        check(ops_of.loss_weights.default, (None, torch.ones(()), tau, mask, k, *between))
        check(ops_of.loss_weights.default, (difficulty, None, tau, mask, k, *between))
    state = [torch.rand((), dtype=torch.float64) for _ in range(3)]
    check(ops_of.focus_step_.default, (torch.ones(()), *state, torch.tensor(4), 2, 0.9, 0.05, 0.05, 0.1))


def test_a_share_that_changes_compiles_once(unpoisoned):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def loss(student, teacher, labels, share, items):
        return adakd_loss(student, teacher, labels, focus_ratio=share, num_items=items).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for share, items in ((0.5, 11.0), (0.3, 12.0), (0.9, 13.0)):
        assert torch.allclose(compiled(*batch(), share, items), loss(*batch(), share, items), rtol=1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("size, batch", [(0, 0), (0, 3), (1, 1), (7, 9), (300, 300), (1100, 2100)])
def test_spread_statistics(size, batch, dtype):
    """Against indices: most difficulties are far from the places that they go to, and some rows are empty."""
    gen, device = torch.Generator(device="cpu").manual_seed(size), torch.ones(()).device
    positions = torch.randperm(batch, generator=gen, device="cpu")[:size].sort().values
    difficulty, logit = torch.rand(2, 1, size, generator=gen, dtype=dtype, device="cpu")
    sums = 1.0 + torch.rand(4, 1, size, generator=gen, dtype=dtype, device="cpu")
    labels = torch.randint(20, (1, size), generator=gen, device="cpu")
    empty = torch.arange(size, device="cpu") % 5
    sums[1, :, empty == 1], sums[3, :, empty == 2], sums[1, :, empty == 3] = 0.0, 0.0, math.nan
    labels[:, ::7], labels[:, 4::7] = 20, -100
    valid = (empty != 1) & (empty != 2)
    ce = (sums[0] - logit.half().to(dtype) + sums[1].log()).where((labels >= 0) & (labels < 20), math.nan)
    given = [x.to(device) for x in (difficulty, sums, positions)]
    for of_labels in (logit.half().to(device), labels.to(device)), (None, None):
        found, everywhere, here, cross_entropy = ops.spread_statistics(*given, batch, *of_labels, 20)
        expected, expected_valid = torch.zeros(1, batch, dtype=dtype, device="cpu"), torch.zeros(1, batch, device="cpu")
        expected[0, positions], expected_valid[0, positions] = difficulty[0], valid.float()
        assert torch.equal(found.cpu(), expected) and torch.equal(everywhere.cpu().float(), expected_valid)
        assert torch.equal(here.cpu()[0], valid)
    assert cross_entropy.shape == (1, 0)
    *_, found = ops.spread_statistics(*given, batch, logit.half().to(device), labels.to(device), 20)
    torch.testing.assert_close(found.cpu(), ce.where(valid, 0.0), rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.interpret
@pytest.mark.parametrize("size, batch", [(0, 3), (5, 5), (1100, 2500)])
def test_sums_of_some_tokens_of_a_batch(size, batch):
    """τ²·D goes to the places of the tokens, in any order; the sums are those of the tokens alone."""
    positions = torch.randperm(batch)[:size]
    d, tau, ce = torch.rand(3, 1, size)
    for of_ce in ((None, None, 0.0), (ce, torch.tensor(7.0), 0.3)):
        alone = ops.loss_sums(d, tau, torch.tensor(3.0), *of_ce)
        found = ops.loss_sums(d, tau, torch.tensor(3.0), *of_ce, positions, batch)
        expected = torch.zeros(1, batch)
        expected[:, positions] = alone[0]
        assert torch.equal(found[0], expected) and found[1:] == alone[1:]
