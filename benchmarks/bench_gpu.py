"""Time and memory of a loss and its gradient on a GPU, beside eager PyTorch, `torch.compile` and the peers installed.

    python -m benchmarks.bench_gpu > results.jsonl

Two jobs. `adakd` is the whole method, from logits to loss and gradient, which no peer has. `forward_kl` is the mean of
KL(p‖q) over all tokens, which they have: from logits, and from hidden states, where the head's product is part of it.

Every result is first held against fp64: a provider whose error is above twice that of eager in the same type, plus a
few units in the last place, gets its error on record and no time. Then the providers take turns in one process on equal
inputs. One JSON line a provider and shape. The fp64 of the gate needs the most memory, about 8 copies of the logits at
8 bytes an entry; `--tokens` makes it less.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn import functional as F

from adakd_kernels import adakd_loss, linear_adakd_loss, reference, token_divergence
from instruments.devices import Cpu, Gpu, circumstances, copy_speed, device_of, produced, quantiles

SHARE = 0.5
# Beside twice the error of eager: units in the last place of the type, relative to the largest entry.
UNITS = 4.0


@dataclass(frozen=True)
class Job:
    """Inputs, what is differentiated, and who computes it.

    A provider takes the inputs by name and returns the loss. The first is eager PyTorch, the yardstick of the others.
    """

    make: Callable[..., dict[str, Tensor]]
    wanted: tuple[str, ...]  # inputs whose gradient is asked for
    providers: dict[str, Callable[..., Tensor]]
    passes: (
        float | None
    )  # of the fused method over the N×V logits, each byte from memory once; None where a matrix product counts as well


def random_logits(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(tokens, vocab, generator=generator, device=device)

    student = 2.0 * normal()
    teacher = student + 2.0 * normal()
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    return {"student": student.to(dtype), "teacher": teacher.to(dtype), "labels": labels}


def random_states(tokens: int, vocab: int, dtype: torch.dtype, device: str, hidden: int = 2048) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    return {
        "hidden": normal(tokens, hidden),
        "head": normal(vocab, hidden, scale=2.0 * hidden**-0.5),
        "teacher_hidden": normal(tokens, hidden),
        "teacher_head": normal(vocab, hidden, scale=2.0 * hidden**-0.5),
        "labels": torch.randint(vocab, (tokens,), generator=generator, device=device),
    }


def eager_adakd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return reference.adakd_loss(student, teacher, labels, focus_ratio=SHARE)


def our_adakd(student: Tensor, teacher: Tensor, labels: Tensor, inplace: bool = False) -> Tensor:
    return adakd_loss(student, teacher, labels, focus_ratio=SHARE, inplace=inplace).loss


def eager_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return reference.token_divergence(student, teacher, 1.0, "forward_kl").mean()


def our_kl(student: Tensor, teacher: Tensor, labels: Tensor, inplace: bool = False) -> Tensor:
    return token_divergence(student, teacher, 1.0, "forward_kl", inplace=inplace).mean()


def liger_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """It takes log-probabilities, which a user makes first; in 16 bits they would be too coarse."""
    from liger_kernel.transformers import LigerJSD

    log_q, log_p = (F.log_softmax(z, dim=-1, dtype=torch.float32) for z in (student, teacher))
    return LigerJSD(beta=0.0)(log_q, log_p)


def from_logits(
    loss: Callable[..., Tensor],
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_head.T
    return loss(hidden @ head.T, teacher, labels)


def liger_kl_of_states(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(hidden, head, teacher_hidden, teacher_head, labels)


def orda_kl_of_states(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    from orda_kernel import SeparateTeacher, distillation_loss

    teacher = SeparateTeacher(teacher_hidden, teacher_head)
    return distillation_loss(hidden, head, labels, teacher, student_ce_weight=0.0, kl_weight=1.0).loss


def trl_kl_of_states(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    """Its Triton kernels on a GPU, its torch fallback elsewhere; it gives the student's entropy too."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 0.0)
    return per_token.mean()


def our_kl_of_states(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    return linear_adakd_loss(
        hidden, head, teacher_hidden, teacher_head, labels, divergence="forward_kl", temperature_scale=0.0
    ).loss


def jobs(device: Gpu | Cpu) -> dict[str, Job]:
    compiled = partial(torch.compile, backend=device.compiler)
    logits = partial(random_logits, device=device.device)
    states = partial(random_states, device=device.device)
    return {
        "adakd from logits": Job(
            logits,
            ("student",),
            {
                "eager": eager_adakd,
                "torch.compile": compiled(eager_adakd),
                "adakd": our_adakd,
                "adakd in place": partial(our_adakd, inplace=True),
            },
            passes=2 * SHARE + 3,
        ),
        "forward_kl from logits": Job(
            logits,
            ("student",),
            {
                "eager": eager_kl,
                "torch.compile": compiled(eager_kl),
                "liger": liger_kl,
                "adakd": our_kl,
                "adakd in place": partial(our_kl, inplace=True),
            },
            passes=5,
        ),
        "forward_kl from hidden states": Job(
            states,
            ("hidden", "head"),
            {
                "eager": partial(from_logits, eager_kl),
                "torch.compile": compiled(partial(from_logits, eager_kl)),
                "liger": liger_kl_of_states,
                "orda": orda_kl_of_states,
                "trl": trl_kl_of_states,
                "adakd": our_kl_of_states,
                "adakd after the head": partial(from_logits, partial(our_kl, inplace=True)),
            },
            passes=None,
        ),
    }


def step(job: Job, provider: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Loss and gradients. An input that requires grad is an operator's result: its gradient may take its place."""
    given = {name: produced(x) if name in job.wanted else x for name, x in inputs.items()}
    loss = provider(**given)
    return loss.detach(), *torch.autograd.grad(loss, [given[name] for name in job.wanted])


def fresh(job: Job, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since a provider may write over its inputs."""
    return {name: x.clone().requires_grad_(name in job.wanted) for name, x in inputs.items()}


def error(job: Job, provider: Callable[..., Tensor], inputs: dict[str, Tensor], exact: tuple[Tensor, ...]) -> float:
    """The largest error of loss and gradients, each relative to its largest entry."""
    got = step(job, provider, fresh(job, inputs))
    return max(
        ((x.double() - y).abs().max() / y.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).item()
        for x, y in zip(got, exact, strict=True)
    )


def measure(
    device: Gpu | Cpu, name: str, job: Job, tokens: int, vocab: int, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    """Gate, then memory, then time: a record for each provider."""
    torch._dynamo.reset()  # compiled for this shape, as a training run would have it
    inputs = job.make(tokens, vocab, dtype)
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    exact = step(job, next(iter(job.providers.values())), fresh(job, wide))
    del wide
    records: dict[str, dict[str, Any]] = {}
    for provider, function in job.providers.items():
        record = records[provider] = {
            "job": name,
            "provider": provider,
            "tokens": tokens,
            "vocabulary": vocab,
            "dtype": str(dtype).removeprefix("torch."),
        }
        try:
            found = error(job, function, inputs, exact)
        except Exception as reason:  # a peer's failure is a result
            record["failed"] = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
            continue
        record["error"] = found
        allowed = 2.0 * next(iter(records.values()))["error"] + UNITS * torch.finfo(dtype).eps
        if not found <= allowed:
            record["failed"] = f"error {found:.2e} is above {allowed:.2e}"
    del exact
    passing = [provider for provider, record in records.items() if "failed" not in record]
    times: dict[str, list[float]] = {provider: [] for provider in passing}
    for provider in passing:
        copy = fresh(job, inputs)
        records[provider]["peak_bytes"] = device.peak_bytes(partial(step, job, job.providers[provider], copy))
    for _ in range(rounds):
        for provider in passing:
            copy = fresh(job, inputs)
            times[provider].append(device.milliseconds(partial(step, job, job.providers[provider], copy)))
    speed = copy_speed(device, device.size(2**30, 2**20))
    for provider in passing:
        records[provider]["milliseconds"] = quantiles(times[provider])
        if job.passes is not None and provider.startswith("adakd"):
            moved = job.passes * tokens * vocab * dtype.itemsize
            per_second = moved / (quantiles(times[provider])["median"] * 1e-3)
            records[provider] |= {
                "bytes": int(moved),
                "gb_per_s": per_second / 1e9,
                "share_of_copy_speed": per_second / speed,
            }
    return list(records.values())


def run(device: Gpu | Cpu, out: TextIO, rounds: int, shapes: list[tuple[int, int]], dtypes: list[torch.dtype]) -> None:
    speed = copy_speed(device, device.size(2**30, 2**20))
    around = circumstances(device) | {"copy_gb_per_s": round(speed / 1e9, 1)}
    for name, job in jobs(device).items():
        for tokens, vocab in shapes:
            for dtype in dtypes:
                for record in measure(device, name, job, tokens, vocab, dtype, rounds):
                    print(json.dumps(record | around), file=out, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30, help="times each provider is run (%(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch (%(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA or ROCm device on this machine; make bench measures on the CPU", file=sys.stderr)
        return 1
    shapes = [(arguments.tokens, vocab) for vocab in (128_256, 151_936, 262_144)]
    run(device_of("cuda"), sys.stdout, arguments.rounds, shapes, [torch.bfloat16])
    return 0


if __name__ == "__main__":
    sys.exit(main())
