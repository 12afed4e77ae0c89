"""`VocabParallel`: logits or heads of which each rank has some columns of the vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .checks import check_integer, is_dtensor

__all__ = ["VocabParallel"]


class VocabParallel(NamedTuple):
    """Which columns of the vocabulary the logits of this rank are.

    The ranks of a group hold the vocabulary between them, each a run of consecutive columns, without gap or overlap;
    one may hold none. All of them call the loss with the same labels and options, and get the same loss, temperatures
    and selection, bit for bit. Each gets the gradient of its own columns.

    Attributes:
        group: the process group; None for that of all processes.
        first: index in the vocabulary of this rank's first column, of student and teacher alike.
        vocab_size: number of common entries of the whole vocabulary, min(Vˢ, Vᵗ). Columns of the student from there on
            get gradient 0.

    Example:
        >>> VocabParallel(group=None, first=0, vocab_size=100).first
        0
    """

    group: Any
    first: int
    vocab_size: int

    @property
    def rank(self) -> int:
        """Which rank of the group this is."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        return dist.get_world_size(self.group)

    def gather(self, numbers: Tensor) -> Tensor:
        """(k, B, L) numbers of this rank -> (ranks, k, B, L) of all, in their order."""
        gathered = numbers.new_empty(self.ranks * len(numbers), *numbers.shape[1:])
        # The name since torch 2.13, and before.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, numbers.contiguous(), group=self.group)
        return gathered.view(self.ranks, *numbers.shape)

    def add_up(self, values: Tensor) -> None:
        """Replace values by their sums over the ranks."""
        dist.all_reduce(values, group=self.group)

    def local(self, labels: Tensor) -> Tensor:
        """Labels as indices of this rank's columns; those of other ranks are outside of them."""
        return labels - self.first

    def common(self, student: int, teacher: int, name: str) -> int:
        """How many of these numbers of columns are common.

        Raises:
            ValueError: the shards of the two models have different common columns.
        """
        left = max(0, self.vocab_size - self.first)
        common, of_teacher = min(student, left), min(teacher, left)
        if common != of_teacher:
            raise ValueError(
                f"student_{name} and teacher_{name} must hold the same columns of the vocabulary, got {student} and "
                f"{teacher} from entry {self.first} on, of {self.vocab_size} common ones: split both models alike"
            )
        return common


def check_vocab_parallel(value: Any) -> None:
    """Refuse what does not say which columns of the vocabulary this rank has."""
    if not isinstance(value, VocabParallel):
        raise TypeError(f"vocab_parallel must be a VocabParallel, got {type(value).__name__}")
    check_integer("vocab_parallel.first", value.first, least=0)
    check_integer("vocab_parallel.vocab_size", value.vocab_size, least=1)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("vocab_parallel needs a process group: call torch.distributed.init_process_group first")
    if value.group is not None and not isinstance(value.group, dist.ProcessGroup):
        raise TypeError(
            f"vocab_parallel.group must be a process group or None, got {type(value.group).__name__}; of a device mesh "
            "take mesh.get_group()"
        )
    if value.rank < 0:
        raise ValueError("vocab_parallel.group must be a group that this process is part of")


def local_shards(
    student: Any, teacher: Any, vocab_parallel: VocabParallel | None, name: str, dim: int = -1
) -> tuple[Any, Any, VocabParallel | None]:
    """The local shards of DTensors whose dimension `dim` is the vocabulary, and where they lie in it.

    Other values are returned as they are. `name` is 'logits' or 'weight'.

    Raises:
        TypeError, ValueError: one of the two is no DTensor, or they are not split alike along the vocabulary.
    """
    if vocab_parallel is not None:
        check_vocab_parallel(vocab_parallel)
    if not (is_dtensor(student) or is_dtensor(teacher)):
        return student, teacher, vocab_parallel
    if vocab_parallel is not None:
        raise TypeError(f"vocab_parallel must be None where {name} are DTensors, which say where they lie")
    sides = {f"student_{name}": student, f"teacher_{name}": teacher}
    for side, value in sides.items():
        if not is_dtensor(value):
            raise TypeError(f"{side} must be a DTensor as the other one is, got {type(value).__name__}")
        split = value.dim() + dim if dim < 0 else dim
        if value.device_mesh.ndim != 1 or not value.placements[0].is_shard(split):
            raise ValueError(
                f"{side} must be a DTensor on a mesh of one dimension, split along the vocabulary (Shard({split})), "
                f"got placements {tuple(value.placements)}: call redistribute, or pass local shards with vocab_parallel"
            )
    if student.device_mesh != teacher.device_mesh:
        raise ValueError(f"teacher_{name} must be on the device mesh of student_{name}: {student.device_mesh}")
    mesh, sizes = student.device_mesh, [value.shape[dim] for value in (student, teacher)]
    # DTensor gives every rank but the last ones this many columns.
    steps = [-(-size // mesh.size()) for size in sizes]
    if steps[0] != steps[1]:
        raise ValueError(
            f"student_{name} and teacher_{name} must be split at the same entries of the vocabulary, but {sizes[0]} "
            f"and {sizes[1]} entries over {mesh.size()} ranks are {steps[0]} and {steps[1]} each: split the teacher's "
            "anew, once, and pass local shards with vocab_parallel"
        )
    rank, shards = mesh.get_local_rank(), [value.to_local() for value in sides.values()]
    for side, shard, size in zip(sides, shards, sizes, strict=True):
        expected = max(0, min(steps[0], size - rank * steps[0]))
        if shard.shape[dim] != expected:  # `from_local` takes what it is given
            raise ValueError(
                f"{side} must have here the {expected} of {size} entries that Shard gives rank {rank} of "
                f"{mesh.size()}, got {shard.shape[dim]}: call distribute_tensor, or pass local shards with "
                "vocab_parallel"
            )
    return *shards, VocabParallel(mesh.get_group(), rank * steps[0], min(sizes))


def local_part(name: str, value: Any, split: bool, expected: str, dim: int | None = None) -> Any:
    """What is here of a DTensor that is split along `dim`, or whole on every rank; other values as they are.

    The gradient of a whole one is each rank's part of it, which DTensor adds up.

    Raises:
        ValueError: another placement, or a DTensor beside a head that is not `split`.
    """
    if not is_dtensor(value):
        return value
    fits = value.placements[0].is_replicate() if dim is None else value.placements[0].is_shard(dim)
    if not split or value.device_mesh.ndim != 1 or not fits:
        raise ValueError(
            f"{name} must be {expected} where it is a DTensor, beside a weight that is split along the vocabulary, got "
            f"placements {tuple(value.placements)}: call redistribute or to_local"
        )
    if dim is not None:
        return value.to_local()
    from torch.distributed.tensor import Partial

    return value.to_local(grad_placements=[Partial()])
