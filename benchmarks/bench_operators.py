"""Each operator of this package on its own, timed by pytest-benchmark: `python -m pytest benchmarks`.

Statistics read the logits of all tokens; the divergence and its gradient those of half of them. Results go to
`results/operators.jsonl` as well, with machine, versions and commit. `--benchmark-disable` runs each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adakd_kernels import ops
from adakd_kernels.divergences import get_divergence
from adakd_kernels.ops.with_gradient import token_divergence_with_gradient, token_divergence_with_gradient_
from instruments.devices import circumstances

from .workloads import DTYPES, Workload, inputs

TYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"), ("fp16", "fp32")]
"""Of student and teacher."""
OPERATORS = [
    "token_stats", "token_divergence", "token_divergence_backward", "token_divergence_backward_",
    "token_divergence_with_gradient", "token_divergence_with_gradient_",
]  # fmt: skip


def calls(student: Tensor, teacher: Tensor, divergence: str) -> dict[str, Callable[[Tensor], Any]]:
    """Of logits (1, N, V): each operator as a function of the student's, which those with a `_` overwrite."""
    every = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    half = torch.zeros_like(every)
    half[:, ::2] = True
    tau, weight, div = torch.ones(every.shape, device=every.device), half.float(), get_divergence(divergence)
    args = (div.name, *div.parameters)
    _, *saved = ops.token_divergence(student, teacher, tau, half, *args)
    backward = (teacher, tau, weight, *saved, None, None, None, *args)
    in_one_go = (teacher, tau, half, *args, weight, None, None, None)
    return {
        "token_stats": lambda s: ops.token_stats(s, teacher, every),
        "token_divergence": lambda s: ops.token_divergence(s, teacher, tau, half, *args),
        "token_divergence_backward": lambda s: ops.token_divergence_backward(s, *backward),
        "token_divergence_backward_": lambda s: ops.token_divergence_backward_(s, *backward),
        "token_divergence_with_gradient": lambda s: token_divergence_with_gradient(s, *in_one_go),
        "token_divergence_with_gradient_": lambda s: token_divergence_with_gradient_(s, *in_one_go),
    }


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("student_dtype, teacher_dtype", TYPES)
def bench_operator(benchmark, student_dtype, teacher_dtype, divergence, operator, model, device):
    tokens = device.size(4096, 256)
    w = Workload(divergence=divergence, model=model, tokens=tokens, dtype=student_dtype)
    x = inputs(w, device.device)
    student, teacher = x["student"].unsqueeze(0), x["teacher"].to(DTYPES[teacher_dtype]).unsqueeze(0)
    call = calls(student, teacher, divergence)[operator]

    def fresh():  # not timed: the logits a model would just have written
        device.synchronize()
        return (student.clone(),), {}

    def run(logits):
        call(logits)
        device.synchronize()

    benchmark.group = f"{tokens} x {w.vocab}, {student_dtype} and {teacher_dtype}, {divergence}"
    benchmark.extra_info.update(
        circumstances(device), workload={**w.record(), "teacher_dtype": teacher_dtype}, operator=operator
    )
    benchmark.pedantic(run, setup=fresh, rounds=7, warmup_rounds=1)
