"""Checks of what the public functions are given: the argument, what was expected, what came, the cure.

Nothing here reads the value of a tensor, which would wait for the device: a 0-d tensor in the place of a number is
checked for its shape and type.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .divergences import Divergence, get_divergence

DIFFICULTIES = ("hellinger", "forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy")
_INFINITY = float("inf")


def check_options(
    divergence: str | Divergence,
    focus_ratio: float | Tensor,
    temperature_scale: float,
    base_temperature: float,
    difficulty: str,
    ce_weight: float,
    ignore_index: int,
    num_items: float | Tensor | None = None,
    **flags: bool,
) -> Divergence:
    """Checks the options that do not depend on a tensor of the batch; returns the divergence that is meant."""
    div = get_divergence(divergence)
    check_difficulty(difficulty)
    check_range("focus_ratio", focus_ratio, 0.0, 1.0, "in (0, 1]", low_open=True)
    check_temperature_options(temperature_scale, base_temperature)
    if isinstance(ce_weight, Tensor):
        raise TypeError("ce_weight must be a number, got a tensor, whose value would have to be waited for")
    check_range("ce_weight", ce_weight, 0.0, 1.0, "in [0, 1]")
    check_integer("ignore_index", ignore_index)
    if num_items is not None:
        expected = "the number of valid tokens of the optimizer step, finite and >= 0"
        check_range("num_items", num_items, 0.0, _INFINITY, expected, high_open=True)
    for name, flag in flags.items():
        check_flag(name, flag)
    return div


def check_temperature_options(temperature_scale: float | Tensor, base_temperature: float | Tensor) -> None:
    """Refuse c and τ_base of equation (6) outside their ranges."""
    finite = "a finite number"
    check_range("temperature_scale", temperature_scale, -_INFINITY, _INFINITY, finite, low_open=True, high_open=True)
    check_range("base_temperature", base_temperature, 0.0, _INFINITY, "> 0", low_open=True, high_open=True)


def check_difficulty(difficulty: str) -> None:
    """Refuse what names no measure of difficulty."""
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty must be one of {', '.join(DIFFICULTIES)}, got {difficulty!r}")


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is spread over processes. Where nobody has imported DTensor, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_plain(name: str, value: Tensor) -> None:
    """Refuse a DTensor where each rank gives the same values."""
    if is_dtensor(value):
        raise TypeError(f"{name} must be a plain tensor, the same on all ranks, got a DTensor: pass its full_tensor()")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Refuse what is no int, or lies below `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: Any) -> None:
    """Refuse what is no int and no float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_range(
    name: str,
    value: float | Tensor,
    low: float,
    high: float,
    expected: str,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Refuse a number outside its range, and a tensor that cannot stand for a number."""
    if isinstance(value, Tensor):
        check_plain(name, value)
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got a tensor of shape {tuple(value.shape)}")
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a number or a 0-d tensor of a real type, got {value.dtype}")
        if value.requires_grad:
            raise ValueError(f"{name} requires grad, but it is a constant of the loss: pass {name}.detach()")
        return
    check_number(name, value)
    fits = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_pair(
    student: Tensor, teacher: Tensor, kind: str = "logits", *, shard: bool = False
) -> tuple[Tensor, Tensor, torch.Size]:
    """Student and teacher `kind`, 'logits' or 'hidden', as (B, L, …) without a copy, and the shape of the tokens.

    A `shard` of the vocabulary may have no entry.
    """
    size, entry = {"logits": ("V", "vocabulary entry"), "hidden": ("H", "feature")}[kind]
    for name, value in ((f"student_{kind}", student), (f"teacher_{kind}", teacher)):
        check_floating(name, value)
        if value.dim() not in (2, 3):
            raise ValueError(f"{name} must be (B, L, {size}) or (N, {size}), got shape {tuple(value.shape)}")
        if value.shape[-1] == 0 and not shard:
            raise ValueError(f"{name} must have at least one {entry}, got shape {tuple(value.shape)}")
        if value.stride(-1) != 1 and value.shape[-1] > 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {tuple(value.stride())}; "
                f"call {name}.contiguous(), which copies it"
            )
    check_constant(f"teacher_{kind}", teacher)
    batch = student.shape[:-1]
    if teacher.shape[:-1] != batch:
        raise ValueError(
            f"teacher_{kind} must have the student's shape {tuple(batch)} before the last dimension, "
            f"got {tuple(teacher.shape[:-1])}"
        )
    check_device(f"teacher_{kind}", teacher, student)
    if student.dim() == 2:
        return student.unsqueeze(0), teacher.unsqueeze(0), batch
    return student, teacher, batch


def check_floating(name: str, value: Tensor) -> None:
    """Refuse what is no tensor of fp16, bf16, fp32 or fp64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point() or value.element_size() < 2:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {value.dtype}")


def check_constant(name: str, value: Tensor) -> None:
    """Refuse a part of the teacher that requires grad."""
    if value.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the teacher is a constant of the loss: run it under torch.no_grad() or "
            f"pass {name}.detach()"
        )


def check_device(name: str, value: Tensor, student: Tensor) -> None:
    """Refuse a tensor that lies elsewhere than the student's."""
    if value.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {value.device}")


def check_token_tensor(name: str, value: Tensor, batch: torch.Size, student: Tensor) -> None:
    """Refuse what is no tensor of one number a token on the student's device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_plain(name, value)
    if value.shape != batch:
        raise ValueError(f"{name} must have the shape {tuple(batch)} of the tokens, got {tuple(value.shape)}")
    check_device(name, value, student)


def check_labels(
    labels: Tensor, batch: torch.Size, student: Tensor, ignore_index: int | None = None, *, read: bool = True
) -> Tensor:
    """The labels as int64, so that an index and a comparison mean the same in every integer type.

    Where nothing reads the label of a token but whether it is `ignore_index`, a mask may stand in their place.
    """
    if isinstance(labels, Tensor) and labels.dtype == torch.bool and ignore_index is not None:
        if read:
            raise TypeError(
                "labels must be integers where the loss reads them (ce_weight > 0, difficulty='cross_entropy'), got a "
                "bool mask: pass the token that each position predicts"
            )
        check_token_tensor("labels", labels, batch, student)
        return torch.where(labels, int(ignore_index == 0), ignore_index)
    if isinstance(labels, Tensor) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    check_token_tensor("labels", labels, batch, student)
    if ignore_index is not None:
        held = torch.iinfo(labels.dtype)
        if not held.min <= ignore_index <= held.max:
            raise ValueError(
                f"ignore_index must be a number that labels of {labels.dtype} can hold, {held.min} to {held.max}, got "
                f"{ignore_index}, which would match none of them; pass labels.long() or another ignore_index"
            )
    return labels.long()


def check_temperature(temperature: Any, batch: torch.Size, student: Tensor) -> None:
    """Refuse what is no temperature of a token, of all tokens, or of each of them."""
    if not isinstance(temperature, Tensor):
        check_range("temperature", temperature, 0.0, _INFINITY, "> 0", low_open=True, high_open=True)
        return
    if temperature.requires_grad:
        raise ValueError("temperature requires grad, but it is a constant of the loss: pass temperature.detach()")
    if temperature.dim() > 0:
        check_token_tensor("temperature", temperature, batch, student)


def check_mask(name: str, mask: Tensor, shape: torch.Size) -> None:
    """Refuse what is no bool tensor of one entry a token."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    check_plain(name, mask)
    if mask.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)} of the tokens, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, true for valid tokens, got {mask.dtype}; pass {name}.bool()")


def check_inplace(name: str, student: Tensor) -> None:
    """Refuse logits that their gradient cannot replace: those of a leaf, and rows that share memory."""
    if not (torch.is_grad_enabled() and student.requires_grad):
        return  # there is no backward that would write
    owner = student if student._base is None else student._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            f"{name} must not be a leaf that requires grad, or a view of one, with inplace=True: its own gradient "
            "would replace its values; pass what an operator computed from it, or inplace=False"
        )
    extent = 1
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(
                f"{name} must have rows of their own memory with inplace=True, got shape {tuple(student.shape)} with "
                f"strides {tuple(student.stride())}; pass {name}.contiguous() or inplace=False"
            )
        extent += (size - 1) * stride


def check_head(side: str, hidden: Tensor, weight: Any, bias: Any, *, shard: bool = False) -> None:
    """Refuse a head that does not fit its hidden states, or a part of the teacher's that requires grad.

    A `shard` of the vocabulary may have no entry.
    """
    if isinstance(weight, Tensor):
        _check_weight(side, hidden, weight, bias, shard)
        return
    name, came = f"{side}_weight", type(weight).__name__
    if side == "student" and not isinstance(weight, nn.Module):
        raise TypeError(f"{name} must be a (V, H) tensor or an nn.Module, whose parameters get gradients, got {came}")
    if not callable(weight):
        raise TypeError(f"{name} must be a (V, H) tensor or a callable, got {came}")
    if bias is not None:
        raise ValueError(f"{side}_bias must be None where {name} is no tensor: the head adds its own")


def _check_weight(side: str, hidden: Tensor, weight: Tensor, bias: Any, shard: bool) -> None:
    """`check_head` of a weight and perhaps a bias."""
    name, size = f"{side}_weight", hidden.shape[-1]
    check_floating(name, weight)
    if weight.dim() != 2 or weight.shape[1] != size or not (shard or len(weight)):
        raise ValueError(f"{name} must be (V, {size}), H as {side}_hidden has it, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_floating(f"{side}_bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{side}_bias must be ({weight.shape[0]},), V as {name} has it, got shape {tuple(bias.shape)}"
            )
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for part, value in ((name, weight), (f"{side}_bias", bias)):
        if value is None:
            continue
        if value.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"{part} must be {hidden.dtype} as {side}_hidden is, got {value.dtype}; cast one of them or use "
                "torch.autocast"
            )
        check_device(part, value, hidden)
        if side == "teacher":
            check_constant(part, value)


def check_head_options(
    student_softcap: Any, teacher_softcap: Any, student_scale: Any, teacher_scale: Any, chunk_tokens: Any,
    keep_bytes: Any,
) -> None:  # fmt: skip
    """Refuse scales, soft-caps, chunk sizes and budgets outside their ranges."""
    for side, scale, softcap in (
        ("student", student_scale, student_softcap),
        ("teacher", teacher_scale, teacher_softcap),
    ):
        check_range(f"{side}_scale", scale, 0.0, _INFINITY, "a finite number > 0", low_open=True, high_open=True)
        if softcap is not None:
            check_range(f"{side}_softcap", softcap, 0.0, _INFINITY, "None or > 0", low_open=True, high_open=True)
    if chunk_tokens is not None:
        check_integer("chunk_tokens", chunk_tokens, least=1)
    check_integer("keep_bytes", keep_bytes, least=0)


def check_entropy_out(entropy_out: Any, batch: torch.Size, choice: Any) -> None:
    """Refuse what cannot take the entropies of the tokens, and to ask for them beside a choice."""
    if not (isinstance(entropy_out, Tensor) and entropy_out.is_floating_point() and entropy_out.shape == batch):
        got = type(entropy_out).__name__
        if isinstance(entropy_out, Tensor):
            got = f"{entropy_out.dtype} {tuple(entropy_out.shape)}"
        raise ValueError(
            f"entropy_out must be a floating tensor of shape {tuple(batch)}, as the tokens have it, got {got}"
        )
    if choice is not None:
        raise ValueError("entropy_out must be None with a choice: the logits of the tokens beside it do not exist")


def check_no_transform(function: str, *tensors: Any) -> None:
    """Refuse the transformations of torch.func and forward mode: the gradient here is autograd's backward alone."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"adakd_kernels: {function} cannot be used inside torch.func (grad, vmap, jvp, jacrev, ...); call it on "
            "plain tensors and take the gradient by loss.backward() or torch.autograd.grad"
        )
    for tensor in tensors:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(
                f"adakd_kernels: {function} has no forward-mode derivative; take the gradient by loss.backward() or "
                "torch.autograd.grad, or differentiate adakd_kernels.reference forward"
            )
