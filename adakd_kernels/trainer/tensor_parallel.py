"""Models that `from_pretrained` has split over processes by a tensor-parallel plan: heads, loading, checkpoints.

transformers keeps such weights as DTensors. A head is split along the vocabulary (`Shard(0)`) over a mesh of one
dimension, and its forward gathers the logits. The hidden route takes this rank's rows of both heads instead, and the
losses over a vocabulary in parts (docs/maths.md). All ranks of a mesh read the same records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import linear

from ..vocab_parallel import VocabParallel
from .heads import NoPlainHeadError, base_model, output_head

__all__ = [
    "HeadParts",
    "check_adapters",
    "check_gathers",
    "check_ranks",
    "check_split_head",
    "load_optimizer",
    "load_weights",
    "save_optimizer",
    "split_as",
    "split_over",
    "tensor_parallel_size",
]

OPTIMIZER = "optimizer_parts"
"""Folder of a checkpoint with each rank's part of the optimizer's state, which any number of ranks can read."""
BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)
"""Options beside each parameter's state, because `Trainer` groups the parameters of a split model in another way."""


def tensor_parallel_size(model: Any) -> int:
    """Over how many tensor-parallel ranks `from_pretrained` has split a model; 1 for a whole one."""
    return int(getattr(base_model(model), "_tp_size", None) or 1)


def split_over(ranks: int) -> dict[str, Any]:
    """What `from_pretrained` takes besides to split a model over `ranks` by the plan of its class; nothing for 1."""
    if ranks == 1:
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def split_as(student: Any, teacher_parallel: str) -> dict[str, Any]:
    """What `from_pretrained` of the teacher takes besides, as `teacher_parallel` asks for it.

    Raises:
        ValueError: the teacher is to be split as the student is, which is whole.
    """
    if teacher_parallel != "tp":
        return {}
    if tensor_parallel_size(student) == 1:
        raise ValueError(
            "teacher_parallel='tp' splits the teacher over the ranks of the student, but the student is whole: set "
            "tp_size, or load the student with distributed_config=DistributedConfig(tp_size=...)"
        )
    return split_over(tensor_parallel_size(student))


def check_ranks(student: Any, teacher: Any, args: Any) -> None:
    """Refuse models that are split in another way than the options say, or than each other, or in two ways.

    Raises:
        ValueError: one of these.
    """
    own, others = tensor_parallel_size(student), tensor_parallel_size(teacher)
    cure = "give its folder or name, or load it with distributed_config=DistributedConfig(tp_size=...)"
    for role, model in (("student", student), ("teacher", teacher)):
        parallel = getattr(getattr(base_model(model), "config", None), "distributed_config", None)
        if tensor_parallel_size(model) > 1 and getattr(parallel, "dp_size", 1) > 1:
            raise ValueError(
                f"{role} is split by tensor parallelism and by FSDP (fsdp_size or dp_replicate_size), which do not go "
                "together here: load it with a tp_size of all processes, or with FSDP alone"
            )
    if args.tp_size > 1 and own != args.tp_size:
        raise ValueError(f"tp_size is {args.tp_size}, but the model that is given is split over {own}: {cure}")
    if split_as(student, args.teacher_parallel) and others == 1:
        raise ValueError(f"teacher_parallel is 'tp', but the teacher that is given is whole: {cure}")
    if others not in (1, own):
        raise ValueError(
            f"teacher is split by tensor parallelism over {others} ranks, which must all read the same records, but "
            f"the student over {own}: load both with the same tp_size, or the teacher whole"
        )


def check_adapters(student: Any) -> None:
    """Refuse adapters on layers of a split model whose results are summed or gathered: peft adds its own before that.

    Raises:
        ValueError: there is one.
    """
    if tensor_parallel_size(student) == 1:
        return
    wrapped = [(name, module) for name, module in student.named_modules() if hasattr(module, "base_layer")]
    fits = {
        name: tuple(getattr(module.base_layer.weight, "placements", ())) == (Shard(0),)
        and module is not output_head(student)
        for name, module in wrapped
        if isinstance(module.base_layer, nn.Linear)
    }
    if not all(fits.values()):
        good, bad = (sorted({name.rpartition(".")[2] for name in fits if fits[name] is kind}) for kind in (True, False))
        raise ValueError(
            f"the adapter must be on layers that tensor parallelism splits by columns alone, got one on "
            f"{', '.join(bad)}: set lora_target_modules, or target_modules of the peft_config"
            + (f", to {' '.join(good)}" if good else "")
        )


def _mesh(head: nn.Linear) -> DeviceMesh | None:
    """The mesh over which a head is split; None for a whole one."""
    return head.weight.device_mesh if isinstance(head.weight, DTensor) else None


def check_gathers(role: str, model: Any) -> None:
    """Refuse a split model whose logits are those of a part of the vocabulary. All ranks call it together.

    Raises:
        ValueError: its head does not gather them.
    """
    head = output_head(model)
    mesh = _mesh(head) if tensor_parallel_size(model) > 1 and isinstance(head, nn.Linear) else None
    if mesh is not None and mesh.ndim == 1:
        logits = _tried(head)[0]
        if logits.shape[-1] != head.out_features:
            raise ValueError(
                f"{role} {type(base_model(model)).__name__} gives {logits.shape[-1]} of its {head.out_features} logits "
                "on this rank: plan its output layer as 'colwise_gather_output', not 'colwise'"
            )


def check_split_head(model: Any) -> None:
    """Refuse a head whose rows this rank cannot take as they are.

    All ranks call it together, and come to one judgement.

    Raises:
        NoPlainHeadError: it is split in another way than by rows over one mesh, or what its forward returns is not the
            product of states and all rows, gathered.
    """
    head: Any = output_head(model)
    mesh = _mesh(head)
    if mesh is None:
        if len(head.weight) != head.out_features:
            raise NoPlainHeadError(
                f"its head has {len(head.weight)} rows here for {head.out_features} logits, and no DTensor says which: "
                "load it with a transformers that splits models into DTensors (5.23 does)"
            )
        return
    if mesh.ndim != 1:
        names = " × ".join(map(str, mesh.mesh_dim_names or ()))
        raise NoPlainHeadError(f"its head is split over a mesh of {mesh.ndim} dimensions ({names})")
    if tuple(head.weight.placements) != (Shard(0),):
        raise NoPlainHeadError(f"its head is split as {head.weight.placements}, not along the vocabulary")
    logits, expected = _tried(head)
    first, count = rows_of_rank(head.out_features, mesh)
    error = (logits[..., first : first + count].double() - expected.double()).abs().sum()
    wrong = error > 8 * torch.finfo(expected.dtype).eps * expected.double().abs().sum()
    dist.all_reduce(wrong := wrong.int(), dist.ReduceOp.MAX, group=mesh.get_group())
    if wrong:
        raise NoPlainHeadError("what its split head returns is not the product of hidden states and weight, gathered")


@torch.no_grad()
def _tried(head: nn.Linear) -> tuple[Tensor, Tensor]:
    """What a split head gives for two hidden states, and what this rank's rows give."""
    rows = local_rows(head)
    states = torch.linspace(-1.0, 1.0, 2 * head.in_features, dtype=rows.weight.dtype, device=rows.weight.device)
    states = states.view(1, 2, head.in_features)
    return head(states), linear(states, *rows)


def rows_of_rank(rows: int, mesh: DeviceMesh, rank: int | None = None) -> tuple[int, int]:
    """Index of the first row, and number of rows, that `Shard(0)` gives a rank of a mesh, by default this one."""
    rank = mesh.get_local_rank() if rank is None else rank
    count, first = Shard.local_shard_size_and_offset(rows, mesh.size(), rank)
    return min(int(first), rows), int(count)


class HeadRows(NamedTuple):
    """Rows of an output layer."""

    weight: Tensor  # (rows, H)
    bias: Tensor | None  # (rows,)


def local_rows(head: Any) -> HeadRows:
    """The rows that this rank has; their gradients reach the head's parameters."""
    weight, bias = (x.to_local() if isinstance(x, DTensor) else x for x in (head.weight, head.bias))
    return HeadRows(weight, bias)


class HeadParts(NamedTuple):
    """The rows of both heads that this rank takes.

    They begin at the same entry of the vocabulary. The rows of the teacher's head follow the student's, and end with
    the last common entry.

    Attributes:
        vocab_parallel: which entries these are, for the losses; None where both heads are whole.
        end: the entry behind the last of the teacher's rows.
        moved: the teacher's rows where they had to come from other ranks: once, as it is frozen; else None.
    """

    vocab_parallel: VocabParallel | None = None
    end: int = 0
    moved: HeadRows | None = None

    @classmethod
    def of(cls, student_head: nn.Linear, teacher_head: nn.Linear, difficulty: str = "hellinger") -> HeadParts:
        """Decide which rows this rank takes; all ranks call it together.

        Raises:
            NoPlainHeadError: the teacher's head is split, and the student's is not; or the loss cannot measure this
                difficulty in parts of the vocabulary.
        """
        mesh, of_teacher = _mesh(student_head), _mesh(teacher_head)
        if mesh is None:
            if of_teacher is not None:
                raise NoPlainHeadError("the teacher's head is split over processes, and the student's is not")
            return cls()
        if difficulty == "jensen_shannon":
            raise NoPlainHeadError("of heads that are split, the loss cannot measure difficulty='jensen_shannon'")
        common = min(student_head.out_features, teacher_head.out_features)
        first, count = rows_of_rank(student_head.out_features, mesh)
        parts = cls(VocabParallel(mesh.get_group(), first, common), min(first + count, common))
        steps = {rows_of_rank(head.out_features, mesh, 0)[1] for head in (student_head, teacher_head)}
        if of_teacher is None or len(steps) == 1:
            return parts
        return parts._replace(moved=_move_rows(teacher_head, mesh, first, parts.end))

    @property
    def options(self) -> dict[str, Any]:
        """What the losses from hidden states take besides. The sum of the gradients is what the head's forward does."""
        return {} if self.vocab_parallel is None else {"vocab_parallel": self.vocab_parallel, "reduce_hidden": True}

    def student(self, head: nn.Linear) -> HeadRows:
        """This rank's rows of the student's head."""
        return local_rows(head)

    def teacher(self, head: Any) -> HeadRows:
        """The rows of the teacher's head that go with them; of a whole head, a view."""
        if self.moved is not None:
            return self.moved
        found = local_rows(head)
        if self.vocab_parallel is None or isinstance(head.weight, DTensor):
            return found
        rows = slice(self.vocab_parallel.first, max(self.vocab_parallel.first, self.end))
        return HeadRows(found.weight[rows], None if found.bias is None else found.bias[rows])


@torch.no_grad()
def _move_rows(head: nn.Linear, mesh: DeviceMesh, first: int, end: int) -> HeadRows:
    """Rows [first, end) of a split head, wherever they are. The ranks show their parts one after the other."""

    def rows_of(values: Tensor | None) -> Any:
        if values is None:
            return None
        rows = values.new_empty(max(0, end - first), *values.shape[1:])
        for rank in range(mesh.size()):
            begin, count = rows_of_rank(head.out_features, mesh, rank)
            own = rank == mesh.get_local_rank()
            part = values.contiguous() if own else values.new_empty(count, *values.shape[1:])
            dist.broadcast(part, group=mesh.get_group(), group_src=rank)
            a, b = max(first, begin), min(end, begin + count)
            if a < b:
                rows[a - first : b - first] = part[a - begin : b - begin]
        return rows

    return HeadRows(*map(rows_of, local_rows(head)))


def load_weights(model: Any, checkpoint: str | Path) -> None:
    """Put the weights of a checkpoint into a split model; each rank reads its part."""
    # By `from_pretrained`, which knows checkpoints in several files, renamed weights and tied ones.
    how = {"dtype": model.dtype, "distributed_config": model.config.distributed_config}
    saved = type(model).from_pretrained(checkpoint, **how)
    with torch.no_grad():
        for (name, parameter), value in zip(model.named_parameters(), saved.parameters(), strict=True):
            assert parameter.shape == value.shape, name
            local, new = (x.to_local() if isinstance(x, DTensor) else x for x in (parameter, value))
            local.copy_(new)
        for buffer, value in zip(model.buffers(), saved.buffers(), strict=True):
            buffer.copy_(value)


def save_optimizer(model: Any, optimizer: Any, checkpoint: str | Path) -> None:
    """Save the state of the optimizer of a split model; each rank writes its part."""
    state = get_optimizer_state_dict(model, _unwrapped(optimizer), options=BY_PARAMETER)
    save(state, checkpoint_id=Path(checkpoint) / OPTIMIZER)


def load_optimizer(model: Any, optimizer: Any, checkpoint: str | Path) -> bool:
    """Go on with what `save_optimizer` left, on any number of ranks; whether there is something.

    Raises:
        ValueError: the state is that of a whole model's optimizer, and this model is split.
    """
    if not (Path(checkpoint) / OPTIMIZER).is_dir():
        if tensor_parallel_size(model) > 1 and (Path(checkpoint) / "optimizer.pt").exists():
            raise ValueError(
                f"checkpoint {checkpoint} holds the optimizer of a whole model, which a model split by tensor "
                "parallelism cannot go on with: resume with tp_size=1, or start anew with the checkpoint as the model"
            )
        return False
    state = get_optimizer_state_dict(model, _unwrapped(optimizer), options=BY_PARAMETER)
    load(state, checkpoint_id=Path(checkpoint) / OPTIMIZER)
    set_optimizer_state_dict(model, _unwrapped(optimizer), state, options=BY_PARAMETER)
    return True


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
