"""Compile the package's own launches for a GPU that is not there, and read what the compiler made of them.

`compiling_for(target)` replaces the one step of a launch that needs the GPU: the launcher hands Triton its real
arguments, Triton specialises and compiles as it would for the launch, and nothing runs. So a test cannot drift from the
launcher. The arguments are meta tensors: shapes, strides, types and sizes as in training, and no memory.

Finds what the machine code shows: registers, spills, atomics, arithmetic in fp64, the width of accesses, what a round
of a loop consists of, a kernel compiled twice. It cannot find a wrong result, which is the matter of the interpreter
and of `ptx_simulator`, or how long anything takes.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from adakd_kernels.divergences import DIVERGENCES, Divergence, get_divergence
from adakd_kernels.kernels import launch as package
from adakd_kernels.kernels.scale_gradient import scale_gradient
from adakd_kernels.kernels.token_divergence import token_divergence_bwd, token_divergence_fwd
from adakd_kernels.kernels.token_kl import token_kl_fwd
from adakd_kernels.kernels.token_stats import token_stats_fwd
from adakd_kernels.kernels.token_terms import token_terms_fwd
from adakd_kernels.kernels.with_gradient import token_divergence_with_gradient_over
from adakd_kernels.ops.token_divergence import empty_gradient
from adakd_kernels.reference import GradientCall

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Multiprocessors and bytes of the last cache by the makers' data sheets: A100, H100 SXM and H200, B200, MI300X.
MACHINES = {
    "sm_80": package.Machine(108, 40 * 2**20),
    "sm_90": package.Machine(132, 50 * 2**20),
    "sm_100": package.Machine(148, 126 * 2**20),
    "gfx942": package.Machine(304, 256 * 2**20),
}

# (kernel, divergence). Some are one kernel whatever the divergence; its name here is that of the sums they fold.
KERNELS = [("stats", "hellinger"), ("kl", "jeffreys")]
KERNELS += [(kernel, div) for kernel in ("forward", "backward", "backward_ce") for div in DIVERGENCES]
# Divergence and gradient in one kernel, where the rows that are read at a time fit the last cache.
AT_ONCE = [(kernel, div) for kernel in ("with_gradient", "with_gradient_ce") for div in DIVERGENCES]
KERNELS += [("terms", name) for name, div in DIVERGENCES.items() if div.sweeps == 2]


class _StubDriver:
    """What Triton asks a driver for before it compiles. As the device, it keeps Triton's caches of two stubs apart."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> _StubDriver:
        return self

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[CompiledKernel]]:
    """Inside, a launch appends its compiled kernel to the list, the same object as before if it needs no compilation.

    Nothing compiled earlier is used from memory. From the disk, only what this run of the tests compiled: the variable
    ADAKD_COMPILED_KERNELS names the folder that its processes share. Triton finds a kernel there by its source, target
    and options.
    """
    stub = _StubDriver(target)
    launched: list[CompiledKernel] = []
    functions: set[JITFunction[Any]] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        functions.add(self)
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=os.environ.get("ADAKD_COMPILED_KERNELS", cache)),
        mock.patch.object(driver, "_active", stub),
        mock.patch.object(package, "machine", lambda device: MACHINES[_name_of(target)]),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        try:
            yield launched
        finally:
            for function in functions:
                function.device_caches.pop(stub, None)


def _name_of(target: GPUTarget) -> str:
    return next(name for name, known in TARGETS.items() if known == target)


def logits(vocab: int, dtype: torch.dtype, batch: int = 2, length: int = 512, pad: int = 0) -> Tensor:
    """(batch, length, vocab) without memory; with `pad`, a view whose rows are that many entries further apart."""
    return torch.empty(batch, length, vocab + pad, dtype=dtype, device="meta")[..., :vocab]


def launch(kernel: str, divergence: str | Divergence, student: Tensor, teacher: Tensor, inplace: bool = False) -> None:
    """Call the launcher of a kernel, as the ops call it; "…_ce" is one with cross-entropy."""
    tokens = student.shape[:2]
    acc = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    number = torch.ones(tokens, dtype=acc, device=student.device)
    mask = torch.ones(tokens, dtype=torch.bool, device=student.device)
    place = torch.zeros(tokens, dtype=torch.int64, device=student.device)
    normalizers = torch.ones(4, *tokens, dtype=acc, device=student.device)
    divergence = get_divergence(divergence)
    name, (alpha, beta) = divergence.name, divergence.parameters
    if kernel == "stats":
        token_stats_fwd(student, teacher, mask)
    elif kernel == "kl":
        token_kl_fwd(student, teacher, number, mask)
    elif kernel == "forward":
        token_divergence_fwd(student, teacher, number, mask, name, alpha, beta)
    elif kernel == "terms":
        token_terms_fwd(student, teacher, number, mask, normalizers, number, place, name, alpha, beta)
    elif kernel == "scale":
        scale_gradient(student, number.unsqueeze(0), number[0, 0], None)
    elif kernel.startswith("with_gradient"):
        of_ce = (place, number, normalizers) if kernel == "with_gradient_ce" else (None, None, None)
        out = student if inplace else empty_gradient(student)
        token_divergence_with_gradient_over(out, student, teacher, number, mask, name, alpha, beta, number, *of_ce)
    else:
        out = student if inplace else empty_gradient(student)
        with_ce = kernel == "backward_ce"
        call = GradientCall(
            student, teacher, number, number, number, normalizers, place, number,
            place if with_ce else None, number if with_ce else None, normalizers if with_ce else None,
            name, alpha, beta,
        )  # fmt: skip
        token_divergence_bwd(call, out)


@dataclass(frozen=True)
class Loop:
    """What one round of an innermost loop consists of, for each thread."""

    instructions: int
    pipes: Counter[str]  # of NVIDIA, those that limit an SM: mufu, fma, alu, lsu; of AMD, mufu alone is told apart
    shuffles: int
    barriers: int
    loads: Counter[int]  # instructions by width in bits, global memory only
    stores: Counter[int]
    masked: bool  # whether a load is, as those at an edge are, and of one lane's entries after a sweep
    guarded: bool = False  # whether logits are compared with −inf, as where a sweep without guards is repeated
    spills: int = 0  # instructions that move a register to memory or back; of AMD, they are counted for the code alone

    @property
    def load_bytes(self) -> int:
        return sum(bits // 8 * n for bits, n in self.loads.items())


@dataclass(frozen=True)
class Code:
    """What a compiled kernel consists of."""

    registers: int  # of a thread
    local_bytes: int  # memory of a thread beside its registers: a stack, or what was spilled
    spills: int  # instructions that move a register to that memory or back
    spills_in_loops: int  # those of them that are paid for each block of a row and not once a row
    atomics: int
    fp64: int  # instructions with a 64-bit float
    loads: Counter[int]  # instructions by width in bits, global memory only
    stores: Counter[int]
    loops: list[Loop]  # innermost ones that touch global memory, in the order of the code
    warps: int  # of a program
    shared_bytes: int  # of a program
    once: Loop | None = None  # of NVIDIA, the whole code, as if it was one round: for a kernel without a loop

    @property
    def sweeps(self) -> list[Loop]:
        """The loops over the whole steps of an ordinary row.

        They are those with the widest loads, without a mask if there are any, and of these without guards if there are.
        """
        widest = max((bits for loop in self.loops for bits in loop.loads), default=0)
        found = [loop for loop in self.loops if widest in loop.loads]
        found = [loop for loop in found if not loop.masked] or found
        return [loop for loop in found if not loop.guarded] or found

    def spills_for_guards(self, most: int = 72) -> bool:
        """Whether what is kept in memory is nothing to an ordinary row.

        A row with an entry at −inf repeats its sweep with guards. Registers that run out there, or where a row is set
        up, are few instructions, and at most two of a round of the loop over whole steps.
        """
        repeats = any(loop.guarded for loop in self.loops) and not any(loop.guarded for loop in self.sweeps)
        return repeats and self.spills <= most and sum(loop.spills for loop in self.sweeps) <= 2

    def occupancy(self) -> float:
        """Share of the 64 warps of an SM of sm_90 that registers (65,536) and shared memory (228 KiB) leave room for.

        Registers are given to a warp in units of 256; a program takes 1 KiB of shared memory beside its own.
        """
        of_a_warp = -(-self.registers * 32 // 256) * 256
        programs = min(65_536 // (of_a_warp * self.warps), 228 * 1024 // (self.shared_bytes + 1024), 64 // self.warps)
        return programs * self.warps / 64


def read_code(kernel: CompiledKernel) -> Code:
    """Read the machine code, and for NVIDIA the PTX, where a promotion to fp64 is easiest to see."""
    return _read_cubin(kernel) if "cubin" in kernel.asm else _read_amdgcn(kernel)


def compiled(
    target: str, kernel: str, divergence: str, student: Tensor, teacher: Tensor, inplace: bool = False
) -> Code:
    """What one launch compiles to."""
    with compiling_for(TARGETS[target]) as launched:
        launch(kernel, divergence, student, teacher, inplace)
    (only,) = launched
    return read_code(only)


def _run_tool(path: str, *flags: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *flags, file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    """The one number that the pattern finds; none, or two, and the text has another form than expected."""
    (found,) = re.findall(pattern, text)
    return int(found)


class _Instruction(NamedTuple):
    name: str  # LDG, buffer_load_dwordx4
    operands: str  # R4, [R2.64]
    modifiers: Sequence[str] = ()  # E, 128; of NVIDIA only, as the guard
    guard: str = ""  # @P0


def _with_loops(
    lines: Iterable[tuple[str, _Instruction]], branches: tuple[str, ...], label: str, end: str
) -> tuple[list[_Instruction], list[range]]:
    """The instructions in order, and the loops. A loop is what lies between a label and a branch back to it.

    Args:
        lines: (label, _) or ("", instruction), in the order of the code.
        branches: how the names of branches start.
        label: the pattern of a label among the operands of a branch.
        end: the instruction that ends each program; without it, the text has another form than expected.
    """
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    loops: list[range] = []
    for name, instruction in lines:
        if name:
            labels[name] = len(code)
            continue
        code.append(instruction)
        target = re.search(label, instruction.operands)
        # A branch to itself pads the end of the code.
        if instruction.name.startswith(branches) and target and labels.get(target[0], len(code) - 1) < len(code) - 1:
            loops.append(range(labels[target[0]], len(code)))
    assert any(i.name == end for i in code), "no instruction was recognised in the text of the compiler"
    return code, loops


def _innermost(loops: list[range]) -> list[range]:
    """Loops in which no other one lies, in the order of the code."""
    inner = [a for a in loops if not any(b != a and b.start >= a.start and b.stop <= a.stop for b in loops)]
    return sorted(set(inner), key=lambda loop: loop.start)


# Either a label, or an instruction such as  /*0a30*/  @!P0 LDG.E.128 R4, [R2.64] ;
_SASS_LINE = re.compile(r"(\.L_x_\d+):|\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*([A-Z]\w*)((?:\.\w+)*)([^;]*);")
# By the start of the name, the first that fits; the rest is alu. Uniform instructions and branches limit nothing here.
_SASS_PIPES = {
    "mufu": ("MUFU",),
    "lsu": ("LD", "ST", "SHFL", "RED", "ATOM"),
    "fma": ("FFMA", "FADD", "FMUL", "IMAD", "HFMA", "HADD", "HMUL"),
    "other": ("BAR", "BRA", "NOP", "EXIT", "BSYNC", "BSSY", "WARPSYNC", "U"),
}
_SASS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def _sass_code(sass: str) -> tuple[list[_Instruction], list[range]]:
    lines = (
        (label, _Instruction(name, operands, modifiers.split(".")[1:], guard))
        for label, guard, name, modifiers, operands in _SASS_LINE.findall(sass)
    )
    return _with_loops(lines, ("BRA",), r"\.L_x_\d+", "EXIT")


def _sass_widths(code: list[_Instruction], name: str) -> Counter[int]:
    accesses = [i.modifiers for i in code if i.name == name]
    return Counter(next((_SASS_BITS[m] for m in modifiers if m in _SASS_BITS), 32) for modifiers in accesses)


def _sass_loop(body: list[_Instruction]) -> Loop:
    def pipe(name: str) -> str:
        return next((pipe for pipe, starts in _SASS_PIPES.items() if name.startswith(starts)), "alu")

    return Loop(
        instructions=len(body),
        pipes=Counter(pipe(i.name) for i in body),
        shuffles=sum(i.name in ("SHFL", "REDUX") for i in body),
        barriers=sum(i.name == "BAR" for i in body),
        loads=_sass_widths(body, "LDG"),
        stores=_sass_widths(body, "STG"),
        masked=any(i.guard for i in body if i.name == "LDG"),
        guarded=any("-INF" in i.operands for i in body if i.name in ("FSETP", "HSETP2", "DSETP")),
        spills=sum(i.name in ("LDL", "STL") for i in body),
    )


def _read_cubin(kernel: CompiledKernel) -> Code:
    usage = _run_tool(knobs.nvidia.cuobjdump.path, "-res-usage", cubin=kernel.asm["cubin"])
    # The code section only, and without the analysis of data flow, which takes most of the time.
    code, loops = _sass_code(_run_tool(knobs.nvidia.nvdisasm.path, "-c", "-ndf", cubin=kernel.asm["cubin"]))
    bodies = [_sass_loop([code[i] for i in loop]) for loop in _innermost(loops)]
    end = max(i for i, it in enumerate(code) if it.name == "EXIT") + 1  # padding follows
    spills = [any(i in loop for loop in loops) for i, it in enumerate(code) if it.name in ("LDL", "STL")]
    return Code(
        registers=_number(r"\bREG:(\d+)", usage),
        local_bytes=_number(r"\bSTACK:(\d+)", usage) + _number(r"\bLOCAL:(\d+)", usage),
        spills=len(spills),
        spills_in_loops=sum(spills),
        atomics=sum(i.name in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS") for i in code),
        fp64=len(re.findall(r"^\s*(?:@!?%\w+\s+)?[a-z][\w.]*\.f64\b", kernel.asm["ptx"], re.MULTILINE)),
        loads=_sass_widths(code, "LDG"),
        stores=_sass_widths(code, "STG"),
        loops=[body for body in bodies if body.loads or body.stores],
        warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        once=_sass_loop(code[:end]),
    )


_GCN_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16,
             "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}  # fmt: skip


def _gcn_code(assembly: str) -> tuple[list[_Instruction], list[range]]:
    # Either a label, or an instruction with its operands.
    found = re.findall(r"^(?:(\.LBB\w+):|\s+([a-z]+_\w+)\b(.*))", assembly, re.MULTILINE)
    lines = ((label, _Instruction(name, operands)) for label, name, operands in found)
    return _with_loops(lines, ("s_cbranch", "s_branch"), r"\.LBB\w+", "s_endpgm")


def _gcn_widths(code: list[_Instruction], what: str) -> Counter[int]:
    found = (re.match(rf"(?:global|buffer|flat)_{what}_(dword(?:x\d)?|[a-z]+)", i.name) for i in code)
    return Counter(_GCN_BITS[width[1]] for width in found if width)


def _gcn_masked(body: list[_Instruction]) -> bool:
    """Whether an address is chosen by a mask: what it leaves out gets one beyond the buffer, or no lane to load it."""
    writer: dict[str, str] = {}
    some_lanes = False
    for op, operands, *_ in body:
        registers = [x.strip() for x in operands.split(",")]
        if "saveexec" in op or registers[0] == "exec":
            some_lanes = "saveexec" in op
        if op.startswith(("buffer_load", "global_load")) and (
            some_lanes or writer.get(registers[1], "").startswith("v_cndmask_b32")
        ):
            return True
        if written := re.fullmatch(r"v\[(\d+):(\d+)\]", registers[0]):
            writer.update({f"v{n}": op for n in range(int(written[1]), int(written[2]) + 1)})
        else:
            writer[registers[0]] = op
    return False


def _gcn_loop(body: list[_Instruction], lowest: set[str]) -> Loop:
    """`lowest`: what stands for −inf as an operand."""
    ops = [i.name for i in body]
    slow = re.compile(r"v_(exp|log|rcp|rsq|sqrt)_")
    mufu = sum(bool(slow.match(op)) for op in ops)
    return Loop(
        instructions=len(ops),
        pipes=Counter(mufu=mufu, other=len(ops) - mufu),
        shuffles=sum(op.startswith(("ds_bpermute", "ds_swizzle")) or op.endswith("_dpp") for op in ops),
        barriers=ops.count("s_barrier"),
        loads=_gcn_widths(body, "load"),
        stores=_gcn_widths(body, "store"),
        masked=_gcn_masked(body),
        guarded=any(
            lowest & set(re.split(r"[,\s]+", i.operands)) for i in body if re.match("v_cmp_(n?eq|n?lg|class)_f", i.name)
        ),
    )


def _read_amdgcn(kernel: CompiledKernel) -> Code:
    text = kernel.asm["amdgcn"]
    code, loops = _gcn_code(text)
    lowest = {"0xff800000"} | set(re.findall(r"s_mov_b32 (s\d+), 0xff800000", text))
    bodies = [_gcn_loop([code[i] for i in loop], lowest) for loop in _innermost(loops)]
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text) + sum(i.name.startswith("scratch_") for i in code)
    return Code(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        local_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        spills=spills,
        spills_in_loops=spills,  # where they stand is not looked up
        atomics=sum("_atomic_" in i.name for i in code),
        fp64=sum("_f64" in i.name for i in code),
        loads=_gcn_widths(code, "load"),
        stores=_gcn_widths(code, "store"),
        loops=[body for body in bodies if body.loads or body.stores],
        warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
    )
