"""The C++ kernels on the CPU against three baselines, interleaved in one process on equal tensors.

- `eager`: the formula as a user writes it, the README's;
- `reference`: the package's own plain torch, which also minds masked entries and ignored tokens;
- `compiled`: the same mathematics with the gradient (10) written out, by torch.compile in chunks of rows that stay in
  the cache, warm. There is no autograd in it and no −inf: what a user would end up with.

Forward and backward, from logits to the gradient. `new` is with a gradient of its own memory, `in place` over the
student's logits. The floor is the (4r + 3)·U bytes of the exact method, of unlike types each at its own width, at the
rate at which this machine copies 1 GB, read and written bytes together; a second sweep comes from the cache and is not
counted.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adakd_kernels import adakd_loss, ops, reference
from adakd_kernels.divergences import get_divergence
from adakd_kernels.ops.with_gradient import token_divergence_with_gradient, token_divergence_with_gradient_
from instruments.devices import ROOT, Cpu, circumstances, copy_speed, produced, quantiles

SHARE, ROWS_AT_ONCE, ROUNDS = 0.5, 8, 7
WORKLOADS = [
    (256, 151_936, torch.float32, torch.float32, "reverse_kl"),
    (256, 151_936, torch.bfloat16, torch.bfloat16, "reverse_kl"),
    (256, 151_936, torch.float32, torch.float32, "jensen_shannon"),
    (256, 151_936, torch.bfloat16, torch.bfloat16, "jensen_shannon"),
    (256, 151_936, torch.float32, torch.bfloat16, "reverse_kl"),
    (256, 151_936, torch.float16, torch.float32, "reverse_kl"),
    (4096, 49_152, torch.bfloat16, torch.bfloat16, "reverse_kl"),
]
"""Tokens, vocabulary, types of student and teacher, divergence."""
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Student, teacher, labels -> gradient in the student."""


def readme_formula() -> Callable[..., Tensor]:
    """`eager_adakd`, from where users read it."""
    block = re.search(r"^```python\n(.*?)^student = ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    names: dict[str, Callable[..., Tensor]] = {}
    exec(block[1], names)
    return names["eager_adakd"]


def by_autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    def run(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        leaf = student.detach().requires_grad_()
        loss(produced(leaf), teacher, labels).backward()
        assert leaf.grad is not None
        return leaf.grad

    return run


@torch.compile(dynamic=True)
def compiled_difficulty(s: Tensor, t: Tensor) -> Tensor:
    p, q = t.float().softmax(-1), s.float().softmax(-1)
    return 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)


@torch.compile(dynamic=True)
def compiled_reverse_kl(s: Tensor, t: Tensor, tau: Tensor, weight: Tensor) -> Tensor:
    log_q = (s.float() / tau).log_softmax(-1)
    log_p = (t.float() / tau).log_softmax(-1)
    g = log_q.exp() * (log_q - log_p)
    return (weight * (g - log_q.exp() * g.sum(-1, keepdim=True))).to(s.dtype)


@torch.compile(dynamic=True)
def compiled_jensen_shannon(s: Tensor, t: Tensor, tau: Tensor, weight: Tensor) -> Tensor:
    log_q = (s.float() / tau).log_softmax(-1)
    log_p = (t.float() / tau).log_softmax(-1)
    q = log_q.exp()
    g = 0.5 * q * (log_q - (0.5 * (log_p.exp() + q)).log())
    return (weight * (g - q * g.sum(-1, keepdim=True))).to(s.dtype)


def compiled(divergence: str) -> Run:
    gradient = {"reverse_kl": compiled_reverse_kl, "jensen_shannon": compiled_jensen_shannon}[divergence]

    def run(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        rows = zip(student.split(ROWS_AT_ONCE), teacher.split(ROWS_AT_ONCE), strict=True)
        hard = torch.cat([compiled_difficulty(s, t) for s, t in rows])
        chosen = hard.topk(max(1, int(SHARE * len(hard)))).indices
        median = hard[chosen].median()
        tau = torch.exp(-0.5 * (hard[chosen] - median) / (hard[chosen] + median)).unsqueeze(-1)
        out = torch.zeros_like(student)
        for some, its_tau in zip(chosen.split(ROWS_AT_ONCE), tau.split(ROWS_AT_ONCE), strict=True):
            out[some] = gradient(student[some], teacher[some], its_tau, its_tau / len(chosen))
        return out

    return run


def providers(divergence: str) -> dict[str, Run]:
    def ours(inplace: bool) -> Run:
        return by_autograd(
            lambda s, t, y: adakd_loss(s, t, y, divergence=divergence, focus_ratio=SHARE, inplace=inplace).loss
        )

    found: dict[str, Run] = {
        "new": ours(inplace=False),
        "in place": ours(inplace=True),
        "reference": by_autograd(lambda s, t, y: reference.adakd_loss(s, t, y, divergence, SHARE)),
        "compiled": compiled(divergence),
    }
    if divergence == "reverse_kl":
        found["eager"] = by_autograd(readme_formula())
    return found


def profile(student: Tensor, teacher: Tensor, divergence: str) -> dict[str, float]:
    """Median milliseconds of each operator, half of the tokens selected."""
    s, t = student.unsqueeze(0), teacher.unsqueeze(0)
    every = torch.ones(s.shape[:2], dtype=torch.bool)
    half = torch.rand(s.shape[:2], generator=torch.Generator().manual_seed(1)) < SHARE
    tau, weight, div = torch.ones(s.shape[:2]), half.float(), get_divergence(divergence)
    args = (div.name, *div.parameters)
    _, *saved = ops.token_divergence(s, t, tau, half, *args)
    backward = (t, tau, weight, *saved, None, None, None, *args)
    in_one_go = (t, tau, half, *args, weight, None, None, None)
    calls = {
        "token_stats": lambda _: ops.token_stats(s, t, every),
        "token_divergence": lambda _: ops.token_divergence(s, t, tau, half, *args),
        "token_divergence_backward": lambda _: ops.token_divergence_backward(s, *backward),
        "token_divergence_backward_": lambda logits: ops.token_divergence_backward_(logits, *backward),
        "token_divergence_with_gradient": lambda _: token_divergence_with_gradient(s, *in_one_go),
        "token_divergence_with_gradient_": lambda logits: token_divergence_with_gradient_(logits, *in_one_go),
    }
    found = {}
    for name, call in calls.items():
        times = []
        for _ in range(ROUNDS):
            logits = s.clone()
            start = time.perf_counter()
            result = call(logits)
            times.append(time.perf_counter() - start)
            del result, logits
        found[name] = round(statistics.median(times) * 1e3, 1)
    return found


@pytest.mark.skipif(
    ops.backend("cpu").name != "native", reason=f"measures the C++ kernels: {ops.backend('cpu').reason}"
)
@pytest.mark.parametrize("tokens, vocab, dtype, teacher_dtype, divergence", WORKLOADS)
def bench_cpu(tokens, vocab, dtype, teacher_dtype, divergence, capsys):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, vocab, generator=generator, dtype=torch.bfloat16).mul_(2.0)
    teacher = torch.randn(tokens, vocab, generator=generator, dtype=torch.bfloat16).mul_(2.0).add_(student)
    student, teacher = student.to(dtype), teacher.to(teacher_dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    runs = providers(divergence)
    if tokens * vocab > 2**27:  # a dozen fp32 copies of these logits would not fit
        runs = {name: runs[name] for name in ("new", "in place", "compiled")}

    expected = runs["compiled"](student, teacher, labels)  # the gate: no time is taken of a result that is wrong
    for name, run in runs.items():
        got = run(student.clone(), teacher, labels)
        off = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert off <= 2 * torch.finfo(dtype).eps + 1e-4, (name, off)
        del got
    del expected

    copy_rate = copy_speed(Cpu())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            logits = student.clone()  # not timed: what a model would just have written
            start = time.perf_counter()
            gradient = run(logits, teacher, labels)
            times[name].append(time.perf_counter() - start)
            del gradient, logits
    median = {name: statistics.median(found) for name, found in times.items()}

    width, teacher_width = student.element_size(), teacher.element_size()
    floor = tokens * vocab * ((2 * SHARE + 1) * (width + teacher_width) + width) / copy_rate
    types = " and ".join(str(t).removeprefix("torch.") for t in dict.fromkeys((dtype, teacher_dtype)))
    line = {
        "workload": f"{tokens} x {vocab} {types} {divergence}",
        **circumstances(Cpu()),
        "copy_gb_per_s": round(copy_rate / 1e9, 1),
        "floor_ms": round(floor * 1e3, 1),
        "profile_ms": profile(student, teacher, divergence),
        "ms": {name: {key: round(x * 1e3, 1) for key, x in quantiles(found).items()} for name, found in times.items()},
    }
    with capsys.disabled():
        print("\n" + json.dumps(line))
        for ours in ("new", "in place"):
            ratios = ", ".join(
                f"{median[name] / median[ours]:.1f}x {name}" for name in median if name not in ("new", "in place")
            )
            print(f"  {ours:>8}: {median[ours] * 1e3:7.1f} ms, {floor / median[ours]:.2f} of the floor; {ratios}")
