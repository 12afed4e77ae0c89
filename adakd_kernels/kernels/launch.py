"""How a kernel is launched: tile and warps by type and vocabulary, accumulation type, places of the rows."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..divergences import DIVERGENCES
from ..reference import accumulation_dtype

# Kernels whose steps have one tile: none of them moves a maximum, which is what a lane pays for a step.
ONE_TILE = ("backward", "terms", "scale")
# The formulas are written for multiply-adds, and newer versions of Triton do not fuse by themselves.
FUSED = {"enable_fp_fusion": True}
# A row that does not start at a multiple of this many entries is skewed: 16 bytes in 16 bits, the widest load.
ALIGNED_ENTRIES = 8
# Below this a row has few whole steps or none, which alone gain from starting at an aligned entry.
_SHORT_ROW = 8192
# Of the last cache, what the rows that are read at a time may take: the rest is for the gradient that is being written.
_SHARE_OF_CACHE = 0.75
# Bytes of a cache behind the L2, which the driver does not tell: AMD's Infinity Cache.
_LAST_CACHE = {"gfx942": 256 * 2**20, "gfx950": 256 * 2**20}
# Programs that a multiprocessor takes at once: half of its warps.
RESIDENT = 4
# Entries of a part of a row, below which what a program pays once outweighs its sweep.
_LEAST_PART = 8192
# Entries from which on a row is split however many there are, into parts of half as many.
_LONG_ROW = 262_144
# Parts of a row at most; one program merges them at once. A power of two.
MOST_PARTS = 32
# A weight below this leaves the mixture next to the other part nearly everywhere.
_LIGHT = 0.01
# Family of the target -> tiles a step and warps by default, and the launches that take others, with the reason.
# Written by `python -m benchmarks.launch_table`, which says how they are chosen.
LAUNCH_TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("launch_table.json").read_text())


def divergence_class(divergence: str) -> str:
    """Divergences whose kernels are shaped alike are launched alike."""
    if DIVERGENCES[divergence].sweeps == 2:
        return "two_sweeps"
    return "both_kls" if divergence == "jeffreys" else "one_sweep"


def tiles_and_warps(family: str, kernel: str, divergences: str, itemsize: int) -> tuple[int, int]:
    """By the launch table, for a class of divergences and the itemsize of the wider logits."""
    kernel = "forward" if kernel == "with_gradient" else kernel  # whose sweeps it has
    launch = {"kernel": kernel, "divergences": divergences, "itemsize": itemsize}
    table = LAUNCH_TABLE[family]
    row = next((x for x in table["exceptions"] if launch.items() <= x.items()), table["default"])
    return 1 if kernel in ONE_TILE else row["tiles"], row["warps"]


@triton.constexpr_function
def sweeps(divergence: str) -> int:
    """The passes over a row that a forward needs, for the choice inside a kernel."""
    return DIVERGENCES[divergence].sweeps


def _target() -> tuple[str, int]:
    """(family, lanes of a warp) of the GPU; the interpreter stands in for one of NVIDIA."""
    if knobs.runtime.interpret:
        return "cuda", 32
    target = driver.active.get_current_target()
    return target.backend, target.warp_size


def launch_config(
    kernel: str,
    divergence: str,
    vocab: int,
    student: Tensor,
    teacher: Tensor,
    *written: Tensor,
    most_warps: int | None = None,
) -> dict[str, Any]:
    """TILES (of a forward), LANES, VEC, WIDTH, SKEWED, lead, num_warps, FUSED, and for NVIDIA a bound of the registers.

    A vocabulary below half a step takes fewer warps than `most_warps`, or than the launch table has.
    """
    family, warp_size = _target()
    itemsize = max(student.element_size(), teacher.element_size())
    tiles, warps = tiles_and_warps(family, kernel, divergence_class(divergence), itemsize)
    # For AMD, the compiler forgets that a pointer moved back by the lead is aligned.
    is_skewed = skewed(vocab, student, teacher, *written) and (family == "cuda" or lead(student) == 0)
    warps = most_warps or warps
    if family == "cuda" and is_skewed and kernel in ("backward", "terms"):
        warps = min(warps, 4)  # with eight, the edges of the rows take more registers than the sweeps do, or spill
    vec = 16 // itemsize
    if most_warps and vocab < 4 * tiles * warps * warp_size * vec:
        tiles = 1  # a loop of few rounds would be unrolled, and take more registers
    while warps > 1 and tiles * warps * warp_size * vec >= 2 * vocab:
        warps //= 2
    config = {
        "LANES": warps * warp_size,
        "VEC": vec,
        # Where rows leave no access wider than an entry, those of a lane lie LANES apart, so that neighbouring lanes
        # access neighbouring entries. If they were consecutive, Triton would spread each lane over several threads for
        # this, and every sum of a lane would wait for them in the loop.
        "WIDTH": vec if is_skewed or aligned(student, teacher, *written) else 1,
        "SKEWED": is_skewed,
        "lead": (lead(student) or None) if is_skewed else None,
        "num_warps": warps,
        **FUSED,
    }
    if family == "cuda" and itemsize == 2:
        # What comes once a row would take more registers than the sweeps do, only to overlap itself; 64 leave room for
        # half of an SM's warps.
        if kernel in ("forward", "with_gradient"):
            config["maxnreg"] = 64
    if itemsize == 8 and family == "cuda":
        config["maxnreg"] = 128  # by itself, the compiler spills rather than take more than 64
    return config if kernel in ONE_TILE else {"TILES": tiles, **config}


class Machine(NamedTuple):
    """What decides how many rows a GPU reads at a time, and how many of them its last cache holds."""

    processors: int
    cache: int  # bytes


@functools.cache
def machine(device: torch.device) -> Machine:
    """Of a device; nothing of what is no GPU, which no launch has to fill."""
    if device.type != "cuda":
        return Machine(0, 0)
    properties = torch.cuda.get_device_properties(device)
    family = getattr(properties, "gcnArchName", "").split(":")[0]
    return Machine(properties.multi_processor_count, _LAST_CACHE.get(family, properties.L2_cache_size))


def rows_in_flight(family: str, warps: int) -> int:
    """How many programs of so many warps a multiprocessor has begun at a time, by the room in its registers.

    That is 42 warps on NVIDIA, since the kernels have more than 40 registers for each of 32 lanes and there are 65,536,
    given by 8. AMD's has room for 32 warps, but where 64 registers or fewer would leave it for two programs of 16, the
    rows are so short that two fit the cache (`tests/test_compile.py`).
    """
    if family == "cuda":
        return 42 // warps
    return 1 if warps == 16 else 32 // warps


def warps_that_fit(of: Machine, family: str, row_bytes: int, fewest: int) -> int | None:
    """Warps of a program such that the rows that all programs have begun fit the cache; None if no number does.

    `row_bytes` are those of one row of all logits that are read.
    """
    for warps in (fewest, 2 * fewest, 4 * fewest):
        if of.processors * rows_in_flight(family, warps) * row_bytes <= _SHARE_OF_CACHE * of.cache:
            return warps
    return None


def with_gradient_config(
    divergence: str, vocab: int, student: Tensor, teacher: Tensor, out: Tensor
) -> dict[str, Any] | None:
    """`launch_config` of the kernel of divergence and gradient; None where two kernels take less time.

    The kernel looks at a row two or three times. Where the rows that are read at a time do not fit the last cache,
    every look comes from memory, as with two kernels, which leave more programs resident. Two kernels also split a row
    over programs, where there are few: all of them then fit the cache.
    """
    tensors = (student, teacher, out)
    if wanted_parts(math.prod(student.shape[:2]), vocab, student.device) > 1:
        return None
    if knobs.runtime.interpret:
        return launch_config("with_gradient", divergence, vocab, *tensors)
    if student.element_size() == 8 or teacher.element_size() == 8:
        return None  # what fp64 takes of registers leaves room for few warps
    family, _ = _target()
    row_bytes = vocab * (student.element_size() + teacher.element_size())
    fewest = int(LAUNCH_TABLE[family]["default"]["warps"])
    warps = warps_that_fit(machine(student.device), family, row_bytes, fewest)
    return None if warps is None else launch_config("with_gradient", divergence, vocab, *tensors, most_warps=warps)


def wanted_parts(tokens: int, vocab: int, device: torch.device) -> int:
    """Into how many parts a row is split, so that the programs of all rows fill the GPU, and no row takes too long."""
    available = machine(device).processors
    to_fill = RESIDENT * available // tokens if 0 < tokens < available else 1
    for_length = 2 * vocab // _LONG_ROW if vocab >= _LONG_ROW else 1
    return max(1, min(max(to_fill, for_length), vocab // _LEAST_PART, MOST_PARTS))


def row_parts(config: dict[str, Any], tokens: int, vocab: int, device: torch.device) -> tuple[int, int | None]:
    """(number of parts of a row, entries of one: whole steps of a launch of this `config`); (1, None) of whole rows.

    The last part has at least one entry, wherever the row starts, and in a skewed row up to seven beyond a part.
    """
    step = config.get("TILES", 1) * config["LANES"] * config["VEC"]
    steps = max(1, -(-vocab // step))
    of_part = -(-steps // wanted_parts(tokens, vocab, device))
    parts = -(-steps // of_part)
    return parts, of_part * step if parts > 1 else None


def parameters(divergence: str, alpha: float, beta: float, acc: torch.dtype) -> dict[str, Any]:
    """of_p, of_q and LIGHT: the numbers of a divergence, as `divergence_terms.Parameters` has them.

    A kernel takes them as the bits of its accumulation type: Triton passes a float in fp32, and an fp64 argument would
    bring instructions in fp64 into every kernel. So no value of them compiles anew, as a constant would; but a mixture
    nearly all of whose weight is on one side has kernels of its own.
    """
    of_p, of_q = {
        "alpha_beta": (alpha, beta),
        "jensen_shannon": (beta, 1.0 - beta),
        "skew_forward_kl": (alpha, 1.0 - alpha),
        "skew_reverse_kl": (1.0 - alpha, alpha),
    }.get(divergence, (0.0, 0.0))
    light = None
    if divergence != "alpha_beta" and of_p + of_q:
        light = "p" if of_p < _LIGHT else "q" if of_q < _LIGHT else None
    bits = "dq" if acc == torch.float64 else "fi"
    return {
        "of_p": struct.unpack(bits[1], struct.pack(bits[0], of_p))[0],
        "of_q": struct.unpack(bits[1], struct.pack(bits[0], of_q))[0],
        "LIGHT": light,
    }


def bounded(config: dict[str, Any], student: Tensor, teacher: Tensor) -> dict[str, Any]:
    """A launch whose registers leave room for half of an SM's warps, where they do not spill for it."""
    narrow = max(student.element_size(), teacher.element_size()) == 2
    return config | {"maxnreg": 64} if narrow and _target()[0] == "cuda" else config


def acc_type(student: Tensor, teacher: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The accumulation type, as torch and as Triton name it."""
    dtype = accumulation_dtype(student, teacher)
    return dtype, tl.float64 if dtype == torch.float64 else tl.float32


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch under the tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _row_strides(logits: Tensor) -> tuple[int, int]:
    """Distance in entries of two batches, of two tokens; 0 where there is one."""
    stride_b, stride_l = (s if size > 1 else 0 for s, size in zip(logits.stride()[:2], logits.shape[:2], strict=True))
    return stride_b, stride_l


def row_strides(logits: Tensor) -> tuple[int, int, int]:
    """(batch, token, unit): row (b, l) of a (B, L, V) tensor starts at entry (b·batch + l·token)·unit.

    The unit is fixed by the model (V, or a padded V), so it alone takes part in Triton's specialisation on
    divisibility; batch and token change with the batch and must not cause a recompilation.
    """
    stride_b, stride_l = _row_strides(logits)
    unit = math.gcd(stride_b, stride_l) or logits.shape[-1]
    return stride_b // unit, stride_l // unit, unit


def lead(logits: Tensor) -> int:
    """Entries from an aligned one to the tensor's first: not 0 in views such as `logits[:, 1:]`, if V is odd."""
    return logits.data_ptr() // logits.element_size() % ALIGNED_ENTRIES


def aligned(*tensors: Tensor) -> bool:
    """Whether all rows start at a multiple of 16 bytes, by what Triton itself takes note of."""
    return all(row_strides(x)[2] % 16 == 0 and x.data_ptr() % 16 == 0 for x in tensors)


def skewed(vocab: int, *tensors: Tensor) -> bool:
    """Whether the tensors' rows start off an aligned entry, all by the same number of entries.

    Then a kernel reads and writes aligned tiles that begin before the row, which it cannot where the tensors disagree.
    A short row has no whole tile that would gain from it.
    """
    places = [(lead(x), *_row_strides(x)) for x in tensors]
    alike = all((a - b) % ALIGNED_ENTRIES == 0 for other in places for a, b in zip(places[0], other, strict=True))
    return vocab >= _SHORT_ROW and alike and not aligned(*tensors)
