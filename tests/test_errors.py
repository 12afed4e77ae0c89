"""Bad input to the public functions: which argument, what was expected, what came, how to mend it."""

from __future__ import annotations

import pytest
import torch

from adakd_kernels import (
    AdaKDLoss,
    AlphaBeta,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    adakd_loss,
    linear_adakd_loss,
    token_difficulty,
    token_divergence,
)

pytestmark = pytest.mark.fast

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
    "negative scale": (
        (S, T, L),
        {"temperature_scale": -1.0},
        ValueError,
        "temperature_scale must be a finite number >= 0",
    ),
    "temperature 0": ((S, T, L), {"base_temperature": 0.0}, ValueError, "base_temperature must be > 0, got 0.0"),
    "cross-entropy above 1": ((S, T, L), {"ce_weight": 1.1}, ValueError, r"ce_weight must be in \[0, 1\], got 1.1"),
    "negative count": ((S, T, L), {"num_items": -1}, ValueError, "num_items must be the number of valid tokens"),
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
    with pytest.raises(ValueError, match=r"give total_steps .* or focus"):
        AdaKDLoss()
    with pytest.raises(ValueError, match=r"give total_steps .* or focus"):
        AdaKDLoss(total_steps=3, focus=0.5)


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
    ],
)
def test_parameters_of_divergences(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)
