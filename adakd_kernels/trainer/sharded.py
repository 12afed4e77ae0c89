"""Models whose weights are not whole in this process: split by FSDP2 or ZeRO-3, spread over devices, or streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as transformers_deepspeed

from ..checks import is_dtensor
from .adapters import OwnBase
from .heads import base_model, instead_of_head, is_fully_sharded, output_head

__all__ = [
    "FSDP_NEEDS_AN_ACCELERATOR",
    "WholeHead",
    "adopt_fully_sharded",
    "asks_for_fsdp",
    "can_run",
    "check_teacher_parallel",
    "fsdp_plugin",
    "is_placed",
    "is_split",
    "load_teacher",
    "reshard",
    "shard_teacher",
    "whole_head",
]

FSDP_NEEDS_AN_ACCELERATOR = (
    "FSDP is asked for, but accelerate turns it on for accelerators only: on this CPU each process trains a whole "
    "student (DDP). Call torch.distributed.fsdp.fully_shard on the student before AdaKDTrainer gets it, or set "
    "fsdp=False"
)


class WholeHead(NamedTuple):
    """The parameters of an output layer in one piece."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


def is_zero3(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split the parameters of a model over the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def is_split(model: nn.Module) -> bool:
    """Whether the parameters of a model are split over processes by FSDP2 or ZeRO-3."""
    return any(map(is_fully_sharded, model.modules())) or is_zero3(model)


def reshard(model: nn.Module) -> None:
    """Put what FSDP2 has together in this process back to parts: after a forward alone, a root unit stays whole."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def is_placed(model: nn.Module) -> bool:
    """Whether something has decided where the weights of a model are, so that nobody else may move them."""
    return (
        getattr(model, "hf_device_map", None) is not None
        or bool(getattr(model, "is_quantized", False))
        or any(hasattr(module, "_hf_hook") for module in model.modules())
        or is_split(model)
    )


def can_run(model: nn.Module) -> bool:
    """Whether a forward of the model itself works now, if all processes that share it run it."""
    if is_zero3(model):
        # The hooks that put the weights together come with the engine, which is made when the training begins.
        return bool(model._forward_pre_hooks)
    streamed = any(hasattr(module, "_hf_hook") for module in model.modules())
    return streamed or not any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def whole_head(model: Any, hidden: Tensor) -> WholeHead:
    """The head of a frozen `model` in one piece, where `hidden` (B, K, H) is and in a type that fits it.

    Outside the model's own forward, its weight may be a part that FSDP2 or ZeRO-3 left here, empty, or on another
    device. All processes that share a split model must call this together.
    """
    head = output_head(model)
    parameters: list[Any] = [head.weight, head.bias]
    if hasattr(head.weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in parameters if p is not None]):
            parameters = [None if p is None else p.detach().clone() for p in parameters]
    elif hasattr(head, "_hf_hook"):
        seen: list[list[Any]] = []

        def keep(rows: Tensor) -> Tensor:
            seen.append([head.weight, head.bias])
            return rows

        with instead_of_head(head, keep):
            head(hidden.flatten(0, -2)[:0])
        (parameters,) = seen
    return WholeHead(*(None if p is None else _in_one_piece(p, hidden) for p in parameters))  # type: ignore[arg-type]


def _in_one_piece(parameter: Any, hidden: Tensor) -> Tensor:
    """The whole parameter; where autocast does not choose a type, in that of the hidden states."""
    autocast = torch.is_autocast_enabled(hidden.device.type)
    parameter = parameter.detach() if autocast else parameter.detach().to(hidden.dtype)
    if is_dtensor(parameter):
        parameter = parameter.to(hidden.device).full_tensor()  # FSDP2 may keep the parts in CPU memory
    whole: Tensor = parameter.to(hidden.device)
    return whole


def asks_for_fsdp(args: Any) -> bool:
    """Whether the options, or those of `accelerate launch`, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def fsdp_plugin(args: Any) -> FullyShardedDataParallelPlugin:
    """Accelerate's options of FSDP2: those of `args`, or what leaves a student as `fully_shard` made it."""
    given = args.fsdp_plugin_args or {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
    return FullyShardedDataParallelPlugin(**given)


def adopt_fully_sharded(accelerator: Any, plugin: FullyShardedDataParallelPlugin) -> None:
    """Have accelerate train a student as FSDP2 that `fully_shard` has wrapped on a CPU.

    On accelerators it does so where it is given the plugin. On a CPU it would wrap the student for DDP, which refuses
    DTensors. Its way with FSDP2 (accumulation, clipping, checkpoints) does not depend on the device.
    """
    for state in (PartialState(), accelerator.state):  # the second takes up what the first says, again and again
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def load_teacher(name: str | Path, teacher_parallel: str = "none", dtype: Any = "auto", **options: Any) -> Any:
    """The teacher in a folder or under a name, by default in the type it was saved in.

    Where it is to be split, each process reads its part alone, if transformers knows how.

    Args:
        name: what `from_pretrained` takes.
        teacher_parallel: the option of `AdaKDConfig`.
        dtype: the type of its weights.
        **options: further ones of `from_pretrained`.

    Raises:
        OSError: it is not found.
    """
    load = partial(AutoModelForCausalLM.from_pretrained, name, dtype=dtype, **options)
    if teacher_parallel == "zero3":
        return load()  # where the student has ZeRO-3 too, transformers splits what it loads
    if teacher_parallel == "fsdp" and _processes() > 1:
        # Here, so that a transformers without it runs everything else.
        from transformers.distributed.configuration_utils import DistributedConfig

        try:
            return load(distributed_config=DistributedConfig(fsdp_size=_processes()))
        except ValueError as error:
            if "fsdp_plan" not in str(error):  # transformers does not know the units of this architecture
                raise
    with _not_split_by_zero3():
        return load()


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def _not_split_by_zero3() -> Iterator[None]:
    """Models that are loaded meanwhile are whole, where a student's ZeRO-3 would have `from_pretrained` split them."""
    reference = transformers_deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    transformers_deepspeed.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if config is not None:
            transformers_deepspeed.set_hf_deepspeed_config(config)


def check_teacher_parallel(kind: str, teacher: nn.Module, tensor_parallel: bool) -> None:
    """Refuse a teacher that cannot be split as `teacher_parallel` says.

    Raises:
        ValueError: with the reason, and what to set instead.
    """
    got = f"teacher_parallel={kind!r}"
    if not is_zero3(teacher) and not can_run(teacher):
        raise ValueError(
            "the teacher has no weights on this process (its parameters are on the device 'meta'): load them, and turn "
            "FSDP's cpu_ram_efficient_loading off meanwhile, which loads them on one process alone"
        )
    if kind in ("none", "tp"):
        if is_zero3(teacher) and not can_run(teacher):
            raise ValueError(
                "the teacher was loaded while ZeRO-3 was on, so its weights are split over the processes: set "
                "teacher_parallel='zero3', or give the teacher as a folder or name"
            )
        return
    if isinstance(teacher, OwnBase):
        raise ValueError(
            f"{got} splits a teacher of its own, but the student's base teaches: give a teacher, or set 'none'"
        )
    if _processes() == 1:
        raise ValueError(
            f"{got} splits the teacher over processes, but there is one: start more with torchrun or accelerate "
            "launch, or set 'none'"
        )
    if tensor_parallel:
        raise ValueError(f"{got} does not go with a student under tensor parallelism: set 'tp' or 'none'")
    split_as_asked = is_zero3(teacher) if kind == "zero3" else any(map(is_fully_sharded, teacher.modules()))
    if is_placed(teacher) and not split_as_asked:
        raise ValueError(
            f"{got} splits the teacher, but its weights are placed already (device_map, quantization, hooks of "
            "accelerate, or another way of splitting): load it without, or set 'none'"
        )


def shard_teacher(kind: str, teacher: Any, student: nn.Module, accelerator: Any) -> Any:
    """Split a frozen teacher over the processes of a data-parallel student.

    Args:
        kind: 'fsdp' or 'zero3'.
        teacher: the teacher, whole, or split this way already.
        student: where `fully_shard` has wrapped it, its mesh is taken; elsewhere all processes.
        accelerator: accelerate's, which knows the mesh of a student that is wrapped later.

    Returns:
        What must live as long as the teacher: the engine of DeepSpeed, or None.
    """
    if kind == "zero3":
        return None if can_run(teacher) and is_zero3(teacher) else _zero3_engine(teacher)
    if not any(map(is_fully_sharded, teacher.modules())):
        _fully_shard(teacher, _mesh(student, accelerator))
    return None


def _mesh(student: nn.Module, accelerator: Any) -> Any:
    """The mesh over which the student is split, or will be; elsewhere one of all processes."""
    for parameter in student.parameters():
        if is_dtensor(parameter):
            return parameter.device_mesh  # type: ignore[attr-defined]
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None and accelerator.parallelism_config.fsdp_dim_names:
        return mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    return init_device_mesh(accelerator.device.type, (_processes(),))


def _fully_shard(teacher: Any, mesh: Any) -> None:
    """Each layer is a unit, and so is what is left. All of them give their weights back after the forward."""
    from torch.distributed.fsdp import fully_shard

    layers = getattr(base_model(teacher), "_no_split_modules", None) or ()
    for module in list(teacher.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(teacher, mesh=mesh, reshard_after_forward=True)


def _zero3_engine(teacher: nn.Module) -> Any:
    """The engine of DeepSpeed that splits the teacher for inference.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("teacher_parallel='zero3' needs DeepSpeed: pip install deepspeed") from error
    dtype = next(teacher.parameters()).dtype
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    engine, *_ = deepspeed.initialize(model=teacher, config=config)
    return engine
