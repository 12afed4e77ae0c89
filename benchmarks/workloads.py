"""What is measured: vocabularies by the name of a model, tokens, type, loss; and the inputs of each.

Two losses. `adakd` is the whole method: difficulties, the share of the hardest tokens, their temperatures, the mean. No
peer has it. `mean` is the mean of a divergence over all tokens at temperature 1, which they have. Two routes: from
`logits`, or from `hidden` states, where the products with both heads count as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

VOCABULARIES = {"llama2": 32_000, "gpt2": 50_257, "llama3": 128_256, "qwen2": 151_936, "gemma": 262_144}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    route: str = "logits"
    loss: str = "adakd"
    divergence: str = "reverse_kl"
    model: str = "qwen2"  # of VOCABULARIES, or the size of a vocabulary
    tokens: int = 256
    dtype: str = "bf16"
    share: float = 0.5
    hidden: int = 896  # of both models, on the hidden route
    threads: int = 0  # of a CPU; 0: as torch has it

    @property
    def vocab(self) -> int:
        return VOCABULARIES[self.model] if self.model in VOCABULARIES else int(self.model)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Inputs whose gradient is asked for."""
        return ("student",) if self.route == "logits" else ("hidden", "head")

    @property
    def selected(self) -> int:
        return max(1, int(self.share * self.tokens)) if self.loss == "adakd" else self.tokens

    @property
    def floor_bytes(self) -> int | None:
        """What a loss from logits has to move, each byte from memory once a phase: (2r + 3)·U, without difficulty 3U.

        None on the hidden route, where matrix products decide.
        """
        if self.route == "hidden":
            return None
        passes = 2 * self.selected + (3 if self.loss == "adakd" else 1) * self.tokens
        return passes * self.vocab * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        share = f" r={self.share:g}" if self.loss == "adakd" else ""
        threads = f" threads={self.threads}" if self.threads else ""
        route = f" hidden={self.hidden}" if self.route == "hidden" else ""
        of = f"{self.loss} {self.divergence}{share} from {self.route}"
        return f"{of}: {self.tokens} x {self.vocab} ({self.model}) {self.dtype}{route}{threads}"

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "vocab": self.vocab}

    def but(self, **changes: Any) -> Workload:
        return replace(self, **changes)


def inputs(workload: Workload, device: str) -> Inputs:
    """The same numbers for the same workload on a device.

    The hardest tokens, those that the loss selects, are twice as far from the teacher as the others: rounding moves no
    token across that gap, so all providers select the same.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[workload.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    order = torch.randperm(workload.tokens, generator=generator, device=device)
    distance = torch.where(order < workload.selected, 2.0, 1.0).unsqueeze(-1)
    labels = torch.randint(workload.vocab, (workload.tokens,), generator=generator, device=device)
    if workload.route == "logits":
        student = normal(workload.tokens, workload.vocab).mul_(2.0)
        teacher = normal(workload.tokens, workload.vocab).mul_(distance).add_(student)
        return {"student": student.to(dtype), "teacher": teacher.to(dtype), "labels": labels}
    scale = 2.0 * workload.hidden**-0.5
    hidden, head = normal(workload.tokens, workload.hidden), scale * normal(workload.vocab, workload.hidden)
    return {
        "hidden": hidden.to(dtype),
        "head": head.to(dtype),
        "teacher_hidden": (hidden + 0.5 * distance * normal(workload.tokens, workload.hidden)).to(dtype),
        "teacher_head": (head + 0.2 * scale * normal(workload.vocab, workload.hidden)).to(dtype),
        "labels": labels,
    }


def peers(device: str, models: list[str], tokens: list[int], dtypes: list[str]) -> Iterator[Workload]:
    """All providers side by side: the whole method from logits, and both losses from hidden states.

    On a CPU the products with the heads take a second for a thousand tokens of the smallest vocabulary, so the hidden
    route takes the first of the models alone; with more tokens, because the gradient of the head is as large as the
    logits of a few hundred. One peer, orda-kernel, has the KL divergences alone and takes 10 MB a token.
    """
    gpu = device == "cuda"
    for dtype in dtypes:
        for model in models:
            for n in tokens:
                yield Workload(model=model, tokens=n, dtype=dtype)
    for model in models if gpu else models[:1]:
        for n in tokens:
            of = Workload(route="hidden", model=model, tokens=n, dtype=dtypes[-1], hidden=4096 if gpu else 896)
            yield of.but(loss="mean", divergence="jensen_shannon", tokens=n if gpu else 8 * n)
            yield of.but(loss="mean", divergence="reverse_kl")
            yield of.but(tokens=n if gpu else 4 * n)
    # Losses from logits that a peer has, on a GPU, or a user's formula.
    for model in models if gpu else models[:1]:
        for divergence in ("jensen_shannon", "reverse_kl"):
            yield Workload(loss="mean", divergence=divergence, model=model, tokens=tokens[-1], dtype=dtypes[-1])


def scaling(device: str, models: list[str], tokens: list[int], dtypes: list[str]) -> Iterator[Workload]:
    """One thing at a time: tokens, vocabulary, share, threads."""
    of = Workload(model=models[-2] if len(models) > 1 else models[0], tokens=tokens[-1], dtype=dtypes[-1])
    found = [of.but(model=model) for model in models]
    found += [of.but(share=share) for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
    smaller = of.but(model=models[min(1, len(models) - 1)])
    n = 64
    while n <= 16 * tokens[-1]:
        found.append(smaller.but(tokens=n))
        n *= 2
    if device == "cpu":
        found += [of.but(threads=threads) for threads in (1, 2)]
    yield from dict.fromkeys(found)
