"""Writes docs/kernel-tables.md from the compiled kernels: `python -m benchmarks.kernel_table`.

Needs no GPU, and liger-kernel for the peers' rows (`pip install --no-deps liger-kernel`).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from pathlib import Path

import torch
from torch import Tensor

from instruments.compiled import KERNELS, TARGETS, Code, compiled, compiling_for, logits, read_code

from .roofline import bound, bytes_moved, entries

PAGE = Path(__file__).parent.parent / "docs" / "kernel-tables.md"
VOCAB = 151_936
NAMES = {"stats": "`token_stats`", "forward": "forward", "backward": "backward", "backward_ce": "backward with CE"}
PAIR = 4  # bytes of an entry of both rows in bf16


def in_bf16(target: str, kernel: str, divergence: str, vocab: int = VOCAB) -> Code:
    x = logits(vocab, torch.bfloat16)
    return compiled(target, kernel, divergence, x, x)


def per_entry(code: Code, pipe: str | None = None) -> float:
    """Instructions, or those of a pipe, for an entry of both rows, over all sweeps."""
    return sum((loop.pipes[pipe] if pipe else loop.instructions) / entries(loop, PAIR) for loop in code.sweeps)


def widths(code: Code) -> str:
    """Bits of the loads, and of the stores if there are any, in the loops over whole steps."""
    loads = sorted({bits for loop in code.sweeps for bits in loop.loads})
    stores = sorted({bits for loop in code.sweeps for bits in loop.stores})
    return " / ".join(", ".join(map(str, found)) for found in (loads, stores) if found)


def counts(code: Code) -> str:
    """Registers, instructions, MUFU, access and waits, as cells."""
    waits = sum(loop.barriers + loop.shuffles for loop in code.sweeps)
    return f"{code.registers} | {per_entry(code):.1f} | {per_entry(code, 'mufu'):.2f} | {widths(code)} | {waits}"


def row_of(kernel: str, divergence: str) -> str:
    """A kernel's row of the first table, which a test compiles again."""
    code = in_bf16("sm_90", kernel, divergence)
    last = f"{code.occupancy():.0%} | {bytes_moved(code, PAIR):.0f} | {bound(code, PAIR)}"
    return f"| {NAMES[kernel]} | `{divergence}` | {counts(code)} | {last} |"


def row_of_targets(kernel: str, divergence: str, vocab: int) -> str:
    cells = []
    for target in TARGETS:
        code = in_bf16(target, kernel, divergence, vocab)
        cells += [f"{code.registers}, {per_entry(code):.1f}, {per_entry(code, 'mufu'):.2f}, {widths(code)}"]
    occupancy = f"{in_bf16('sm_90', kernel, divergence, vocab).occupancy():.0%}"
    return f"| {NAMES[kernel]} | `{divergence}` | " + " | ".join(cells) + f" | {occupancy} |"


# From logits in bf16 to loss and gradient, in passes over the N x V logits; read from the package's source. log_softmax
# and its backward are torch's, counted as if every tensor was read or written once.
LIGER_JSD = [
    ("log_softmax of student and teacher", 4), ("copy of the student's", 2), ("zeros for the loss, in fp32", 2),
    ("kernel: 2 read, gradient 1 and loss 2 written", 5), ("sum of the loss", 2), ("backward of log_softmax", 3),
]  # fmt: skip
LIGER_KL = [
    ("log_softmax of student and teacher", 4), ("forward kernel", 2), ("backward kernel: 1 read, 1 written", 2),
    ("division by the number of rows", 2), ("backward of log_softmax", 3),
]  # fmt: skip


def liger_kernels() -> dict[str, Code]:
    """Liger's kernels as its own launchers compile them for sm_90."""
    from liger_kernel.ops.backends._triton.jsd import jsd_loss_and_grad_triton
    from liger_kernel.ops.kl_div import kldiv_backward_triton, kldiv_forward_triton

    def rows() -> Tensor:
        return torch.empty(1024, VOCAB, dtype=torch.bfloat16, device="meta")

    with compiling_for(TARGETS["sm_90"]) as launched:
        jsd_loss_and_grad_triton(rows(), rows(), None, 0.5, -100, 1024.0)
        kldiv_forward_triton(rows(), rows(), True, "batchmean", 1e-10)
        # It compares values after the launch, and these tensors have none.
        with contextlib.suppress(NotImplementedError):
            kldiv_backward_triton(rows(), torch.empty((), device="meta"), rows(), True)
    names = ("JSD, loss and gradient", "KL, forward", "KL, backward")
    return dict(zip(names, map(read_code, launched), strict=True))


HEAD = """\
# What the GPU kernels compile to

`make kernels-table` writes this page, and needs no GPU: change `benchmarks/kernel_table.py` instead. How the kernels
work, and what follows from these numbers: [gpu-kernels.md](gpu-kernels.md).

Instructions, MUFU and bytes are for one entry of both rows, over all sweeps of a row.

| column | meaning |
|---|---|
| registers | those of a thread |
| instructions | executed by a thread, in the loops over whole steps |
| MUFU | those of them that the unit for exponentials, logarithms and roots executes |
| access | bits of one load / of one store, in these loops |
| waits | shuffles and barriers in these loops |
| occupancy | resident warps, of those that an SM can hold |
| bytes | read and written |
| bound | the resource that an H100 SXM needs for the longest time, in the model of `benchmarks/roofline.py` |
"""


def page() -> str:
    """The whole of docs/kernel-tables.md."""
    lines = [
        HEAD,
        f"## On sm_90\n\nTriton {importlib.metadata.version('triton')}, bf16, V = {VOCAB:,}.",
        "",
        "| kernel | divergence | registers | instructions | MUFU | access (bits) | waits | occupancy | bytes | bound |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|---|",
        *(row_of(*names) for names in KERNELS),
        "",
        "## On every target",
        "",
        "Each cell holds registers, instructions, MUFU and access; occupancy is that of sm_90. Rows of V = 50,257 lie",
        "one right after the other, so that seven of eight start off a multiple of 16 bytes.",
    ]
    for vocab in (VOCAB, 50_257):
        lines += [
            "",
            f"| V = {vocab:,} | divergence | " + " | ".join(TARGETS) + " | occupancy |",
            "|---|---|" + "---|" * len(TARGETS) + "--:|",
            *(row_of_targets(kernel, div, vocab) for kernel, div in KERNELS if kernel != "backward_ce"),
        ]
    return "\n".join([*lines, "", *peer_lines()]) + "\n"


def peer_lines() -> list[str]:
    liger = importlib.metadata.version("liger-kernel")
    lines = [
        "## Beside liger-kernel",
        "",
        f"liger-kernel {liger} on sm_90, in the same units: its Triton kernels, which read log-probabilities, launched",
        "as it launches them.",
        "",
        "| kernel | bytes read | registers | stack | instructions | MUFU | access (bits) | waits | occupancy |",
        "|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for name, code in liger_kernels().items():
        read = 2 if name == "KL, backward" else PAIR
        (loop,) = code.sweeps
        e, waits = entries(loop, read), loop.shuffles + loop.barriers
        lines.append(
            f"| {name} | {read} | {code.registers} | {code.local_bytes} | {loop.instructions / e:.1f} | "
            f"{loop.pipes['mufu'] / e:.2f} | {widths(code)} | {waits} | {code.occupancy():.0%} |"
        )
    lines += [
        "",
        "From logits to loss and gradient, in passes over N×V logits of bf16:",
        "",
        "| | passes |",
        "|---|--:|",
    ]
    lines += ["| this package, one sweep (forward 2, backward 3) | 5 |", "| this package, two sweeps (4, 3) | 7 |"]
    for name, stages in (("JSD", LIGER_JSD), ("KL", LIGER_KL)):
        what = "; ".join(f"{stage} {passes}" for stage, passes in stages)
        lines.append(f"| liger-kernel's {name} ({what}) | {sum(passes for _, passes in stages)} |")
    return lines


def main() -> int:
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
