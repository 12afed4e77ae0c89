"""What `test_scale.py` runs in two processes: `python -m tests.scale_process FOLDER`.

The folder has the snippets of docs/scale.md, whose assertions hold on any number of processes, as `page.py`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from adakd_kernels import linear_adakd_loss
from instruments.devices import Cpu

ROOT = Path(__file__).parent.parent
TOKENS, WIDTHS = 6, (64, 256)


class Received(TorchDispatchMode):
    """Bytes that a rank receives from the collectives that it takes part in, each done with as few as it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        others = ("wait_tensor", "_wrap_tensor_autograd")  # send nothing
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith(others):
            whole = max(tensor.nbytes for tensor in tensors_of(args))
            if "all_gather_into_tensor" in func.__name__:  # it is given its part alone
                whole *= dist.get_world_size()
            times = 2 if "allreduce" in func.__name__ or "all_reduce" in func.__name__ else 1
            self.bytes += times * whole * (dist.get_world_size() - 1) / dist.get_world_size()
        return func(*args, **(kwargs or {}))


def tensors_of(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    return [x for arg in args for x in tensors_of(arg)] if isinstance(args, (list, tuple)) else []


class Decoder(nn.Module):
    """Embedding, head, and layers of two pairs of products, each of which adds to the hidden states."""

    def __init__(self, vocab: int, hidden: int, inner: int, layers: int = 4) -> None:
        super().__init__()

        def pair() -> nn.Module:
            return nn.Sequential(nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False))

        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(nn.ModuleList(pair() for _ in range(2)) for _ in range(layers))
        self.head = nn.Linear(hidden, vocab, bias=False)

    def states(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(ids)
        for layer in self.layers:
            for pair in layer:  # type: ignore[attr-defined]
                hidden = hidden + pair(hidden)
        return hidden

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.states(ids)).logsumexp(-1).sum()  # type: ignore[no-any-return]

    def sizes(self) -> dict[str, int]:
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "root": self.embedding.weight.numel() + self.head.weight.numel(),
            "layer": sum(p.numel() for p in self.layers[0].parameters()),
        }


class Layer(nn.Module):
    """The pairs of a layer as one call, which `fully_shard` needs."""

    def __init__(self, pairs: nn.ModuleList) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, hidden: Tensor) -> Tensor:
        for pair in self.pairs:
            hidden = hidden + pair(hidden)
        return hidden


class Stack(nn.Module):
    """`Decoder` whose layers are called."""

    def __init__(self, of: Decoder) -> None:
        super().__init__()
        self.embedding, self.head = of.embedding, of.head
        self.layers = nn.ModuleList(map(Layer, of.layers))  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden).logsumexp(-1).sum()  # type: ignore[no-any-return]


def held(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of the parts that are here of weights, gradients and optimizer state."""
    kept = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
    if optimizer is not None:
        kept += [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in kept)


def trained(model: nn.Module, peak: bool = False) -> dict[str, float]:
    """What a step of AdamW receives, and what is held after it; with `peak` the most that it holds."""
    ids, optimizer = torch.arange(TOKENS), torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(ids).backward()
        optimizer.step()

    step()
    with Received() as received:
        step()
    found = {"received": received.bytes, "state": held(model, optimizer)}
    if peak:
        optimizer.zero_grad()
        found["peak"] = held(model, optimizer) + Cpu().peak_bytes(step)
    return found


def fsdp(vocab: int, hidden: int, inner: int, peak: bool = False) -> dict[str, Any]:
    """A student, and a teacher, of which each layer is a unit and the rest another one, over the world's ranks."""
    decoder = Decoder(vocab, hidden, inner)
    found: dict[str, Any] = {"sizes": decoder.sizes()}
    student, teacher = Stack(decoder), Stack(Decoder(vocab, hidden, inner)).requires_grad_(False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for model in (student, teacher):
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)  # what accelerate says, of the root unit too
    found["student"] = trained(student, peak)

    @torch.no_grad()
    def teach() -> None:
        teacher(torch.arange(TOKENS))

    with Received() as received:
        teach()
    with Received() as of_head:
        teacher.head.weight.full_tensor()  # type: ignore[operator]
    found["teacher"] = {"received": received.bytes, "head": of_head.bytes}
    if peak:
        found["teacher"]["peak"] = held(teacher) + Cpu().peak_bytes(teach)
    return found


def ddp(vocab: int, hidden: int, inner: int) -> dict[str, Any]:
    """DDP, whose buckets are there when it is made; sending the weights then would take memory as well."""
    decoder = Decoder(vocab, hidden, inner)
    made: list[nn.Module] = []
    buckets = Cpu().peak_bytes(lambda: made.append(nn.parallel.DistributedDataParallel(decoder, init_sync=False)))
    return {"sizes": decoder.sizes(), "buckets": buckets, **trained(made[0])}


def tensor_parallel(vocab: int, hidden: int, inner: int) -> dict[str, Any]:
    """Layers split as Megatron splits them, and the loss over a vocabulary in parts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = [Decoder(vocab, hidden, inner), Decoder(vocab, hidden, inner).requires_grad_(False)]
    plan: dict[str, Any] = {f"layers.*.{i}.0": ColwiseParallel() for i in range(2)}
    plan |= {f"layers.*.{i}.1": RowwiseParallel() for i in range(2)}
    student, teacher = (parallelize_module(model, mesh, {**plan, "head": ColwiseParallel()}) for model in models)
    ids = torch.arange(TOKENS)
    with Received() as of_teacher, torch.no_grad():
        teacher_hidden = teacher.states(ids)
    with Received() as of_student:
        hidden = student.states(ids)
    with Received() as of_loss:
        out = linear_adakd_loss(
            hidden, student.head.weight, teacher_hidden, teacher.head.weight, torch.arange(TOKENS), reduce_hidden=True
        )
    with Received() as backward:
        out.loss.backward()
    return {
        "layers": len(models[0].layers), "teacher": of_teacher.bytes,
        "student and loss": of_student.bytes + of_loss.bytes + backward.bytes,
    }  # fmt: skip


def main(folder: Path) -> None:
    # A copy of this process is the second rank, so that torch is imported once.
    other = os.fork()
    rank = "0" if other else "1"
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    runpy.run_path(str(folder / "page.py"))  # makes the process group
    kinds = (("fsdp", fsdp), ("ddp", ddp), ("tp", tensor_parallel))
    found: dict[str, Any] = {name: kind(200, *WIDTHS) for name, kind in kinds}
    found["example"] = runpy.run_path(str(ROOT / "examples" / "vocab_parallel.py"))["main"](["--steps", "3"])
    torch.save(found, folder / f"scale.rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    if other:
        os.waitpid(other, 0)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort while the interpreter shuts down, when all results are written


if __name__ == "__main__":
    main(Path(sys.argv[1]))
