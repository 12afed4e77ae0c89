"""What `test_vocab_ranks.py` runs in four processes: `python -m tests.vocab_process FOLDER`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from adakd_kernels import VocabParallel, adakd_loss, linear_adakd_loss, token_difficulty, token_divergence

from .cases import logits, tokens

RANKS = 4
VOCAB, HIDDEN = 83, 8
TOKENS = 30
CUTS = {2: (0, 50, VOCAB), 3: (0, 9, 9, VOCAB), 4: (0, 40, 41, 80, VOCAB)}
OPTIONS = {"focus_ratio": 0.6, "ce_weight": 0.2}
NAMES = ("reverse_kl", "jeffreys", "jensen_shannon")


class Collectives(TorchDispatchMode):
    """The names of the collectives, and how many numbers this rank gives to each."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            given = args[1] if "allgather" in func.__name__ else args[0]
            given = given if isinstance(given, Tensor) else given[0]
            self.sent.append((func.__name__, given.numel()))
        return func(*args, **(kwargs or {}))


def batch() -> dict[str, Tensor]:
    """The same on all ranks."""
    labels = tokens(VOCAB, TOKENS, seed=5)
    labels[7:9] = -100
    return {
        "student": logits(TOKENS, VOCAB, seed=1), "teacher": logits(TOKENS, VOCAB, seed=2), "labels": labels,
        "hidden": logits(TOKENS, HIDDEN, seed=3, scale=1.0),
        "teacher_hidden": logits(TOKENS, HIDDEN, seed=4, scale=1.0),
        "weight": logits(VOCAB, HIDDEN, seed=6), "teacher_weight": logits(VOCAB, HIDDEN, seed=7),
        "bias": logits(VOCAB, seed=8),
    }  # fmt: skip


def measured(function: Any, *leaves: Tensor) -> dict[str, Any]:
    """Results and gradients, and what was sent forward and backward."""
    forward, backward = Collectives(), Collectives()
    with forward:
        out = function()
    with backward:
        out.loss.backward()
    grads = [leaf.grad for leaf in leaves]
    return {
        "out": [x.detach() for x in out], "forward": forward.sent, "backward": backward.sent,
        "grads": [g.full_tensor() if isinstance(g, DTensor) else g for g in grads],
    }  # fmt: skip


def of_local_shards(group: Any, divergence: str) -> dict[str, Any]:
    """Both routes on shards of unequal sizes."""
    cuts, rank, of = CUTS[dist.get_world_size(group)], dist.get_rank(group), batch()
    columns, parallel = slice(cuts[rank], cuts[rank + 1]), VocabParallel(group, cuts[rank], VOCAB)
    student = of["student"][:, columns].clone().requires_grad_()
    leaves = [x.clone().requires_grad_() for x in (of["hidden"], of["weight"][columns], of["bias"][columns])]
    return {
        "logits": measured(
            lambda: adakd_loss(
                student, of["teacher"][:, columns], of["labels"], divergence=divergence, vocab_parallel=parallel,
                **OPTIONS,
            ),
            student,
        ),
        "hidden": measured(
            lambda: linear_adakd_loss(
                leaves[0], leaves[1], of["teacher_hidden"], of["teacher_weight"][columns], of["labels"],
                student_bias=leaves[2], divergence=divergence, chunk_tokens=16, vocab_parallel=parallel,
                reduce_hidden=True, **OPTIONS,
            ),
            *leaves,
        ),
    }  # fmt: skip


def of_dtensors(mesh: Any, divergence: str) -> dict[str, Any]:
    """Both routes on DTensors, which say alone where they lie."""
    of = batch()

    def split(name: str, placement: Any) -> Any:
        return distribute_tensor(of[name].clone(), mesh, [placement])

    student = split("student", Shard(1)).requires_grad_()
    weight, bias = split("weight", Shard(0)).requires_grad_(), split("bias", Shard(0)).requires_grad_()
    plain, spread = of["hidden"].clone().requires_grad_(), split("hidden", Replicate()).requires_grad_()
    teacher, teacher_weight = split("teacher", Shard(-1)), split("teacher_weight", Shard(0))

    def from_hidden(hidden: Tensor) -> Any:
        return linear_adakd_loss(
            hidden, weight, of["teacher_hidden"], teacher_weight, of["labels"], student_bias=bias,
            divergence=divergence, **OPTIONS,
        )  # fmt: skip

    with torch.no_grad():
        each = token_divergence(student, teacher, 2.0, divergence)
        difficulty = token_difficulty(student, teacher)
    found = {
        "logits": measured(
            lambda: adakd_loss(student, teacher, of["labels"], divergence=divergence, **OPTIONS),
            student,
        ),
        "hidden": measured(lambda: from_hidden(spread), spread, weight, bias),
        "values": (each, difficulty),
    }
    weight.grad = bias.grad = None
    from_hidden(plain).loss.backward()
    part = plain.grad.clone()
    dist.all_reduce(part, group=mesh.get_group())
    found["sum of the parts"] = part
    return found


def errors(mesh: Any) -> list[str]:
    """What is said of DTensors that do not fit."""
    of, said = batch(), []

    def split(values: Tensor, placement: Any) -> Any:
        return distribute_tensor(values, mesh, [placement])

    columns, leaf = split(of["student"], Shard(1)), split(of["student"], Shard(1)).requires_grad_()
    own, rank = CUTS[RANKS], dist.get_rank()
    uneven = DTensor.from_local(
        of["student"][:, own[rank] : own[rank + 1]].contiguous(), mesh, [Shard(1)], shape=(TOKENS, VOCAB),
        stride=(VOCAB, 1),
    )  # fmt: skip
    weight, labels = split(of["weight"], Shard(0)), split(of["labels"], Replicate())
    modules = [nn.Linear(HIDDEN, VOCAB).requires_grad_(False) for _ in range(2)]
    for module, local in zip(modules, (False, True), strict=True):
        parallelize_module(module, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=local))
    heads = (of["teacher_hidden"], weight, of["labels"])
    for call in (
        lambda: token_divergence(columns, of["teacher"]),
        lambda: token_divergence(columns, split(of["teacher"], Shard(0))),
        lambda: token_divergence(columns, split(torch.cat((of["teacher"], of["teacher"]), 1), Shard(1))),
        lambda: token_divergence(columns, columns, vocab_parallel=VocabParallel(None, 0, VOCAB)),
        lambda: token_divergence(of["student"], of["teacher"], vocab_parallel=VocabParallel("world", 0, VOCAB)),
        lambda: token_divergence(uneven, columns),
        lambda: token_divergence(leaf, columns, inplace=True),
        lambda: adakd_loss(leaf[:, :], columns, of["labels"], inplace=True),
        lambda: adakd_loss(columns, columns, labels),
        lambda: token_difficulty(columns, columns, labels != -100),
        lambda: adakd_loss(columns, columns, of["labels"], num_items=(labels != -100).sum()),
        lambda: linear_adakd_loss(split(of["hidden"], Replicate()), weight, *heads, reduce_hidden=True),
        *(
            partial(linear_adakd_loss, of["hidden"], module, of["teacher_hidden"], of["teacher_weight"], of["labels"])
            for module in modules
        ),
    ):
        try:
            call()
            said.append("nothing")
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for size in CUTS:
        # Every process takes part in making every group and mesh.
        group = dist.new_group(list(range(size)))
        if rank < size:
            found = {name: of_local_shards(group, name) for name in NAMES}
            torch.save(found, folder / f"local.{size}.rank{rank}.pt")
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {name: of_dtensors(mesh, name) for name in NAMES}
    torch.save({**found, "errors": errors(mesh)}, folder / f"dtensors.rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
