"""Bad input to the public functions: which argument, what was expected, what came, how to mend it."""

from __future__ import annotations

import pytest
import torch

from adakd_kernels import (
    AdaKDLoss,
    AlphaBeta,
    JensenShannon,
    LinearAdaKDLoss,
    LossAdaptiveFocus,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    adakd_loss,
    inverse_difficulty_temperature,
    linear_adakd_loss,
    linear_token_divergence,
    select_tokens,
    token_difficulty,
    token_divergence,
)
from adakd_kernels.divergences import Divergence

pytestmark = pytest.mark.fast

NAN, INF = float("nan"), float("inf")


class Unregistered(ReverseKL):
    """A divergence of a user's own, for which there is no kernel."""


S, T, L = torch.zeros(2, 3, 11), torch.zeros(2, 3, 11), torch.zeros(2, 3, dtype=torch.long)

LOSS_ERRORS = {
    "student is a list": ((S.tolist(), T, L), {}, TypeError, "student_logits must be a tensor, got list"),
    "student is integers": (
        (S.long(), T, L),
        {},
        TypeError,
        "student_logits must be fp16, bf16, fp32 or fp64, got torch.int64",
    ),
    "student is 1-D": (
        (S[0, 0], T, L),
        {},
        ValueError,
        r"student_logits must be \(B, L, V\) or \(N, V\), got shape \(11,\)",
    ),
    "no vocabulary": ((S[..., :0], T, L), {}, ValueError, "student_logits must have at least one vocabulary entry"),
    "last dimension not contiguous": (
        (S.transpose(1, 2).contiguous().transpose(1, 2), T, L),
        {},
        ValueError,
        r"student_logits must be contiguous in its last dimension, got strides .*student_logits.contiguous\(\)",
    ),
    "teacher requires grad": (
        (S, T.clone().requires_grad_(), L),
        {},
        ValueError,
        "teacher_logits requires grad.*torch.no_grad",
    ),
    "teacher of another length": (
        (S, T[:, :2], L),
        {},
        ValueError,
        r"teacher_logits must have the student's shape \(2, 3\).*got \(2, 2\)",
    ),
    "teacher elsewhere": (
        (S, T.to("meta"), L),
        {},
        ValueError,
        "teacher_logits must be on the student's device cpu, got meta",
    ),
    "labels of another shape": ((S, T, L[0]), {}, ValueError, r"labels must have the shape \(2, 3\).*got \(3,\)"),
    "labels are floats": ((S, T, L.float()), {}, TypeError, "labels must be integers, got torch.float32"),
    "labels are a list": ((S, T, L.tolist()), {}, TypeError, "labels must be a tensor, got list"),
    "unknown divergence": (
        (S, T, L),
        {"divergence": "kl"},
        ValueError,
        "divergence must be one of forward_kl, .*got 'kl'",
    ),
    "divergence class": ((S, T, L), {"divergence": 3}, TypeError, "divergence must be a name or an instance.*got int"),
    "unknown difficulty": ((S, T, L), {"difficulty": "entropy"}, ValueError, "difficulty must be one of hellinger, "),
    "share of 0": ((S, T, L), {"focus_ratio": 0.0}, ValueError, r"focus_ratio must be in \(0, 1\], got 0.0"),
    "share above 1": ((S, T, L), {"focus_ratio": 1.5}, ValueError, r"focus_ratio must be in \(0, 1\], got 1.5"),
    "share is a string": ((S, T, L), {"focus_ratio": "all"}, TypeError, "focus_ratio must be a number, got str"),
    "share per token": ((S, T, L), {"focus_ratio": torch.ones(3)}, ValueError, r"focus_ratio .*0-d tensor.*\(3,\)"),
    "infinite scale": (
        (S, T, L),
        {"temperature_scale": -INF},
        ValueError,
        "temperature_scale must be a finite number, got -inf",
    ),
    "temperature 0": ((S, T, L), {"base_temperature": 0.0}, ValueError, "base_temperature must be > 0, got 0.0"),
    "cross-entropy above 1": ((S, T, L), {"ce_weight": 1.1}, ValueError, r"ce_weight must be in \[0, 1\], got 1.1"),
    "the base of all divergences": (
        (S, T, L),
        {"divergence": Divergence()},
        TypeError,
        r"divergence must be an instance of a class in DIVERGENCES .*got Divergence\(\)",
    ),
    "a divergence that is not registered": (
        (S, T, L),
        {"divergence": Unregistered()},
        TypeError,
        r"divergence must be an instance of a class in DIVERGENCES .*got Unregistered\(\)",
    ),
    "share of NaN": ((S, T, L), {"focus_ratio": NAN}, ValueError, r"focus_ratio must be in \(0, 1\], got nan"),
    "share is a bool tensor": (
        (S, T, L),
        {"focus_ratio": torch.tensor(True)},
        TypeError,
        "focus_ratio must be .* of a real type, got torch.bool",
    ),
    "share requires grad": (
        (S, T, L),
        {"focus_ratio": torch.tensor(0.5, requires_grad=True)},
        ValueError,
        r"focus_ratio requires grad.*focus_ratio.detach\(\)",
    ),
    "weight of the cross-entropy is a tensor": (
        (S, T, L),
        {"ce_weight": torch.tensor(0.5)},
        TypeError,
        "ce_weight must be a number, got a tensor",
    ),
    "ignore_index is a float": (
        (S, T, L),
        {"ignore_index": -100.0},
        TypeError,
        "ignore_index must be an integer, got float",
    ),
    "ignore_index is a bool": (
        (S, T, L),
        {"ignore_index": True},
        TypeError,
        "ignore_index must be an integer, got bool",
    ),
    "ignore_index is a string": ((S, T, L), {"ignore_index": "-100"}, TypeError, "ignore_index must be an integer"),
    "ignore_index that the labels cannot hold": (
        (S, T, L.to(torch.uint8)),
        {},
        ValueError,
        r"ignore_index must be a number that labels of torch.uint8 can hold, 0 to 255, got -100.*labels.long\(\)",
    ),
    "complex labels": ((S, T, L.to(torch.complex64)), {}, TypeError, "labels must be integers, got torch.complex64"),
    "mask with cross-entropy": (
        (S, T, L.bool()),
        {"ce_weight": 0.1},
        TypeError,
        "labels must be integers where the loss reads them",
    ),
    "mask with the difficulty": (
        (S, T, L.bool()),
        {"difficulty": "cross_entropy"},
        TypeError,
        "got a bool mask: pass the token",
    ),
    "mask of another shape": ((S, T, L[:1].bool()), {}, ValueError, "labels must have the shape"),
    "shift is a number": ((S, T, L), {"shift": 1}, TypeError, "shift must be True or False, got int"),
    "inplace is a string": ((S, T, L), {"inplace": "no"}, TypeError, "inplace must be True or False, got str"),
    "num_items of NaN": ((S, T, L), {"num_items": NAN}, ValueError, "num_items must be the number of valid .*got nan"),
    "infinite num_items": (
        (S, T, L),
        {"num_items": INF},
        ValueError,
        "num_items must be the number of valid .*got inf",
    ),
    "num_items is a bool": ((S, T, L), {"num_items": True}, TypeError, "num_items must be a number, got bool"),
    "num_items is a string": ((S, T, L), {"num_items": "8"}, TypeError, "num_items must be a number, got str"),
    "num_items of one entry": (
        (S, T, L),
        {"num_items": torch.tensor([8])},
        ValueError,
        r"num_items must be a number or a 0-d tensor, got a tensor of shape \(1,\)",
    ),
    "num_items of two entries": (
        (S, T, L),
        {"num_items": torch.tensor([8, 9])},
        ValueError,
        r"num_items .*shape \(2,\)",
    ),
    "num_items is a bool tensor": (
        (S, T, L),
        {"num_items": torch.tensor(True)},
        TypeError,
        "num_items .*got torch.bool",
    ),
    "complex num_items": ((S, T, L), {"num_items": torch.tensor(8j)}, TypeError, "num_items .*got torch.complex64"),
    "negative num_items": ((S, T, L), {"num_items": -1}, ValueError, "num_items must be the number of valid tokens"),
}


@pytest.mark.parametrize("case", LOSS_ERRORS)
def test_loss(case):
    args, options, error, message = LOSS_ERRORS[case]
    with pytest.raises(error, match=message):
        adakd_loss(*args, **options)


def test_other_functions():
    with pytest.raises(ValueError, match=r"temperature requires grad.*temperature.detach\(\)"):
        token_divergence(S, T, torch.ones(2, 3, requires_grad=True))
    with pytest.raises(ValueError, match=r"temperature must have the shape \(2, 3\)"):
        token_divergence(S, T, torch.ones(3))
    with pytest.raises(ValueError, match="temperature must be > 0, got -2"):
        token_divergence(S, T, -2.0)
    with pytest.raises(TypeError, match=r"mask must be bool.*mask.bool\(\)"):
        token_divergence(S, T, mask=L)
    with pytest.raises(ValueError, match=r"mask must have the shape \(2, 3\)"):
        token_difficulty(S, T, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="labels must be given for difficulty="):
        token_difficulty(S, T, difficulty="cross_entropy")
    for function in (token_divergence, token_difficulty):
        with pytest.raises(ValueError, match=r"mask must have the shape \(2, 3\)"):
            function(S, T, mask=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="divergence must be an instance of a class in DIVERGENCES"):
        token_divergence(S, T, divergence=Divergence())
    with pytest.raises(TypeError, match="inplace must be True or False, got NoneType"):
        token_divergence(S, T, inplace=None)
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.float32"):
        token_difficulty(S, T, difficulty="cross_entropy", labels=L.float())


LEAF = torch.zeros(2, 3, 11, requires_grad=True)
NO_PLACE = {
    "a leaf": (LEAF, "must not be a leaf that requires grad"),
    "a view of a leaf": (LEAF[:, 1:], "must not be a leaf that requires grad, or a view of one"),
    "one row for all": ((LEAF[:1, :1] * 1.0).expand(2, 3, 11), r"rows of their own memory.*strides \(0, 0, 1\)"),
    "one sequence for all": ((LEAF[:1] * 1.0).expand(2, 3, 11), r"rows of their own memory.*strides \(0, 11, 1\)"),
    "rows that overlap": (
        (LEAF * 1.0).as_strided((2, 3, 11), (33, 7, 1)),
        r"rows of their own memory.*strides \(33, 7, 1\).*student_logits.contiguous\(\)",
    ),
    "sequences that overlap": ((LEAF * 1.0).as_strided((2, 3, 11), (22, 11, 1)), "rows of their own memory"),
}


@pytest.mark.parametrize("case", NO_PLACE)
def test_logits_that_their_gradient_cannot_replace(case):
    student, message = NO_PLACE[case]
    teacher, labels = T[:, : student.shape[1]], L[:, : student.shape[1]]
    calls = [
        lambda: adakd_loss(student, teacher, labels, inplace=True).loss,
        lambda: token_divergence(student, teacher, inplace=True),
        lambda: AdaKDLoss(focus=1.0, inplace=True)(student, teacher, labels).loss,
        lambda: LinearAdaKDLoss(focus=1.0, inplace=True).from_logits(student, teacher, labels).loss,
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
        with torch.no_grad():
            call()  # nothing is overwritten
    assert adakd_loss(student, teacher, labels).loss.requires_grad


MODULE_ERRORS = {
    "nothing": ({}, ValueError, "give total_steps .* or focus"),
    "both": ({"total_steps": 3, "focus": 0.5}, ValueError, "give total_steps .* or focus"),
    "no share": ({"focus": 0.0}, ValueError, r"focus must be a LossAdaptiveFocus or a number in \(0, 1\], got 0.0"),
    "share above 1": ({"focus": 1.1}, ValueError, r"focus must be .* in \(0, 1\], got 1.1"),
    "share of NaN": ({"focus": NAN}, ValueError, r"focus must be .* in \(0, 1\], got nan"),
    "share is a bool": ({"focus": True}, TypeError, "focus must be a LossAdaptiveFocus or a number .*got bool"),
    "share is a string": ({"focus": "0.5"}, TypeError, "focus must be a LossAdaptiveFocus or a number .*got str"),
    "share is a tensor": ({"focus": torch.tensor(0.5)}, TypeError, "focus must be .*got Tensor"),
    "half a step": ({"total_steps": 0.5}, TypeError, "total_steps must be an integer, got float"),
    "steps are a bool": ({"total_steps": True}, TypeError, "total_steps must be an integer, got bool"),
    "no steps": ({"total_steps": 0}, ValueError, "total_steps must be the number of optimizer steps"),
    "divergence": ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl"),
    "base of divergences": ({"divergence": Divergence()}, TypeError, "divergence must be an instance of a class in"),
    "scale": ({"temperature_scale": NAN}, ValueError, "temperature_scale must be a finite number, got nan"),
    "base temperature": ({"base_temperature": 0}, ValueError, "base_temperature must be > 0, got 0"),
    "base is a string": ({"base_temperature": "1"}, TypeError, "base_temperature must be a number, got str"),
    "difficulty": ({"difficulty": "entropy"}, ValueError, "difficulty must be one of hellinger"),
    "cross-entropy": ({"ce_weight": -0.1}, ValueError, r"ce_weight must be in \[0, 1\], got -0.1"),
    "ignore_index": ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
    "shift": ({"shift": 0}, TypeError, "shift must be True or False, got int"),
    "inplace": ({"inplace": "yes"}, TypeError, "inplace must be True or False, got str"),
}
HEAD_MODULE_ERRORS = {
    "soft-cap": ({"student_softcap": 0.0}, ValueError, "student_softcap must be None or > 0, got 0.0"),
    "teacher's soft-cap": ({"teacher_softcap": "30"}, TypeError, "teacher_softcap must be a number, got str"),
    "scale": ({"student_scale": NAN}, ValueError, "student_scale must be a finite number > 0, got nan"),
    "teacher's scale": ({"teacher_scale": None}, TypeError, "teacher_scale must be a number, got NoneType"),
    "chunk": ({"chunk_tokens": 2.0}, TypeError, "chunk_tokens must be an integer, got float"),
    "budget": ({"keep_bytes": -1}, ValueError, "keep_bytes must be at least 0, got -1"),
}


@pytest.mark.parametrize("case", MODULE_ERRORS)
@pytest.mark.parametrize("cls", [AdaKDLoss, LinearAdaKDLoss])
def test_options_are_checked_when_the_module_is_made(cls, case):
    options, error, message = MODULE_ERRORS[case]
    focus = {} if {"focus", "total_steps"} & set(options) or case == "nothing" else {"focus": 1.0}
    with pytest.raises(error, match=message):
        cls(**focus, **options)


@pytest.mark.parametrize("case", HEAD_MODULE_ERRORS)
@pytest.mark.parametrize("cls", [AdaKDLoss, LinearAdaKDLoss])
def test_options_of_heads_are_checked_when_the_module_is_made(cls, case):
    options, error, message = HEAD_MODULE_ERRORS[case]
    with pytest.raises(error, match=message):
        cls(focus=1.0, **options)


def test_num_items_comes_with_all_calls_of_a_step_or_with_none():
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(11, 4)
    loss_fn, linear = AdaKDLoss(total_steps=10), LinearAdaKDLoss(total_steps=10)
    calls = (
        (loss_fn, lambda items: loss_fn(S, T, L, num_items=items)),
        (loss_fn, lambda items: loss_fn.from_hidden(hidden, weight, hidden, weight, L, num_items=items)),
        (linear, lambda items: linear(hidden, weight, hidden, weight, L, items)),
        (linear, lambda items: linear.from_logits(S, T, L, items)),
    )
    for module, call in calls:
        for first, second, came in ((6, None, "with it, this one without"), (None, 6, "without it, this one with")):
            call(first)
            call(first)
            with pytest.raises(ValueError, match=f"num_items must be given to all calls .*{came}"):
                call(second)
            with torch.no_grad():
                call(second)  # an evaluation is no part of the step
            module.step()
            call(second)
            module.step()
        assert module.focus.steps % 4 == 0


def test_selection_and_temperature():
    difficulty, mask = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for function in (select_tokens, inverse_difficulty_temperature):
        with pytest.raises(TypeError, match=r"difficulty must be fp16, bf16, fp32 or fp64, got torch.int64"):
            function(torch.arange(6))
        with pytest.raises(TypeError, match="difficulty must be a tensor, got list"):
            function([0.5])
    for share, error, message in (
        (0.0, ValueError, r"focus_ratio must be in \(0, 1\], got 0.0"),
        (1.5, ValueError, r"focus_ratio must be in \(0, 1\], got 1.5"),
        (NAN, ValueError, r"focus_ratio must be in \(0, 1\], got nan"),
        ("1", TypeError, "focus_ratio must be a number, got str"),
        (True, TypeError, "focus_ratio must be a number, got bool"),
        (torch.ones(2), ValueError, r"focus_ratio must be a number or a 0-d tensor, got a tensor of shape \(2,\)"),
    ):
        with pytest.raises(error, match=message):
            select_tokens(difficulty, share)
    for name, call in (
        ("mask", lambda chosen: select_tokens(difficulty, 0.5, chosen)),
        ("selected", lambda chosen: inverse_difficulty_temperature(difficulty, chosen)),
    ):
        with pytest.raises(TypeError, match=rf"{name} must be bool, .*got torch.float32; pass {name}.bool\(\)"):
            call(mask.float())
        with pytest.raises(ValueError, match=rf"{name} must have the shape \(2, 3\) of the tokens, got \(3,\)"):
            call(mask[0])
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            call(mask.tolist())
    for options, message in (
        ({"temperature_scale": -INF}, "temperature_scale must be a finite number, got -inf"),
        ({"temperature_scale": INF}, "temperature_scale must be a finite number, got inf"),
        ({"base_temperature": 0.0}, "base_temperature must be > 0, got 0.0"),
        ({"base_temperature": NAN}, "base_temperature must be > 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            inverse_difficulty_temperature(difficulty, **options)


def test_focus_takes_a_tensor_of_one_number():
    focus = LossAdaptiveFocus(10)
    for loss, error, message in (
        (2.0, TypeError, r"loss must be a 0-d tensor, got float; pass torch.tensor\(loss\)"),
        (torch.ones(1), ValueError, r"loss must be a 0-d tensor, got shape \(1,\)"),
        (torch.tensor(2), TypeError, "loss must be of a floating type, got torch.int64"),
    ):
        with pytest.raises(error, match=message):
            focus.step(loss)
    assert focus.steps == 0


def test_transformations_are_refused_by_name():
    """torch.func and forward mode see no derivative of ours; what autograd's own backward gives is there."""
    from torch.autograd import forward_ad
    from torch.func import grad, jacrev, jvp, vmap

    student, teacher = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
    hidden, weight = torch.randn(2, 3, 4), torch.randn(11, 4)
    functions = {
        "adakd_loss": (lambda s: adakd_loss(s, teacher, L).loss, student),
        "token_divergence": (lambda s: token_divergence(s, teacher).sum(), student),
        "linear_adakd_loss": (lambda h: linear_adakd_loss(h, weight, hidden, weight, L).loss, hidden),
        "linear_token_divergence": (lambda h: linear_token_divergence(h, weight, hidden, weight).sum(), hidden),
    }
    for name, (function, x) in functions.items():
        message = f"adakd_kernels: {name} cannot be used inside torch.func"
        for transform in (grad(function), jacrev(function), vmap(function), lambda x, f=function: jvp(f, (x,), (x,))):
            with pytest.raises(RuntimeError, match=message):
                transform(x)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
            function(forward_ad.make_dual(x, x))
        with pytest.raises(RuntimeError, match="the loss has no second derivative"):
            torch.autograd.functional.jvp(function, x, x)
        expected = torch.autograd.functional.jacobian(function, x)
        assert torch.equal(expected, torch.autograd.functional.vjp(function, x)[1])
    for teacher_side in ({"teacher_weight": weight}, {"teacher_weight": weight, "teacher_bias": torch.randn(11)}):
        last = list(teacher_side)[-1]
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="linear_adakd_loss has no forward-mode"):
            dual = teacher_side | {last: forward_ad.make_dual(teacher_side[last], teacher_side[last])}
            linear_adakd_loss(hidden, weight, hidden, labels=L, **dual)
    # A difficulty has no gradient; as a function of rows it may be mapped.
    assert torch.equal(vmap(token_difficulty)(student, teacher), token_difficulty(student, teacher))


H, W, B = torch.zeros(2, 3, 4), torch.zeros(11, 4), torch.zeros(11)
HEAD_ERRORS = {
    "hidden states are a list": ({"student_hidden": []}, TypeError, "student_hidden must be a tensor, got list"),
    "hidden states are 1-D": (
        {"teacher_hidden": B},
        ValueError,
        r"teacher_hidden must be \(B, L, H\) or \(N, H\), got",
    ),
    "teacher of another length": ({"teacher_hidden": H[:, :2]}, ValueError, r"teacher_hidden must have the student's"),
    "teacher's hidden states require grad": (
        {"teacher_hidden": H.clone().requires_grad_()},
        ValueError,
        "teacher_hidden requires grad.*torch.no_grad",
    ),
    "teacher's head requires grad": (
        {"teacher_weight": W.clone().requires_grad_()},
        ValueError,
        r"teacher_weight requires grad.*teacher_weight.detach\(\)",
    ),
    "teacher's bias requires grad": (
        {"teacher_bias": B.clone().requires_grad_()},
        ValueError,
        "teacher_bias requires grad",
    ),
    "a function as the student's head": (
        {"student_weight": lambda hidden: hidden @ W.T},
        TypeError,
        "student_weight must be a .* tensor or an nn.Module, whose parameters get gradients, got function",
    ),
    "no head": ({"teacher_weight": None}, TypeError, "teacher_weight must be a .* tensor or a callable, got NoneType"),
    "bias beside a module": (
        {"student_weight": torch.nn.Linear(4, 11), "student_bias": B},
        ValueError,
        "student_bias must be None where student_weight is no tensor",
    ),
    "weight of another hidden size": (
        {"student_weight": W.T},
        ValueError,
        r"student_weight must be \(V, 4\), H as student_hidden has it, got shape \(4, 11\)",
    ),
    "bias of another length": (
        {"teacher_bias": B[:5]},
        ValueError,
        r"teacher_bias must be \(11,\), V as teacher_weight has it, got shape \(5,\)",
    ),
    "weight of another type": (
        {"student_weight": W.bfloat16()},
        TypeError,
        "student_weight must be torch.float32 as student_hidden is, got torch.bfloat16; .*autocast",
    ),
    "integer weight": ({"student_weight": W.long()}, TypeError, "student_weight must be fp16, bf16, fp32 or fp64"),
    "weight elsewhere": (
        {"teacher_weight": W.to("meta")},
        ValueError,
        "teacher_weight must be on the student's device",
    ),
    "labels of another shape": ({"labels": L[0]}, ValueError, r"labels must have the shape \(2, 3\).*got \(3,\)"),
    "unknown divergence": ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl"),
    "negative soft-cap": ({"student_softcap": -1.0}, ValueError, "student_softcap must be None or > 0, got -1.0"),
    "scale 0": ({"teacher_scale": 0.0}, ValueError, "teacher_scale must be a finite number > 0, got 0.0"),
    "no tokens in a chunk": ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1, got 0"),
    "half a chunk": ({"chunk_tokens": 0.5}, TypeError, "chunk_tokens must be an integer, got float"),
    "negative budget": ({"keep_bytes": -1}, ValueError, "keep_bytes must be at least 0, got -1"),
}


@pytest.mark.parametrize("case", HEAD_ERRORS)
def test_loss_from_hidden_states(case):
    changes, error, message = HEAD_ERRORS[case]
    given = {"student_hidden": H, "student_weight": W, "teacher_hidden": H, "teacher_weight": W, "labels": L, **changes}
    with pytest.raises(error, match=message):
        linear_adakd_loss(**given)


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (JensenShannon, {"beta": 1.0}, "JensenShannon: beta must lie strictly between 0 and 1, got 1.0"),
        (SkewForwardKL, {"alpha": 0.0}, "SkewForwardKL: alpha .* alpha = 0 is 'forward_kl'"),
        (SkewReverseKL, {"alpha": -0.1}, "SkewReverseKL: alpha must lie strictly between 0 and 1, got -0.1"),
        (AlphaBeta, {"alpha": 0.0}, "AlphaBeta: alpha must be positive and finite, got 0.0"),
        (AlphaBeta, {"beta": float("inf")}, "AlphaBeta: beta must be positive and finite, got inf"),
        (JensenShannon, {"beta": NAN}, "JensenShannon: beta must lie strictly between 0 and 1, got nan"),
        (JensenShannon, {"beta": "0.5"}, "JensenShannon: beta must be a number, got str"),
        (AlphaBeta, {"alpha": torch.tensor(0.5)}, "AlphaBeta: alpha must be a number, got Tensor"),
    ],
)
def test_parameters_of_divergences(cls, options, message):
    with pytest.raises(TypeError if "a number" in message else ValueError, match=message):
        cls(**options)
