"""A student whose head is split over processes along the vocabulary, with the loss computed on the parts.

    torchrun --nproc-per-node 2 examples/vocab_parallel.py

Each process holds some rows of the heads of student and teacher, and sees the same batches. The embedding and the body
of both models are whole everywhere. No logits are sent: for each token a dozen numbers go from each process to the
others, and all come to the same loss, bit for bit. Shown are the losses of every process. Both ways are taken in turn:
from hidden states, without the logits of a batch, and from logits that are split.

Random models and random text, on the CPU (gloo); on GPUs, only device and back end change.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from adakd_kernels import AdaKDLoss

VOCAB, BATCH, LENGTH = 1003, 4, 16


class TinyModel(nn.Module):
    """A language model of one recurrent layer, whose head is split over the mesh."""

    def __init__(self, hidden: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, hidden)
        self.body = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCAB, bias=False)
        # The logits stay where they are made. The head's input adds up the gradients of the processes.
        split = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(self, mesh, {"head": split})

    def hidden_states(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, H)."""
        states: Tensor = self.body(self.embedding(ids))[0]
        return states


def loss_of(
    loss_fn: AdaKDLoss, student: TinyModel, teacher: TinyModel, ids: Tensor, labels: Tensor, route: str
) -> Tensor:
    """The loss of a batch, from hidden states and heads or from logits."""
    hidden = student.hidden_states(ids)
    with torch.no_grad():
        teacher_hidden = teacher.hidden_states(ids)
        teacher_logits = teacher.head(teacher_hidden) if route == "logits" else None
    if teacher_logits is not None:
        return loss_fn(student.head(hidden), teacher_logits, labels).loss
    weights = student.head.weight, teacher.head.weight
    # The head is not called, so that the loss adds up the gradients of the hidden states.
    return loss_fn.from_hidden(hidden, weights[0], teacher_hidden, weights[1], labels, reduce_hidden=True).loss


def main(argv: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """Train on both ways; returns and prints the losses: of each step those of every process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each way (%(default)s)")
    options = parser.parse_args(argv)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    losses: dict[str, list[list[float]]] = {}
    for route in ("hidden", "logits"):
        torch.manual_seed(0)  # on all processes the same models and batches
        student, teacher = TinyModel(32, mesh), TinyModel(48, mesh).requires_grad_(False)
        loss_fn = AdaKDLoss(divergence="reverse_kl", focus=0.5, ce_weight=0.1)
        # Some parameters are split and others are not, which Adam's faster way refuses.
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, foreach=False)
        losses[route] = []
        for step in range(options.steps):
            ids = torch.randint(VOCAB, (BATCH, LENGTH + 1))
            loss = loss_of(loss_fn, student, teacher, ids[:, :-1], ids[:, 1:], route)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_fn.step()
            everywhere: list[float] = [0.0] * dist.get_world_size()
            dist.all_gather_object(everywhere, loss.item())
            losses[route].append(everywhere)
            if dist.get_rank() == 0:
                shown = "  ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(everywhere))
                print(f"from {route}, step {step + 1}  {shown}", flush=True)
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort while the interpreter shuts down
