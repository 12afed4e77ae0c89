"""Selection, temperature and the adaptive focus on tensors, against the plain formulation of the reference."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adakd_kernels import (
    AdaKDLoss,
    LossAdaptiveFocus,
    ScheduledFocus,
    inverse_difficulty_temperature,
    reference,
    select_tokens,
)

pytestmark = pytest.mark.fast

difficulties = st.lists(
    st.sampled_from([0.0, 1e-8, 0.1, 0.25, 0.25000003, 0.5, 0.999999, 1.0]), min_size=1, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(values=difficulties, ratio=st.floats(0.01, 1.0), data=st.data())
def test_selection_is_the_k_hardest_with_ties_to_the_lower_index(values, ratio, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    valid = [i for i, keep in enumerate(mask) if keep]
    k = max(1, math.floor(ratio * len(valid)))
    expected = set(sorted(valid, key=lambda i: (-torch.tensor(values[i]).item(), i))[:k])
    for share in (ratio, torch.tensor(ratio, dtype=torch.float64)):
        chosen = select_tokens(torch.tensor(values), share, torch.tensor(mask))
        assert {i for i, keep in enumerate(chosen.tolist()) if keep} == expected


@settings(max_examples=200, deadline=None)
@given(values=difficulties, scale=st.floats(0.0, 3.0), base=st.floats(0.1, 5.0), data=st.data())
def test_temperature_follows_the_lower_median(values, scale, base, data):
    chosen = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    difficulty = torch.tensor(values, dtype=torch.float64)
    tau = inverse_difficulty_temperature(difficulty, torch.tensor(chosen), scale, base)
    picked = sorted(v for v, keep in zip(values, chosen, strict=True) if keep)
    median = picked[(len(picked) - 1) // 2] if picked else 0.0
    for value, t in zip(values, tau.tolist(), strict=True):
        relative = (value - median) / (value + median) if value + median else 0.0
        assert math.isclose(t, base * math.exp(-scale * relative), rel_tol=1e-9)
        if value > 0 and median > 0:  # the form of the paper, for s = √difficulty
            assert math.isclose(relative, math.tanh(math.log(math.sqrt(value) / math.sqrt(median))), abs_tol=1e-9)


@pytest.mark.parametrize(
    "ratio, n", [(0.29, 100), (0.57, 100), (0.1, 30), (0.7, 10), (1.0, 17), (0.001, 5), (0.95, 20)]
)
def test_k_is_computed_in_fp64(ratio, n):
    """In fp32, 0.29 · 100 rounds to 29; in fp64 it is 28.999999999999996, and ⌊r·n⌋ = 28."""
    difficulty = torch.rand(n, generator=torch.Generator().manual_seed(0))
    expected = max(1, math.floor(ratio * n))
    assert select_tokens(difficulty, ratio).sum() == expected
    assert select_tokens(difficulty, torch.tensor(ratio, dtype=torch.float64)).sum() == expected


def test_selection_keeps_the_shape_and_sees_nan():
    difficulty = torch.tensor([[0.5, math.nan, 0.1], [0.9, 0.2, math.nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    chosen = select_tokens(difficulty, 0.4, mask)
    assert chosen.tolist() == [[False, True, False], [True, False, False]]


def test_focus_equals_the_plain_formulation():
    generator = torch.Generator().manual_seed(3)
    focus = LossAdaptiveFocus(total_steps=400, beta=0.9, epsilon=0.02, delta=0.1, min_ratio=0.3)
    state, ratios = reference.FocusState(), set()
    for step in range(400):
        level = 3.0 * math.exp(-step / 60) if step < 250 else 0.05 + 0.02 * (step - 250)
        loss = level + 0.1 * torch.rand((), generator=generator, dtype=torch.float64).item()
        focus.step(torch.tensor(loss, dtype=torch.float64))
        state = reference.focus_step(state, loss, focus.warmup_steps, 0.9, 0.02, 0.1, 0.3)
        got = (focus.focus_ratio.item(), focus.loss_ema.item(), focus.loss_reference.item(), focus.steps.item())
        assert got == pytest.approx(tuple(state), rel=1e-12)
        ratios.add(round(state.ratio, 6))
    assert min(ratios) == 0.3 and state.ratio == 1.0 and len(ratios) > 10  # it went down to the bound and up again


@pytest.mark.parametrize(
    "warmup_ratio, total, expected", [(0.05, 1000, 50), (0.05, 10, 1), (0.0, 10, 1), (0.051, 100, 6)]
)
def test_warmup_lasts_at_least_one_step(warmup_ratio, total, expected):
    focus = LossAdaptiveFocus(total, warmup_ratio=warmup_ratio, beta=0.0)
    assert focus.warmup_steps == expected
    for _ in range(expected):
        assert focus.focus_ratio == 1.0 and focus.loss_reference == 0.0
        focus.step(torch.tensor(2.0))
    assert focus.loss_reference == 2.0


def test_focus_saves_loads_and_goes_on_with_the_same_numbers():
    losses = [torch.tensor(3.0 / (1 + 0.3 * step)) for step in range(40)]
    whole, first = LossAdaptiveFocus(40, beta=0.8), LossAdaptiveFocus(40, beta=0.8)
    for loss in losses[:17]:
        whole.step(loss)
        first.step(loss)
    second = LossAdaptiveFocus(40, beta=0.8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for loss in losses[17:]:
        whole.step(loss)
        second.step(loss)
    assert whole.focus_ratio < 1.0
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_focus_moves_to_a_device_without_fp64():
    def to_mps(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor.clone()

    loss_fn = AdaKDLoss(total_steps=10)
    loss_fn.focus.step(torch.tensor(2.5))
    loss_fn._apply(to_mps)
    assert {buffer.dtype for buffer in loss_fn.buffers()} == {torch.float32, torch.int64}
    loss_fn.focus.step(torch.tensor(2.5))
    assert loss_fn.focus.steps == 2 and loss_fn.focus.loss_ema == 2.5


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.float(),
        lambda module: module.to(torch.float16),
        lambda module: module.type(torch.bfloat16),
        lambda module: copy.deepcopy(module).to("cpu", torch.bfloat16),
    ],
)
def test_a_cast_model_keeps_its_focus_exact(cast):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3)
            self.loss_fn = AdaKDLoss(focus=LossAdaptiveFocus(300, beta=0.9, epsilon=0.01, delta=0.01))

    plain, model = Model(), cast(Model())
    assert model.head.weight.dtype != torch.float32 or model.head.weight.device.type == "cpu"
    for step in range(300):
        if step == 150:  # and goes on from a checkpoint
            other = cast(Model())
            other.load_state_dict(model.state_dict())
            model = cast(other)
        loss = torch.tensor(3.0 * math.exp(-step / 200.0), dtype=torch.float64)
        for loss_fn in (plain.loss_fn, model.loss_fn):
            loss_fn.focus.step(loss)
    assert plain.loss_fn.focus_ratio < 0.9
    for (name, a), (other_name, b) in zip(plain.loss_fn.named_buffers(), model.loss_fn.named_buffers(), strict=True):
        assert name == other_name and a.dtype == b.dtype and torch.equal(a, b)


def test_a_cast_leaves_the_users_own_modules_to_the_user():
    loss_fn = AdaKDLoss(total_steps=3)
    loss_fn.projection = nn.Linear(2, 3)
    loss_fn.to(torch.bfloat16)
    assert loss_fn.projection.weight.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in loss_fn.buffers()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinite_difficulties_have_the_finite_limit(dtype):
    low, high = math.exp(-0.5), math.exp(0.5)
    inf, largest = math.inf, torch.finfo(dtype).max
    for values, expected in (
        ([inf, 1.0, 1.0, 0.0], [low, 1.0, 1.0, high]),
        ([inf, inf, inf, 2.0], [1.0, 1.0, 1.0, high]),
        ([inf], [1.0]),
        ([largest, 1.0, 1.0], [low, 1.0, 1.0]),
        ([largest, largest, 0.0], [1.0, 1.0, high]),
        ([-1e-7, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, low]),  # a KL of equal rows may round to below 0
    ):
        tau = inverse_difficulty_temperature(torch.tensor(values, dtype=dtype))
        assert torch.equal(tau, torch.tensor(expected, dtype=torch.float64).to(dtype)) or torch.allclose(
            tau.double(), torch.tensor(expected, dtype=torch.float64), rtol=torch.finfo(dtype).eps
        )
    tau = inverse_difficulty_temperature(torch.tensor([math.nan, 1.0, 1.0, 1.0], dtype=dtype))
    assert tau.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_temperatures_stay_in_the_types_range(dtype, as_tensor):
    difficulty = torch.tensor([0.0, 0.1, 0.1, 0.9, math.inf], dtype=dtype)
    range_ = torch.finfo(dtype)
    for scale, base in ((1e4, 1.0), (1e300, 1.0), (0.5, 1e300), (0.5, 1e-300), (1e300, 1e300), (1e300, 1e-300)):
        options = {"temperature_scale": scale, "base_temperature": base}
        if as_tensor:
            options = {name: torch.tensor(value, dtype=torch.float64) for name, value in options.items()}
        tau = inverse_difficulty_temperature(difficulty, **options)
        assert tau.dtype == dtype and ((tau >= range_.tiny) & (tau <= range_.max)).all(), (scale, base, tau)
    options = {"temperature_scale": math.inf, "base_temperature": math.inf}
    options = {name: torch.tensor(value, dtype=torch.float64) for name, value in options.items()}
    assert inverse_difficulty_temperature(difficulty, **options).isfinite().all()


def test_a_negative_scale_turns_the_direction_round():
    difficulty = torch.tensor([0.0, 0.1, 0.2, 0.9, math.inf], dtype=torch.float64)
    tau, turned = (inverse_difficulty_temperature(difficulty, None, scale, 1.5) for scale in (0.5, -0.5))
    assert torch.allclose(tau * turned, torch.full_like(tau, 1.5**2)) and bool((turned.diff() >= 0).all())
    assert turned[0] < 1.5 < turned[-1]


def test_a_scheduled_share_falls_in_a_straight_line_whatever_the_loss_does():
    for loss in ([3.0] * 12, [3.0, 1.0, 9.0] * 4):
        focus = ScheduledFocus(12, warmup_ratio=0.25, min_ratio=0.2)
        shares = []
        for value in loss:
            shares.append(focus.focus_ratio.item())  # of the step that has this loss
            focus.step(torch.tensor(value))
        assert shares == pytest.approx([1.0] * 4 + [1.0 - 0.1 * step for step in range(1, 9)])
        assert focus.focus_ratio.item() == pytest.approx(0.2)
    halfway = ScheduledFocus(12, warmup_ratio=0.25, min_ratio=0.2)
    halfway.load_state_dict(focus.state_dict() | {"steps": torch.tensor(6)})
    halfway.step(torch.tensor(1.0))
    assert halfway.focus_ratio.item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="min_ratio must lie"):
        ScheduledFocus(5, min_ratio=2.0)


def test_a_loss_that_is_not_finite_changes_nothing():
    focus = LossAdaptiveFocus(10)
    for loss in (math.nan, 2.0, math.inf, 1.0):
        focus.step(torch.tensor(loss))
    assert focus.steps == 2 and math.isclose(focus.loss_ema.item(), 0.99 * 2.0 + 0.01 * 1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"total_steps": 0}, "total_steps must be the number of optimizer steps"),
        ({"total_steps": 5, "beta": 1.0}, r"beta must lie in \[0, 1\), got 1.0"),
        ({"total_steps": 5, "epsilon": 0.0}, r"epsilon must lie in \(0, 1\), got 0.0"),
        ({"total_steps": 5, "delta": 1.5}, r"delta must lie in \(0, 1\), got 1.5"),
        ({"total_steps": 5, "min_ratio": 0.0}, r"min_ratio must lie in \(0, 1\], got 0.0"),
        ({"total_steps": 5, "warmup_ratio": -0.1}, r"warmup_ratio must lie in \[0, 1\], got -0.1"),
    ],
)
def test_focus_refuses_what_lies_outside_its_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossAdaptiveFocus(**arguments)
