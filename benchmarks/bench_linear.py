"""The loss from hidden states against the loss from logits and against peers: time, and memory in a process of its own.

Heads are included on both sides: the logits route takes 4 matrix products of N x H x V, the hidden route 2 + 4r, or 4
where every token counts at one temperature. The peers differentiate every token and have no difficulty, selection or
temperature of a token, so they stand beside our losses with share 1 and one temperature: Liger's fused-linear JSD,
ORDA's torch backend at reverse KL, and the loss of TRL's DistillationTrainer at both.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adakd_kernels import adakd_loss, linear_adakd_loss, ops
from instruments.devices import circumstances, device_of, forget_peak, resident

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, VOCAB, DTYPE = 896, 151_936, torch.bfloat16
SHAPE = f"H {HIDDEN}, V {VOCAB}, {DTYPE}"
FUSED = ops.backend(DEVICE).name != "reference"
TOKENS = 4096 if FUSED else 512
"""Plain torch makes a dozen fp32 copies of the logits: 4,096 tokens would take 30 GB on the logits route."""
FEWER_TOKENS = TOKENS // 4
"""For the group of ORDA's torch backend, which takes about 10 MB a token."""
ROW_BYTES = 2 * VOCAB * DTYPE.itemsize
MEMORY_SHARE = 0.05
"""What the hidden route may take beside inputs, gradients and accumulator, as a share of the logits of both models."""


class Inputs(NamedTuple):
    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    labels: Tensor


def make_inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> Inputs:
    """A teacher that the student resembles, so that difficulties differ from token to token."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.bfloat16) * scale).to(DEVICE, dtype)

    student, head = normal(tokens, hidden, scale=1.0), normal(vocab, hidden, scale=0.08)
    labels = torch.randint(vocab, (tokens,), generator=generator).to(DEVICE)
    teacher, teacher_head = normal(tokens, hidden, scale=0.5) + student, normal(vocab, hidden, scale=0.03) + head
    return Inputs(student.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels)


def from_logits(x: Inputs, **options: Any) -> Tensor:
    student, teacher = F.linear(x.student, x.student_head), F.linear(x.teacher, x.teacher_head)
    return adakd_loss(student, teacher, x.labels, inplace=True, **options).loss


def from_hidden(x: Inputs, **options: Any) -> Tensor:
    return linear_adakd_loss(x.student, x.student_head, x.teacher, x.teacher_head, x.labels, **options).loss


def liger(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    return loss(x.student, x.student_head, x.teacher, x.teacher_head, x.labels)


def orda(x: Inputs) -> Tensor:
    from orda_kernel import SeparateTeacher, distillation_loss

    return distillation_loss(
        x.student, x.student_head, x.labels, SeparateTeacher(x.teacher, x.teacher_head), student_ce_weight=0.0,
        teacher_ce_weight=0.0, kl_weight=1.0, kl_divergence="reverse", backend="torch",
    ).loss  # fmt: skip


def trl(x: Inputs, beta: float) -> Tensor:
    """Its Triton kernels on a GPU, its torch fallback elsewhere; it gives the student's entropy too."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(
        x.student, x.student_head, None, x.teacher, x.teacher_head, None, beta
    )
    return per_token.mean()


class Provider(NamedTuple):
    """A loss; `group` are those that compute the same, `held` says which gradients exist after the forward."""

    group: str
    loss: Callable[[Inputs], Tensor]
    held: str = "accumulator"
    package: str | None = None
    tokens: int = TOKENS


def _routes(group: str, **options: Any) -> dict[str, Provider]:
    """Both routes to one loss, and the hidden one that keeps the logits of half of the tokens it needs."""
    half = int(options.get("focus_ratio", 1.0) * TOKENS / 2) * ROW_BYTES
    return {
        f"{group}: logits": Provider(group, lambda x: from_logits(x, **options), held="nothing"),
        f"{group}: hidden": Provider(group, lambda x: from_hidden(x, **options)),
        f"{group}: hidden, half kept": Provider(group, lambda x: from_hidden(x, keep_bytes=half, **options)),
    }


ONE_TEMPERATURE: dict[str, Any] = {"temperature_scale": 0.0}
PROVIDERS: dict[str, Provider] = {
    **_routes("AdaKD r=0.25", focus_ratio=0.25),
    **_routes("AdaKD r=1"),
    "JSD: hidden": Provider("JSD", lambda x: from_hidden(x, divergence="jensen_shannon", **ONE_TEMPERATURE)),
    "JSD: liger-kernel": Provider("JSD", liger, held="gradients", package="liger_kernel"),
    "JSD: trl": Provider("JSD", lambda x: trl(x, 0.5), held="nothing", package="trl"),
    "reverse KL: hidden": Provider("reverse KL", lambda x: from_hidden(x, **ONE_TEMPERATURE), tokens=FEWER_TOKENS),
    "reverse KL: orda-kernel": Provider("reverse KL", orda, "gradients", package="orda_kernel", tokens=FEWER_TOKENS),
    "reverse KL: trl": Provider("reverse KL", lambda x: trl(x, 1.0), "nothing", package="trl", tokens=FEWER_TOKENS),
}
EXPECTED: dict[str, dict[str, Any]] = {
    "AdaKD r=0.25": {"focus_ratio": 0.25},
    "AdaKD r=1": {},
    "JSD": {"divergence": "jensen_shannon", **ONE_TEMPERATURE},
    "reverse KL": ONE_TEMPERATURE,
}


def need(name: str) -> Provider:
    provider = PROVIDERS[name]
    if provider.package is not None and importlib.util.find_spec(provider.package) is None:
        pytest.skip(f"{provider.package} is not installed: pip install --no-deps {provider.package.replace('_', '-')}")
    return provider


def gate(provider: Provider) -> None:
    """No time is taken of a result that is wrong: loss and both gradients, in fp32 on a small batch, against fp64."""
    x = make_inputs(48, 32, 1000, torch.float32)
    exact = Inputs(*(v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v for v in x))
    student, teacher = F.linear(exact.student, exact.student_head), F.linear(exact.teacher, exact.teacher_head)
    results = []
    for loss, of in (
        (provider.loss(x), x),
        (adakd_loss(student, teacher, exact.labels, **EXPECTED[provider.group]).loss, exact),
    ):
        results.append([loss, *torch.autograd.grad(loss, (of.student, of.student_head))])
    for got, expected in zip(*results, strict=True):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, (provider.group, error)


def run_once(provider: Provider, x: Inputs) -> None:
    torch.autograd.grad(provider.loss(x), (x.student, x.student_head))
    device_of(DEVICE).synchronize()


@pytest.mark.parametrize("name", PROVIDERS)
def bench_linear_time(benchmark, name):
    provider = need(name)
    gate(provider)
    x = make_inputs(provider.tokens, HIDDEN, VOCAB, DTYPE)
    benchmark.group = f"loss and gradients with both heads, {provider.tokens} x {VOCAB}: {provider.group}"
    benchmark.extra_info.update(circumstances(device_of(DEVICE)), shape=SHAPE)
    benchmark.pedantic(run_once, args=(provider, x), rounds=3, warmup_rounds=1)


@pytest.mark.skipif(DEVICE != "cpu" or not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux")
@pytest.mark.parametrize("name", PROVIDERS)
def bench_linear_memory(benchmark, name):
    """The time of this one is that of a whole process; what counts is `extra_info`."""
    provider = need(name)
    command = [sys.executable, "-m", "benchmarks.bench_linear", name]
    root = Path(__file__).parent.parent

    def measure():
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout

    found = json.loads(benchmark.pedantic(measure, rounds=1).splitlines()[-1])
    benchmark.group = f"memory, {provider.tokens} x {VOCAB}"
    benchmark.extra_info.update(circumstances(device_of(DEVICE)), shape=SHAPE, **found)
    print(f"\n{name}: {json.dumps(found)}")
    if FUSED and name.endswith("hidden") and provider.tokens == TOKENS:
        assert found["share_of_logits"] <= MEMORY_SHARE, found


def measure_memory(name: str) -> dict[str, float]:
    """The peak above the inputs, and what of it is beside gradients and accumulator, also as a share of the logits."""
    provider = PROVIDERS[name]
    run_once(provider, make_inputs(64, 32, 1000, DTYPE))  # libraries load what they need
    x = make_inputs(provider.tokens, HIDDEN, VOCAB, DTYPE)
    before, _ = resident()
    forget_peak()
    loss = provider.loss(x)
    forward = resident()[1] - before
    torch.autograd.grad(loss, (x.student, x.student_head))
    peak = resident()[1] - before
    small, large = x.student.nbytes, x.student_head.nbytes
    accumulator = 4 * x.student_head.numel() if provider.held == "accumulator" else 0
    held = {"nothing": 0, "accumulator": small + accumulator, "gradients": small + large}[provider.held]
    beside = max(forward - held, peak - small - large - accumulator)
    return {
        "peak_mb": peak / 1e6,
        "beside_gradients_mb": beside / 1e6,
        "accumulator_mb": accumulator / 1e6,
        "share_of_logits": beside / (provider.tokens * ROW_BYTES),
    }


if __name__ == "__main__":
    print(json.dumps(measure_memory(sys.argv[1])))
