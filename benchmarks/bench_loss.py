"""`adakd_loss` against the eager formula of `reference.adakd_loss`: forward alone, and forward with backward.

Both run in one process on equal tensors, after a check that they agree. Each result carries machine, type, shape, the
backend that the package took, and the bytes that the exact method has to move, (4r + 3)·U for a one-sweep divergence.
"""

from __future__ import annotations

import pytest
import torch

from adakd_kernels import adakd_loss, reference
from instruments.devices import circumstances, device_of, produced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKLOADS = {"128 x 49152": (128, 49152), "64 x 151936": (64, 151936)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARE = 0.5
PROVIDERS = {
    "eager": lambda s, t, labels: reference.adakd_loss(s, t, labels, focus_ratio=SHARE),
    "adakd": lambda s, t, labels: adakd_loss(s, t, labels, focus_ratio=SHARE).loss,
    "adakd inplace": lambda s, t, labels: adakd_loss(s, t, labels, focus_ratio=SHARE, inplace=True).loss,
}


def make_inputs(workload: str, dtype: str):
    tokens, vocab = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, vocab, generator=generator)
    teacher = student + torch.randn(tokens, vocab, generator=generator)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return (*tuple(x.to(DEVICE, DTYPES[dtype]) for x in (2 * student, 2 * teacher)), labels.to(DEVICE))


def check(provider, student, teacher, labels):
    """The gate: no time is taken of a result that is wrong."""
    expected = PROVIDERS["eager"](student.double(), teacher.double(), labels)
    got = PROVIDERS[provider](student, teacher, labels)
    assert torch.allclose(got.double(), expected, rtol=1e-4), (provider, got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("phase", ["forward", "forward and backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_loss(benchmark, provider, phase, workload, dtype):
    if provider == "adakd inplace" and phase == "forward":
        pytest.skip("in place or not is a matter of the backward")
    student, teacher, labels = make_inputs(workload, dtype)
    check(provider, student, teacher, labels)
    logits = torch.empty_like(student)

    def fresh():  # not timed: the logits a model would just have produced
        logits.copy_(student)
        leaf = logits.detach().requires_grad_(phase != "forward")
        return (leaf,), {}

    def run(leaf):
        loss = PROVIDERS[provider](produced(leaf), teacher, labels)
        if phase != "forward":
            loss.backward()
        device_of(DEVICE).synchronize()

    tokens, vocab = WORKLOADS[workload]
    unit = tokens * vocab * student.element_size()
    benchmark.group = f"{workload} {dtype}, {phase}"
    benchmark.extra_info.update(
        circumstances(device_of(DEVICE)),
        bytes_of_the_exact_method=int((2 + 2 * SHARE + (phase != "forward")) * unit),
    )
    benchmark.pedantic(run, setup=fresh, rounds=7, warmup_rounds=1)
