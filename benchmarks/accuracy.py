"""Errors of loss and gradient against fp64, from rows that nearly equal the teacher's to distant ones.

The loss is the mean divergence of 16 tokens at temperature 1, which all providers have. The providers that take hidden
states get the identity for a head, so that their logits are those of the others, bit for bit. A point is the median of
3 batches: of the divergence, of the loss's relative error, and of the gradient's error over its largest entry.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from .frame import Bench, Record, error, fresh, reason
from .providers import exact, providers
from .workloads import DTYPES, Inputs, Workload

TOKENS, VOCAB, BATCHES = 16, 2048, 3
DISTANCES = [4.0**k for k in range(-6, 2)]
"""Standard deviation of the teacher's logits from the student's; those of a student have 2."""


def batch(distance: float, dtype: torch.dtype, seed: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    student, noise = (torch.randn(TOKENS, VOCAB, generator=generator, device=device) for _ in range(2))
    student = student.mul_(2.0).to(dtype)
    teacher = (student.float() + distance * noise).to(dtype)
    return {"student": student, "teacher": teacher, "labels": torch.zeros(TOKENS, dtype=torch.long, device=device)}


def through_identity(x: Inputs, head: Tensor) -> Inputs:
    """As hidden states, the gradient of which is that of the logits."""
    return {
        "hidden": x["student"], "head": head, "teacher_hidden": x["teacher"], "teacher_head": head,
        "labels": x["labels"],
    }  # fmt: skip


def run(bench: Bench, dtypes: list[str], say: Callable[[str], None] = print) -> None:
    device = bench.device.device
    logits = Workload(loss="mean", model=str(VOCAB), tokens=TOKENS)
    hidden = logits.but(route="hidden", hidden=VOCAB)
    contestants = {name: (logits, provider) for name, provider in bench.providers(logits).items()}
    for name, provider in providers(hidden, device).items():
        if provider.package and (not bench.only or name in bench.only):
            contestants[name] = hidden, provider
    for dtype in dtypes:
        head = torch.eye(VOCAB, dtype=DTYPES[dtype], device=device)
        for name, (w, provider) in contestants.items():
            record: Record = {
                "benchmark": bench.name, "workload": w.but(dtype=dtype).record(), "provider": name, "points": []
            }  # fmt: skip
            if missing := provider.needs(device):
                record["failed"] = missing
            for distance in DISTANCES if not missing else []:
                found = []
                try:
                    for seed in range(BATCHES):
                        x = batch(distance, DTYPES[dtype], seed, device)
                        expected = exact(device)(x, logits)
                        given = x if w.route == "logits" else through_identity(x, head)
                        got = provider.run(fresh(given), w.but(dtype=dtype))
                        found.append((expected[0].item(), error(got[:1], expected[:1]), error(got[1:2], expected[1:2])))
                except Exception as failure:  # a peer's failure is a result
                    record["failed"] = reason(failure)
                    break
                medians = [statistics.median(column) for column in zip(*found, strict=True)]
                record["points"].append(
                    {"distance": distance} | dict(zip(("divergence", "loss", "gradient"), medians, strict=True))
                )
            print(json.dumps(record | bench.around), file=bench.out, flush=True)
            worst = max((point["loss"] for point in record["points"]), default=float("nan"))
            say(f"  {dtype} {name:<24} " + (record.get("failed") or f"largest relative error of the loss {worst:.1e}"))
