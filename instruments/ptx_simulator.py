"""Executes the PTX of Triton's kernels on the CPU, so that what the compiler made of a kernel is tested without a GPU.

All threads of a launch run side by side as lanes of numpy arrays; where they part, those that are furthest behind go
first. What a GPU would do silently is a `PtxError` here:

- an access to global memory outside the arguments' rows, or not aligned to its size;
- an access of one thread to shared memory that another one wrote, or a write to what another one read, with no barrier
  between them;
- an undefined value (of a register or shared memory that nobody wrote) where it decides something: an address, a
  branch, a guard, or what is stored to global memory. One that a select or a mask drops is no fault;
- a barrier that only some threads of a block reach, a shuffle without its partners, a launch that does not end.

What it cannot find. The PTX is executed, not the machine code that ptxas makes of it. Timing, caches, the order of
blocks and races on global memory are not modelled. Functions marked `.approx` or `.full` give the nearest number, where
a GPU may be off by the few units in the last place that the PTX manual allows. A fused multiply-add rounds twice where
the wider product and sum fall on a tie; it needs a long double of more than 64 bits to be as exact for fp64. The
instructions are those that the kernels use: matrix products, asynchronous copies and atomics are not there, and an
instruction that is not known is a `NotImplementedError`, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from . import bf16
from .memory import Rows, bytes_at

WARP = 32


class PtxError(Exception):
    """What a GPU would have done without a word."""


@dataclass(frozen=True)
class Instruction:
    """One line, as in  @!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 16 ];"""

    guard: str  # %p1, or empty
    negated: bool
    name: str  # ld
    modifiers: tuple[str, ...]  # global, v2, b32
    operands: tuple[str, ...]
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1]


class Program:
    """The entry of a PTX module, parsed."""

    def __init__(self, ptx: str) -> None:
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{(.*)", re.sub(r"//[^\n]*", "", ptx), re.DOTALL)
        assert entry, "the text has no entry"
        self.name, parameters, directives, body = entry.groups()
        depth = np.cumsum([(c == "{") - (c == "}") for c in body])
        body = body[: int((depth < 0).argmax())]
        self.parameters = re.findall(r"(\w+)\s*(?:,|$)", parameters.strip())
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
        assert threads, "the number of threads is not fixed"
        self.threads = int(threads[1])
        self.width: dict[str, int] = {}  # of a register in bits, 1 for a predicate
        self.labels: dict[str, int] = {}
        self.code: list[Instruction] = []
        for line in re.split(r"[;\n]", body):
            self._parse(re.sub(r"^\{(?=\s)|^\}", "", line.strip()).strip())  # a scope needs no names of its own

    def _parse(self, line: str) -> None:
        while label := re.match(r"([\w$]+):\s*", line):
            self.labels[label[1]] = len(self.code)
            line = line[label.end() :]
        if not line or line.startswith((".loc", ".file", ".pragma")):
            return
        if registers := re.match(r"\.reg\s+\.(pred|[bufs]\d+)\s+(.*)", line):
            width = 1 if registers[1] == "pred" else int(registers[1][1:])
            for name, count in re.findall(r"([%\w]+)(?:<(\d+)>)?", registers[2]):
                self.width.update({f"{name}{i}": width for i in range(int(count))} if count else {name: width})
            return
        parts = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*)((?:\.\w+(?:::\w+)?)*)\s*(.*)", line)
        if not parts:
            raise NotImplementedError(f"PTX line not understood: {line}")
        operands = tuple(x.strip() for x in re.split(r",(?![^{\[]*[}\]])", parts[5]) if x.strip())
        modifiers = tuple(parts[4].split(".")[1:])
        self.code.append(Instruction(parts[2] or "", parts[1] == "!", parts[3], modifiers, operands, line))


def run(ptx: str, grid: Sequence[int], arguments: Sequence[Tensor | float], shared_bytes: int) -> None:
    """Run a kernel on its arguments: CPU tensors, which it reads and writes, integers, and fp64 numbers.

    Parameters of the kernel beyond the arguments are Triton's own scratch pointers, which these kernels do not use.
    """
    program = Program(ptx)
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    values = [
        x.data_ptr() if isinstance(x, Tensor) else int(np.float64(x).view(np.int64)) if isinstance(x, float) else x
        for x in arguments
    ]
    values += [0] * (len(program.parameters) - len(values))
    with np.errstate(all="ignore"):
        _Launch(program, grid, dict(zip(program.parameters, values, strict=True)), tensors, shared_bytes).run()


# Numbers. A register holds bits; each instruction reads them as the type that it names.

_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def _dtype(type_: str) -> np.dtype[Any]:
    if type_ == "pred":
        return np.dtype(bool)
    return np.dtype(f"{_KINDS[type_[0]]}{int(type_[1:]) // 8}")


def _unsigned(bits: int) -> np.dtype[Any]:
    return np.dtype(bool) if bits == 1 else np.dtype(f"u{bits // 8}")


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Every NaN is the one that hardware gives."""
    return bf16.rounded(x, nan=0x7FFF)


def _flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _exactly(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Computed in the next wider type and rounded to the operands' type."""

    def call(*args: np.ndarray) -> np.ndarray:
        wider = {2: np.float32, 4: np.float64, 8: np.longdouble}[args[0].dtype.itemsize]
        return function(*(x.astype(wider) for x in args)).astype(args[0].dtype)

    return call


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b)
    return ((a - np.fmod(a, safe)) // safe).astype(a.dtype)


def _shift_left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, 0).astype(a.dtype)


def _multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return ((a.astype(object) * b.astype(object)) >> bits).astype(a.dtype)


def _permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    a, b, selector = np.broadcast_arrays(a, b, np.atleast_1d(selector))
    pool = np.concatenate([np.ascontiguousarray(x).view(np.uint8).reshape(-1, 4) for x in (a, b)], axis=1)
    nibbles = np.stack([(selector >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)], axis=1).astype(np.int64)
    picked = np.take_along_axis(pool, nibbles & 7, axis=1)
    signs = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
    return np.ascontiguousarray(np.where(nibbles & 8, signs, picked)).view(np.uint32).reshape(-1)


def _bit_field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "i":
        raise NotImplementedError("bfe of a signed number")
    mask = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    return ((a.astype(np.uint64) >> start.astype(np.uint64)) & mask).astype(a.dtype)


# What takes values of one type and gives a value of that type, lane by lane.
_LANEWISE: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _divide,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "fma": _exactly(lambda a, b, c: a * b + c),
    "mad": lambda a, b, c: a * b + c,
    "neg": lambda a: -a,
    "abs": np.abs,
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "ex2": _exactly(np.exp2),
    "lg2": _exactly(np.log2),
    "sqrt": _exactly(np.sqrt),
    "rsqrt": _exactly(lambda a: 1 / np.sqrt(a)),
    "rcp": _exactly(lambda a: 1 / a),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "shl": _shift_left,
    "shr": _shift_right,
    "bfe": _bit_field,
    "prmt": _permute_bytes,
    "mov": lambda a: a,
}
# The amounts of a shift and of a bit field are 32-bit numbers whatever the type.
_COUNTS = {"shl": (1,), "shr": (1,), "bfe": (1, 2)}

_COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_COMPARISONS |= {"lo": _COMPARISONS["lt"], "ls": _COMPARISONS["le"]}
_COMPARISONS |= {"hi": _COMPARISONS["gt"], "hs": _COMPARISONS["ge"]}


def _compare(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """An ordered comparison is false where either side is NaN, an unordered one (…u) is true there."""
    nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros((), bool)
    if how in ("nan", "num"):
        return nan if how == "nan" else ~nan
    if how in _COMPARISONS:
        return _COMPARISONS[how](a, b) & ~nan
    return _COMPARISONS[how[:-1]](a, b) | nan


class _Shared:
    """The shared memory of all blocks, and who touched which byte since which barrier."""

    NOBODY, MANY = -1, -2  # in the place of a thread

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size = size
        self.data = np.zeros(blocks * size, np.uint8)
        self.defined = np.zeros(blocks * size, bool)
        self.block_epoch = np.zeros(blocks, np.int64)  # barriers of the block so far
        self.warp_epoch = np.zeros(blocks * threads // WARP, np.int64)  # those, and barriers of the warp alone
        self.threads = threads
        # Who wrote and who read a byte last, and the epochs of its block and warp then.
        self.writer, self.reader = (np.full((3, blocks * size), self.NOBODY, np.int64) for _ in range(2))

    def races(self, last: np.ndarray, places: np.ndarray, thread: np.ndarray) -> bool:
        """Whether another thread touched one of these bytes with no barrier in between. A row of places a thread."""
        who, block_epoch, warp_epoch = last[:, places]
        thread = thread[:, None]
        same_warp = (who >= 0) & (who // WARP == thread // WARP)
        ordered = block_epoch < self.block_epoch[thread // self.threads]
        ordered |= same_warp & (warp_epoch < self.warp_epoch[thread // WARP])
        return bool(((who != self.NOBODY) & (who != thread) & ~ordered).any())

    def touch(self, last: np.ndarray, places: np.ndarray, thread: np.ndarray) -> None:
        """Remember who touched these bytes; several threads since the last barrier of the block become `MANY`."""
        threads = np.broadcast_to(thread[:, None], places.shape)
        epoch = self.block_epoch[threads // self.threads]
        earlier, earlier_epoch, _ = last[:, places]
        others = (earlier != self.NOBODY) & (earlier != threads) & (earlier_epoch == epoch)
        last[0, places] = threads
        others |= last[0, places] != threads
        last[0, places[others]] = self.MANY
        last[1, places] = epoch
        last[2, places] = self.warp_epoch[threads // WARP]


class _Launch:
    """The state of a launch: registers of all threads, memory, and where each thread stands."""

    STEPS = 1_000_000  # instructions of one launch, far beyond what a test's shape needs

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        parameters: dict[str, int],
        tensors: list[Tensor],
        shared_bytes: int,
    ) -> None:
        self.program = program
        self.parameters = parameters
        self.tensors = [Rows(f"tensor {i}", tensor) for i, tensor in enumerate(tensors)]
        blocks = math.prod(grid)
        lanes = blocks * program.threads
        self.thread = np.arange(lanes)
        self.block = self.thread // program.threads
        self.special = {
            "%tid.x": self.thread % program.threads,
            "%laneid": self.thread % WARP,
            "%ntid.x": np.full(lanes, program.threads),
            "%tid.y": np.zeros(lanes, int),
            "%tid.z": np.zeros(lanes, int),
        }
        before = 1
        for axis, size in zip("xyz", (*grid, 1, 1), strict=False):
            self.special[f"%ctaid.{axis}"] = self.block // before % size
            self.special[f"%nctaid.{axis}"] = np.full(lanes, size)
            before *= size
        self.shared = _Shared(blocks, shared_bytes, program.threads)
        self.registers: dict[str, np.ndarray] = {}
        self.undefined: dict[str, np.ndarray] = {}  # lanes of a register that hold nothing; absent: all are defined
        # The same of every part of a register that these lanes put together from narrower ones.
        self.undefined_parts: dict[str, tuple[tuple[np.ndarray | None, ...], np.ndarray]] = {}
        self.next = np.zeros(lanes, np.int64)  # index of a thread's next instruction
        self.waiting = np.zeros(lanes, bool)

    def run(self) -> None:
        end = len(self.program.code)
        for _ in range(self.STEPS):
            ready = (self.next < end) & ~self.waiting
            if not ready.any():
                if (self.next == end).all():
                    return
                self._release()
                continue
            here = self.next[ready].min()
            lanes = ready & (self.next == here)
            self._step(self.program.code[here], lanes)
        raise PtxError(f"{self.program.name}: no end after {self.STEPS} instructions")

    def _release(self) -> None:
        """Nobody can go on but by a barrier: all threads of a block must stand at it."""
        left = np.bincount(self.block[~self.waiting], minlength=len(self.shared.block_epoch))
        partial = (left > 0) & (left < self.program.threads)
        if partial.any():
            raise PtxError(f"{self.program.name}: a barrier that some threads of block {partial.argmax()} never reach")
        passed = left == 0
        self.shared.block_epoch += passed
        self.shared.warp_epoch += passed.repeat(len(self.shared.warp_epoch) // len(passed))
        self.waiting[:] = False

    def _step(self, i: Instruction, lanes: np.ndarray) -> None:
        active = lanes
        if i.guard:
            condition, undefined = self._get(i.guard, "pred")
            self._refuse(undefined, lanes, i, "a guard")
            active = lanes & (condition ^ i.negated)
        self.next[lanes] += 1
        if i.name == "bra":
            self.next[active] = self.program.labels[i.operands[0]]
        elif i.name in ("ret", "exit"):
            self.next[active] = len(self.program.code)
        elif not active.any():
            pass
        elif i.name in ("bar", "barrier"):
            self._barrier(i, active)
        elif i.name in ("ld", "st"):
            self._access(i, active)
        elif i.name == "shfl":
            self._shuffle(i, active)
        elif i.name == "redux":
            self._reduce_warps(i, active)
        else:
            self._compute(i, active)

    def _refuse(self, undefined: np.ndarray | None, lanes: np.ndarray, i: Instruction, what: str) -> None:
        if undefined is not None and (undefined & lanes).any():
            raise PtxError(f"{self.program.name}: {what} is undefined: {i.text}")

    def _get(self, operand: str, type_: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The value of an operand in every lane, and the lanes in which it is undefined (None: in none)."""
        dtype = _dtype(type_)
        if operand.startswith("!"):
            value, undefined = self._get(operand[1:], type_)
            return ~value, undefined
        if operand in self.program.width:
            if operand not in self.registers:
                return np.zeros(len(self.thread), dtype), np.ones(len(self.thread), bool)
            bits = self.registers[operand]
            if bits.dtype.itemsize != dtype.itemsize:
                bits = bits.astype(_unsigned(8 * dtype.itemsize))
            return bits.view(dtype), self.undefined.get(operand)
        if operand in self.special:
            return self.special[operand].astype(dtype), None
        if operand.startswith(("0f", "0d")):  # the bits of a float, which an untyped move takes as they are
            unsigned, as_float = (np.uint32, np.float32) if operand[1] == "f" else (np.uint64, np.float64)
            bits = unsigned(int(operand[2:], 16))
            return (bits.view(as_float) if dtype.kind == "f" else bits).astype(dtype), None
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            if type_ == "pred":
                return np.asarray(number != 0), None
            bits = _unsigned(8 * dtype.itemsize).type(number % 2 ** (8 * dtype.itemsize))
            return bits.view(dtype), None
        if operand == "global_smem":  # Triton's one array in shared memory, at its start
            return dtype.type(0), None
        raise NotImplementedError(f"operand {operand}")

    def _put(self, register: str, value: np.ndarray, undefined: np.ndarray | None, lanes: np.ndarray) -> None:
        if register == "_":
            return
        self.undefined_parts.pop(register, None)
        dtype = _unsigned(self.program.width[register])
        if value.dtype != dtype:
            if value.dtype.itemsize != dtype.itemsize:  # a narrow load into a wider register; the sign is kept
                value = value.view(_unsigned(8 * value.dtype.itemsize)) if value.dtype.kind == "f" else value
                value = value.astype(dtype)
            value = value.view(dtype)
        if register not in self.registers:
            self.registers[register] = np.zeros(len(self.thread), dtype)
            self.undefined[register] = np.ones(len(self.thread), bool)
        np.copyto(self.registers[register], value, where=lanes)
        if undefined is not None and (undefined & lanes).any():
            before = self.undefined.get(register, np.zeros(len(self.thread), bool))
            self.undefined[register] = np.where(lanes, undefined, before)
        elif register in self.undefined:
            left = self.undefined[register] & ~lanes
            if left.any():
                self.undefined[register] = left
            else:
                del self.undefined[register]

    def _compute(self, i: Instruction, lanes: np.ndarray) -> None:
        if i.name == "mov" and "{" in i.text:
            return self._pack(i, lanes)
        if i.name == "setp" and "|" in i.operands[0]:
            return self._compare_halves(i, lanes)
        if i.name == "cvt":
            value, undefined = self._convert(i)
        elif i.name == "setp":
            value, undefined = self._set_predicate(i)
        elif i.name == "createpolicy":  # a hint to the cache
            value, undefined = np.uint64(0), None
        elif i.name == "selp":
            chosen, first = self._get(i.operands[3], "pred")
            (a, if_true), (b, if_false) = (self._get(x, i.type) for x in i.operands[1:3])
            value = np.where(chosen, a, b)
            undefined = _either(first, _select(chosen, if_true, if_false))
        elif i.name in _LANEWISE:
            value, undefined = self._lanewise(i)
        else:
            raise NotImplementedError(f"PTX instruction {i.text}")
        self._put(i.operands[0], np.asarray(value), undefined, lanes)

    def _lanewise(self, i: Instruction) -> tuple[np.ndarray, np.ndarray | None]:
        type_ = "b32" if i.name == "prmt" else i.type
        if type_.startswith("bf16") or type_.endswith("x2"):
            raise NotImplementedError(f"PTX instruction {i.text}")
        types = [type_] * (len(i.operands) - 1)
        for position in _COUNTS.get(i.name, ()):
            types[position] = "u32"
        wide = f"{type_[0]}{2 * int(type_[1:])}" if "wide" in i.modifiers else type_
        if i.name == "mad" and "wide" in i.modifiers:
            types[2] = wide
        values, undefined = zip(*(self._get(x, t) for x, t in zip(i.operands[1:], types, strict=True)), strict=True)
        values = [x.astype(_dtype(wide)) for x in values] if "wide" in i.modifiers else list(values)
        if "ftz" in i.modifiers:
            values = [_flush(x) for x in values]
        if "hi" in i.modifiers:
            if i.name != "mul":
                raise NotImplementedError(f"PTX instruction {i.text}")
            result = _multiply_high(*values)
        elif "NaN" in i.modifiers:
            result = (np.maximum if i.name == "max" else np.minimum)(*values)
        elif i.name == "mov":
            result = values[0]
        else:
            result = _LANEWISE[i.name](*values)
        return _flush(result) if "ftz" in i.modifiers else result, _either(*undefined)

    def _convert(self, i: Instruction) -> tuple[np.ndarray, np.ndarray | None]:
        target, source = i.modifiers[-2:]
        x, undefined = self._get(i.operands[1], "b16" if source == "bf16" else source)
        if source == "bf16":
            x = bf16.widened(np.asarray(x))
        if target in ("bf16x2", "f16x2"):  # the first operand goes to the upper half
            low, also_undefined = self._get(i.operands[2], source)
            halves = [_to_bf16(y) if target == "bf16x2" else y.astype(np.float16).view(np.uint16) for y in (x, low)]
            packed = (halves[0].astype(np.uint32) << np.uint32(16)) | halves[1]
            return packed, _either(undefined, also_undefined)
        if target == "bf16":
            return _to_bf16(x), undefined
        if source[0] == "f":
            rounded = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}
            to_whole = [function for name, function in rounded.items() if name in i.modifiers]
            assert to_whole or target[0] == "f"
            x = to_whole[0](x) if to_whole else x
        return x.astype(_dtype(target)), undefined

    def _set_predicate(self, i: Instruction) -> tuple[np.ndarray, np.ndarray | None]:
        how = i.modifiers[0]
        (a, first), (b, second) = (self._get(x, "b16" if i.type == "bf16" else i.type) for x in i.operands[1:3])
        undefined = _either(first, second)
        if i.type == "bf16":
            a, b = bf16.widened(np.asarray(a)), bf16.widened(np.asarray(b))
        value = _compare(how, a, b)
        if len(i.operands) > 3:
            other, third = self._get(i.operands[3], "pred")
            value = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.modifiers[1]](value, other)
            undefined = _either(undefined, third)
        return value, undefined

    def _compare_halves(self, i: Instruction, lanes: np.ndarray) -> None:
        """Two 16-bit comparisons in one, the lower halves' result first."""
        (a, first), (b, second) = (self._get(x, "u32") for x in i.operands[1:3])
        decode = bf16.widened if i.type == "bf16x2" else lambda half: half.view(np.float16)
        for register, shift in zip(i.operands[0].split("|"), (0, 16), strict=True):
            x, y = (decode(np.asarray(z >> np.uint32(shift)).astype(np.uint16)) for z in (a, b))
            self._put(register.strip(), _compare(i.modifiers[0], x, y), _either(first, second), lanes)

    def _pack(self, i: Instruction, lanes: np.ndarray) -> None:
        """Between one register and several narrower ones, the lowest first."""
        parts = _members(i.operands[0] if "{" in i.operands[0] else i.operands[1])
        width = int(i.type[1:]) // len(parts)
        if "{" in i.operands[0]:
            whole, undefined = self._get(i.operands[1], i.type)
            pieces = np.broadcast_to(whole, self.thread.shape).copy().view(_unsigned(width)).reshape(-1, len(parts))
            of_parts, known = self.undefined_parts.get(i.operands[1], ((), None))
            if known is None or (lanes & ~known).any():
                of_parts = (undefined,) * len(parts)
            for part, piece, of_part in zip(parts, pieces.T, of_parts, strict=True):
                self._put(part, np.ascontiguousarray(piece), of_part, lanes)
        else:
            values, undefined = zip(*(self._get(part, f"b{width}") for part in parts), strict=True)
            pieces = np.stack([np.broadcast_to(x, self.thread.shape) for x in values], axis=1)
            whole = pieces.view(_unsigned(int(i.type[1:]))).reshape(-1)
            self._put(i.operands[0], whole, _either(*undefined), lanes)
            self.undefined_parts[i.operands[0]] = undefined, lanes.copy()

    def _barrier(self, i: Instruction, lanes: np.ndarray) -> None:
        if "warp" in i.modifiers:
            self._whole_warps(i, lanes)
            self.shared.warp_epoch[np.unique(self.thread[lanes] // WARP)] += 1
        elif "sync" in i.modifiers and i.operands == ("0",):
            self.waiting |= lanes
        else:
            raise NotImplementedError(f"PTX instruction {i.text}")

    def _whole_warps(self, i: Instruction, lanes: np.ndarray) -> None:
        by_warp = lanes.reshape(-1, WARP)
        if (by_warp.any(1) & ~by_warp.all(1)).any():
            raise PtxError(f"{self.program.name}: only some threads of a warp arrive at: {i.text}")

    def _shuffle(self, i: Instruction, lanes: np.ndarray) -> None:
        self._whole_warps(i, lanes)
        value, undefined = self._get(i.operands[1], i.type)
        amount, _ = self._get(i.operands[2], "s32")
        lane = self.thread % WARP
        source = {"bfly": lane ^ amount, "idx": 0 * lane + amount, "up": lane - amount, "down": lane + amount}
        mode = next(name for name in source if name in i.modifiers)
        if i.operands[3] not in ("31", "0" if mode == "up" else "31") or "|" in i.operands[0]:
            raise NotImplementedError(f"PTX instruction {i.text}")
        from_lane = source[mode]
        origin = self.thread - lane + np.where((from_lane >= 0) & (from_lane < WARP), from_lane, lane)
        moved = undefined[origin] if undefined is not None else None
        self._put(i.operands[0], np.broadcast_to(value, lane.shape)[origin], moved, lanes)

    def _reduce_warps(self, i: Instruction, lanes: np.ndarray) -> None:
        """The least or largest integer of a whole warp, or their sum, to all of its threads."""
        self._whole_warps(i, lanes)
        value, undefined = self._get(i.operands[1], i.type)
        members, unknown = self._get(i.operands[2], "b32")
        self._refuse(unknown, lanes, i, "the members of a warp")
        operations: dict[str, Callable[..., np.ndarray]] = {"min": np.min, "max": np.max, "add": np.sum}
        operation = operations.get(i.modifiers[1])
        if operation is None or (np.broadcast_to(members, lanes.shape)[lanes] != 2**WARP - 1).any():
            raise NotImplementedError(f"PTX instruction {i.text}")
        result = operation(np.broadcast_to(value, lanes.shape).reshape(-1, WARP), axis=1).repeat(WARP)
        nowhere = None if undefined is None else undefined.reshape(-1, WARP).any(axis=1).repeat(WARP)
        self._put(i.operands[0], result, nowhere, lanes)

    def _access(self, i: Instruction, lanes: np.ndarray) -> None:
        """A load or a store of one value a thread, or of a vector of them."""
        spaces = [space for space in ("global", "shared", "param") if space in i.modifiers]
        if not spaces or i.type.startswith("bf"):
            raise NotImplementedError(f"PTX instruction {i.text}")
        loads = i.name == "ld"
        place, registers = (i.operands[1], i.operands[0]) if loads else (i.operands[0], i.operands[1])
        parsed = re.fullmatch(r"\[\s*([%\w]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", place)
        assert parsed, f"not an address: {place}"
        base, sign, offset = parsed.groups()
        if spaces == ["param"]:
            bits = _unsigned(int(i.type[1:]))
            self._put(registers, bits.type(self.parameters[base] % 2 ** int(i.type[1:])), None, lanes)
            return
        pointer, undefined = self._get(base, f"s{self.program.width.get(base, 32)}")
        self._refuse(undefined, lanes, i, "an address")
        distance = int(offset or "0", 0) * (-1 if sign == "-" else 1)
        addresses = np.broadcast_to(np.asarray(pointer, np.int64) + distance, lanes.shape)[lanes]
        parts = _members(registers)
        size = int(i.type[1:]) // 8
        if (addresses % (size * len(parts)) != 0).any():
            raise PtxError(f"{self.program.name}: not aligned to {size * len(parts)} bytes: {i.text}")
        if loads:
            fetch = self._read_global if spaces == ["global"] else self._read_shared
            data, holes = fetch(i, addresses, size * len(parts), lanes)
            for part, piece in zip(parts, np.split(data, len(parts), axis=1), strict=True):
                value = np.zeros(len(lanes), _dtype(i.type))
                value[lanes] = np.ascontiguousarray(piece).view(value.dtype).reshape(-1)
                self._put(part, value, holes, lanes)
        else:
            values, undefined = zip(*(self._get(part, i.type) for part in parts), strict=True)
            columns = [np.broadcast_to(x, lanes.shape)[lanes].copy().view(np.uint8).reshape(-1, size) for x in values]
            write = self._write_global if spaces == ["global"] else self._write_shared
            write(i, addresses, np.concatenate(columns, axis=1), _either(*undefined), lanes)

    def _check_rows(self, i: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
        outside = np.ones(len(addresses), bool)
        for rows in self.tensors:
            outside &= rows.locate(addresses, size) < 0
        if outside.any():
            address = addresses[outside][0]
            thread = self.thread[lanes][outside][0]
            near = min(self.tensors, key=lambda rows: rows.distance(address))
            raise PtxError(
                f"{self.program.name}: out of bounds in {outside.sum()} threads, the first in block "
                f"{self.block[thread]}, {near.distance(address)} bytes from {near.name}: {i.text}"
            )

    def _read_global(
        self, i: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray
    ) -> tuple[np.ndarray, None]:
        self._check_rows(i, addresses, size, lanes)
        memory, first = _window(addresses, size)
        return memory[(addresses - first)[:, None] + np.arange(size)], None

    def _write_global(
        self, i: Instruction, addresses: np.ndarray, data: np.ndarray, undefined: np.ndarray | None, lanes: np.ndarray
    ) -> None:
        self._refuse(undefined, lanes, i, "what is stored")
        self._check_rows(i, addresses, data.shape[1], lanes)
        memory, first = _window(addresses, data.shape[1])
        memory[(addresses - first)[:, None] + np.arange(data.shape[1])] = data

    def _shared_places(self, i: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        if ((addresses < 0) | (addresses + size > self.shared.size)).any():
            raise PtxError(f"{self.program.name}: outside shared memory: {i.text}")
        return (self.block[lanes] * self.shared.size + addresses)[:, None] + np.arange(size)

    def _read_shared(
        self, i: Instruction, addresses: np.ndarray, size: int, lanes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        places, thread = self._shared_places(i, addresses, size, lanes), self.thread[lanes]
        if self.shared.races(self.shared.writer, places, thread):
            raise PtxError(f"{self.program.name}: race, reads what another thread wrote without a barrier: {i.text}")
        self.shared.touch(self.shared.reader, places, thread)
        holes = np.zeros(len(lanes), bool)
        holes[lanes] = ~self.shared.defined[places].all(1)
        return self.shared.data[places], holes

    def _write_shared(
        self, i: Instruction, addresses: np.ndarray, data: np.ndarray, undefined: np.ndarray | None, lanes: np.ndarray
    ) -> None:
        places, thread = self._shared_places(i, addresses, data.shape[1], lanes), self.thread[lanes]
        for last, what in ((self.shared.reader, "read"), (self.shared.writer, "wrote")):
            if self.shared.races(last, places, thread):
                raise PtxError(
                    f"{self.program.name}: race, writes what another thread {what} without a barrier: {i.text}"
                )
        if len(np.unique(places)) < places.size:
            raise PtxError(f"{self.program.name}: race, two threads write one place: {i.text}")
        self.shared.touch(self.shared.writer, places, thread)
        self.shared.data[places] = data
        self.shared.defined[places] = True if undefined is None else ~undefined[lanes][:, None]


def _members(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]


def _either(*undefined: np.ndarray | None) -> np.ndarray | None:
    found = [x for x in undefined if x is not None]
    return np.logical_or.reduce(found) if found else None


def _select(chosen: np.ndarray, if_true: np.ndarray | None, if_false: np.ndarray | None) -> np.ndarray | None:
    if if_true is None and if_false is None:
        return None
    return np.where(chosen, False if if_true is None else if_true, False if if_false is None else if_false)


def _window(addresses: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """The memory from the first to the last of these addresses, which were all found to belong to tensors."""
    first = int(addresses.min())
    return bytes_at(first, int(addresses.max()) + size - first), first
