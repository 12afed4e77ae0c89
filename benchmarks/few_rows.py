"""Which share of an H100's bandwidth few rows reach, whole and split: a model, never compared with hardware.

`python -m benchmarks.few_rows` prints the table of docs/gpu-kernels.md, and needs no GPU. Beside what `roofline.py`
counts, the model knows how many programs a launch has, how many of them a multiprocessor takes at once, and in how many
waves: a program alone waits for the loads of every step, and those beside it compute meanwhile. What a program pays
once are its first access and, after the sweep of a forward, three that wait for one another. A merge is paid as a
whole: its launch, two accesses that wait for one another, and its instructions, of which a lone warp issues one in
three clocks. Left out: the launch of the kernels that whole rows have, too, and what edges cost beside a step.
"""

from __future__ import annotations

import math
from unittest import mock

import torch

from adakd_kernels.kernels import launch as package
from instruments.compiled import MACHINES, TARGETS, Code, compiling_for, launch, logits, read_code

from .roofline import COPY_RATE, H100, LATENCY, bytes_moved, entries

VOCAB, ROWS = 151_936, (1, 16, 64, 128)
PAIR = 4  # bytes of an entry of both rows in bf16
LAUNCH = 1e-6 * H100.clock  # clocks from the end of a kernel to the first instruction of one that waits for it
CACHED = 300  # clocks of an access to what was just read or written
CLOCKS_OF_A_LONE_WARP = 3  # an instruction
PHASES = ("stats", "forward", "backward")


def parts_of(rows: int, vocab: int = VOCAB) -> int:
    """Into how many parts the package splits so many rows on this GPU."""
    with mock.patch.object(package, "machine", lambda device: MACHINES[H100.target]):
        return package.wanted_parts(rows, vocab, torch.device("cuda", 0))


def codes(kernel: str, divergence: str, parts: int, vocab: int = VOCAB) -> list[Code]:
    """What a call launches for rows of so many parts, in order; merges are what has no loop."""
    x = logits(vocab, torch.bfloat16)
    with mock.patch.object(package, "wanted_parts", lambda *_: parts), compiling_for(TARGETS["sm_90"]) as launched:
        launch(kernel, divergence, x, x)
    return [read_code(one) for one in launched]


def sweep_clocks(code: Code, rows: int, parts: int, vocab: int = VOCAB) -> float:
    """Clocks of a kernel that sweeps the parts of all rows."""
    programs = rows * parts
    at_once = int(code.occupancy() * 64) // code.warps
    of_an_sm = -(-programs // H100.sms)
    waves = [min(at_once, of_an_sm - first) for first in range(0, of_an_sm, at_once)]
    computing = 0.0
    for loop in code.sweeps:
        lanes = code.warps * 32
        rounds = math.ceil(vocab / parts / (lanes * entries(loop, PAIR)))
        executed = {pipe: loop.instructions if pipe == "issue" else loop.pipes[pipe] for pipe in H100.lanes}
        busy = max(executed[pipe] * lanes / H100.lanes[pipe] for pipe in H100.lanes)
        computing += rounds * sum(max(LATENCY + busy, resident * busy) for resident in waves)
    moved = bytes_moved(code, PAIR) * rows * vocab
    after = 0 if any(loop.stores for loop in code.sweeps) else 3 * CACHED
    return max(computing, moved * H100.clocks_a_byte / COPY_RATE / H100.sms) + LATENCY + after


def merge_clocks(code: Code) -> float:
    """Clocks of a kernel that merges the parts."""
    assert code.once is not None
    return LAUNCH + 2 * CACHED + CLOCKS_OF_A_LONE_WARP * code.once.instructions


def call_clocks(kernel: str, divergence: str, rows: int, parts: int) -> tuple[float, float]:
    """(clocks of all launches of a call, clocks in which a copy moves the same bytes)."""
    clocks = moved = 0.0
    for code in codes(kernel, divergence, parts):
        if code.sweeps:
            clocks += sweep_clocks(code, rows, parts)
            moved += bytes_moved(code, PAIR) * rows * VOCAB
        else:
            clocks += merge_clocks(code)
    return clocks, moved * H100.clocks_a_byte / COPY_RATE / H100.sms


def shares(divergence: str, rows: int, parts: int) -> list[float]:
    """Copy time over time: of the statistics, the forward, the backward, and all three."""
    found = [call_clocks(kernel, "hellinger" if kernel == "stats" else divergence, rows, parts) for kernel in PHASES]
    found.append((sum(clocks for clocks, _ in found), sum(copy for _, copy in found)))
    return [copy / clocks for clocks, copy in found]


def table() -> str:
    lines = [
        "| divergence | rows | parts | statistics | forward | backward | all three |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for divergence in ("reverse_kl", "total_variation"):
        for rows in ROWS:
            parts = parts_of(rows)
            whole, split = (shares(divergence, rows, n) for n in (1, parts))
            cells = [f"{a:.2f} → {b:.2f}" if parts > 1 else f"{a:.2f}" for a, b in zip(whole, split, strict=True)]
            lines.append(f"| `{divergence}` | {rows} | {parts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
