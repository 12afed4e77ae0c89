"""How a kernel is launched: block and warps by type and vocabulary, accumulation type, strides of the rows."""

from __future__ import annotations

import contextlib
import math

import torch
import triton.language as tl
from torch import Tensor

from ..reference import accumulation_dtype

# Itemsize of the wider logits -> (BLOCK_V, num_warps): eight entries a thread on NVIDIA (four in fp64), which is a load
# of 16 bytes at 2 bytes an entry. With these no launched kernel spills on any target of the compile tests.
_CONFIGS = {2: (2048, 8), 4: (1024, 4), 8: (1024, 8)}


def launch_config(student: Tensor, teacher: Tensor, vocab: int) -> dict[str, int]:
    """BLOCK_V and num_warps for rows of `vocab` entries; a vocabulary below the block takes a smaller one."""
    block, warps = _CONFIGS[max(student.element_size(), teacher.element_size())]
    while block > 32 and block // 2 >= vocab:
        block, warps = block // 2, max(1, warps // 2)
    return {"BLOCK_V": block, "num_warps": warps}


def acc_type(student: Tensor, teacher: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The accumulation type, as torch and as Triton name it."""
    dtype = accumulation_dtype(student, teacher)
    return dtype, tl.float64 if dtype == torch.float64 else tl.float32


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch under the tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def row_strides(logits: Tensor) -> tuple[int, int, int]:
    """(batch, token, unit): row (b, l) of a (B, L, V) tensor starts at entry (b·batch + l·token)·unit.

    The unit is fixed by the model (V, or a padded V), so it alone takes part in Triton's specialisation on
    divisibility; batch and token change with the batch and must not cause a recompilation.
    """
    stride_b, stride_l = (s if size > 1 else 0 for s, size in zip(logits.stride()[:2], logits.shape[:2], strict=True))
    unit = math.gcd(stride_b, stride_l) or logits.shape[-1]
    return stride_b // unit, stride_l // unit, unit
