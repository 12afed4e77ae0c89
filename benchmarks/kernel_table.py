"""Writes docs/kernel-tables.md from the compiled kernels: `python -m benchmarks.kernel_table`.

Needs no GPU, and liger-kernel (`pip install --no-deps liger-kernel`) and trl for the peers' rows.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from adakd_kernels.divergences import DIVERGENCES
from adakd_kernels.kernels.launch import LAUNCH_TABLE, rows_in_flight, warps_that_fit
from instruments.compiled import KERNELS, MACHINES, TARGETS, Code, compiled, compiling_for, logits, read_code

from . import few_rows
from .roofline import GPUS, bound, bytes_moved, entries, over_memory

PAGE = Path(__file__).parent.parent / "docs" / "kernel-tables.md"
VOCAB = 151_936
NAMES = {
    "stats": "`token_stats`",
    "kl": "`token_kl`",
    "forward": "forward",
    "backward": "backward",
    "backward_ce": "backward with CE",
    "terms": "`token_terms`",
    "with_gradient": "both",
    "with_gradient_ce": "both with CE",
}
PAIR = 4  # bytes of an entry of both rows in bf16
SPLIT = [("stats", "hellinger"), ("forward", "reverse_kl"), ("forward", "jensen_shannon"), ("backward", "reverse_kl")]


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


def launch_of(target: str, vocab: int) -> str:
    """How divergence and gradient of bf16 rows are launched, and what the rows begun at a time take of the cache."""
    family, machine = TARGETS[target].backend, MACHINES[target]
    fewest = int(LAUNCH_TABLE[family]["default"]["warps"])
    warps = warps_that_fit(machine, family, vocab * PAIR, fewest)
    begun = machine.processors * rows_in_flight(family, warps or 4 * fewest) * vocab * PAIR / 2**20
    return f"{f'{warps} warps' if warps else 'two kernels'} ({begun:.0f} of {machine.cache / 2**20:.0f} MiB)"


def row_at_once(divergence: str, vocab: int = 50_257) -> str:
    """The counts of the one kernel for sm_90, without cross-entropy and with it."""
    codes = [in_bf16("sm_90", kernel, divergence, vocab) for kernel in ("with_gradient", "with_gradient_ce")]
    sweeps = DIVERGENCES[divergence].sweeps
    cells = " | ".join(f"{code.registers}, {per_entry(code):.1f}" for code in codes)
    return f"| `{divergence}` | {cells} | {widths(codes[0])} | {PAIR + 2} | {(sweeps + 1) * PAIR + 2} |"


def lines_at_once() -> list[str]:
    """The section on divergence and gradient in one kernel."""
    return [
        "## Divergence and gradient in one kernel",
        "",
        "The warps of a program, by the vocabulary of bf16 logits, and what the rows of both models that all",
        "programs have begun take of the last cache. Where that is more than three quarters with the most warps, two",
        "kernels are launched. A100, H100 SXM and H200, B200, MI300X with its Infinity Cache.",
        "",
        "| V | " + " | ".join(TARGETS) + " |",
        "|--:|" + "---|" * len(TARGETS),
        *(
            f"| {vocab:,} | " + " | ".join(launch_of(target, vocab) for target in TARGETS) + " |"
            for vocab in (12_800, 32_000, 50_257, 64_000, 128_256, VOCAB, 262_144)
        ),
        "",
        "On sm_90 at V = 50,257: registers and instructions without cross-entropy, and with it; the access; and the",
        "bytes of one entry of both rows, where only the first look at it comes from memory, and where each does.",
        "",
        "| divergence | without CE | with CE | access (bits) | bytes | with two kernels |",
        "|---|---|---|---|--:|--:|",
        *(row_at_once(divergence) for divergence in DIVERGENCES),
    ]


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
    return (
        "\n".join(
            [*lines, "", *model_lines(), "", *lines_at_once(), "", *split_lines(), "", *peer_lines(), "", *trl_lines()]
        )
        + "\n"
    )


def split_lines(parts: int = 8) -> list[str]:
    """The section on rows that are split over programs."""
    lines = [
        f"## Rows that are split\n\nIn {parts} parts, on sm_90. A merge has no loop: its instructions are all it has.",
        "",
        "| launch | divergence | kernel | registers | instructions | MUFU | access (bits) | waits | occupancy |",
        "|---|---|---|--:|--:|--:|---|--:|--:|",
    ]
    for kernel, divergence in SPLIT:
        sweeps = iter(("parts",) if (kernel, divergence) != ("forward", "jensen_shannon") else ("normalisers", "terms"))
        for code in few_rows.codes(kernel, divergence, parts):
            if code.sweeps:
                cells = f"{next(sweeps)} | {counts(code)}"
            else:
                assert code.once is not None
                once = code.once
                cells = f"merge | {code.registers} | {once.instructions} | {once.pipes['mufu']} | | {once.shuffles}"
            lines.append(f"| {NAMES[kernel]} | `{divergence}` | {cells} | {code.occupancy():.0%} |")
    return lines


def model_lines() -> list[str]:
    """What `roofline` says of every kernel on four GPUs."""
    lines = [
        "## Beside the memory",
        "",
        "The time of the busiest resource of an SM over that of the memory, in the model of `benchmarks/roofline.py`:",
        "above 1, the resource binds.",
        "",
        "| kernel | divergence | " + " | ".join(GPUS) + " |",
        "|---|---|" + "---|" * len(GPUS),
    ]
    for kernel, div in KERNELS:
        cells = []
        for gpu in GPUS.values():
            ratio, resource = over_memory(in_bf16(gpu.target, kernel, div), PAIR, gpu)
            cells.append(f"{ratio:.2f} {resource}")
        lines.append(f"| {NAMES[kernel]} | `{div}` | " + " | ".join(cells) + " |")
    return lines


def trl_kernels() -> dict[str, Code]:
    """The kernels of TRL's DistillationTrainer for sm_90, at reverse KL and JSD, as its own function launches them."""
    from trl.kernels import chunked_divergence

    def states(tokens: int) -> Tensor:
        return torch.empty(tokens, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)

    found: dict[str, Code] = {}
    with (
        mock.patch.object(chunked_divergence, "_use_triton", lambda device: True),
        mock.patch.object(chunked_divergence, "_compute_dtype", lambda hidden: hidden.dtype),
        compiling_for(TARGETS["sm_90"]) as launched,
    ):
        for beta in (1.0, 0.5):
            student, head = states(1024), states(VOCAB)
            per_token, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
                student, head, None, states(1024).detach(), states(VOCAB).detach(), None, beta
            )
            # Before the last, shorter part of the vocabulary come those of 32,768 columns.
            found.setdefault("statistics", read_code(launched[0]))
            if beta == 0.5:
                found["JSD, after the statistics"] = read_code(
                    next(kernel for kernel in launched if kernel.metadata.name == "_jsd_kernel")
                )
            launched.clear()
            per_token.sum().backward()
            found["JSD, gradient" if beta == 0.5 else "reverse KL, gradient"] = read_code(launched[0])
            launched.clear()
    return found


def peer_row(name: str, code: Code, bytes_read: int) -> str:
    """The counts of a peer's kernel that reads so many bytes for each entry of both rows."""
    loop = code.sweeps[0] if code.sweeps else code.once
    assert loop is not None
    # Narrower loads than those of the logits are of one number a row.
    widest = max(loop.loads)
    e, waits = widest // 8 * loop.loads[widest] / bytes_read, loop.shuffles + loop.barriers
    access = " / ".join(", ".join(map(str, sorted(found))) for found in (loop.loads, loop.stores) if found)
    return (
        f"| {name} | {bytes_read} | {code.registers} | {code.local_bytes} | {loop.instructions / e:.1f} | "
        f"{loop.pipes['mufu'] / e:.2f} | {access} | {waits} | {code.occupancy():.0%} |"
    )


PEER_HEAD = [
    "| kernel | bytes read | registers | stack | instructions | MUFU | access (bits) | waits | occupancy |",
    "|---|--:|--:|--:|--:|--:|---|--:|--:|",
]


def trl_lines() -> list[str]:
    trl = importlib.metadata.version("trl")
    return [
        "## Beside TRL",
        "",
        f"The Triton kernels of `DistillationTrainer` in trl {trl} on sm_90, in the same units, launched as it does.",
        "They read logits in fp32, which a matrix product writes in parts of 32,768 columns, in the forward and",
        "again in the backward; each part of a row goes on from the sums of the part before. The gradient takes the",
        "student's place. Its kernel has no loop, so its counts are those of the whole program.",
        "",
        *PEER_HEAD,
        *(peer_row(name, code, 8) for name, code in trl_kernels().items()),
    ]


def peer_lines() -> list[str]:
    liger = importlib.metadata.version("liger-kernel")
    lines = [
        "## Beside liger-kernel",
        "",
        f"liger-kernel {liger} on sm_90, in the same units: its Triton kernels, which read log-probabilities, launched",
        "as it launches them.",
        "",
        *PEER_HEAD,
    ]
    lines += [peer_row(name, code, 2 if name == "KL, backward" else PAIR) for name, code in liger_kernels().items()]
    lines += [
        "",
        "From logits to loss and gradient, in passes over N×V logits of bf16:",
        "",
        "| | passes |",
        "|---|--:|",
    ]
    lines += [
        "| this package where the rows fit the cache (divergence and gradient 3) | 3 |",
        "| this package else, one sweep (forward 2, backward 3) | 5 |",
        "| this package else, two sweeps (4, 3) | 7 |",
    ]
    for name, stages in (("JSD", LIGER_JSD), ("KL", LIGER_KL)):
        what = "; ".join(f"{stage} {passes}" for stage, passes in stages)
        lines.append(f"| liger-kernel's {name} ({what}) | {sum(passes for _, passes in stages)} |")
    return lines


def main() -> int:
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
