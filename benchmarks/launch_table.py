"""Chooses the launch table, adakd_kernels/kernels/launch_table.json: `python -m benchmarks.launch_table`.

By the counts, without a GPU: of the candidates below, in their order, the first that spills nowhere and leaves half of
an SM's warps resident on sm_90, else the first that spills nowhere. It looks at every divergence of the class, with and
without cross-entropy, at every target of the family, and at every pair of types of the itemsize. Two tiles a step come
first because a step costs a lane the same with one; 256 threads because a few hundred rows then fill a GPU.

With `--time`, on a GPU: of the candidates that do not spill there, the one whose slowest divergence takes the least
time. It replaces the rows of that GPU's family.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from triton.runtime import driver

from adakd_kernels.divergences import DIVERGENCES
from adakd_kernels.kernels import launch as package
from instruments.compiled import TARGETS, Code, compiling_for, launch, logits, read_code

TABLE = Path(package.__file__).with_name("launch_table.json")
VOCAB, ROWS = 151_936, 2048
CLASSES = {
    name: [div for div in DIVERGENCES if package.divergence_class(div) == name]
    for name in ("one_sweep", "both_kls", "two_sweeps")
}
TYPES = {
    "2": [(torch.bfloat16, torch.bfloat16)],
    "4": [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    "8": [(torch.float64, torch.float64)],
}
WARPS = {"cuda": (8, 4), "hip": (4, 2)}  # a warp of AMD has twice the lanes
Row = dict[str, int]


def kernels(name: str, of_class: str) -> list[tuple[str, str]]:
    """(kernel, divergence) that share a row of the table."""
    if name == "stats":
        return [("stats", "hellinger")]
    variants = ("backward", "backward_ce") if name == "backward" else (name,)
    return [(variant, div) for variant in variants for div in CLASSES[of_class]]


def candidates(name: str, family: str) -> list[Row]:
    if name == "backward":
        return [{"warps": warps} for warps in WARPS[family]]
    return [{"tiles": tiles, "warps": warps} for warps in WARPS[family] for tiles in (2, 1)]


def codes(row: Row, family: str, name: str, of_class: str, itemsize: str) -> Iterator[tuple[str, Code]]:
    """What the launches of a row compile to, with their target."""
    with mock.patch.dict(package.LAUNCH_TABLE[family][name][of_class], {itemsize: row}):
        for target, gpu in TARGETS.items():
            if gpu.backend != family:
                continue
            for kernel, div in kernels(name, of_class):
                for student, teacher in TYPES[itemsize]:
                    with compiling_for(gpu) as launched:
                        launch(kernel, div, logits(VOCAB, student), logits(VOCAB, teacher))
                    yield target, read_code(launched[0])


def by_counts(family: str, name: str, of_class: str, itemsize: str) -> Row:
    clean: list[Row] = []
    for row in candidates(name, family):
        roomy = True
        for target, code in codes(row, family, name, of_class, itemsize):
            if code.local_bytes or code.spills:
                break
            roomy = roomy and (target != "sm_90" or code.occupancy() >= 0.5)
        else:
            clean.append(row)
            if roomy:
                return row
    if not clean:
        raise RuntimeError(f"every candidate spills: {family}, {name}, {of_class}, itemsize {itemsize}")
    return clean[0]


def milliseconds(kernel: str, divergence: str, types: tuple[torch.dtype, torch.dtype], rows: int, vocab: int) -> float:
    """Median time of a launch on the GPU, or in Triton's interpreter on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (torch.randn(1, rows, vocab, device=device).to(dtype) for dtype in types)

    def run() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        launch(kernel, divergence, student, teacher)
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    run()  # compiles
    return statistics.median(run() for _ in range(7))


def by_clock(
    family: str, name: str, of_class: str, itemsize: str, rows: int = ROWS, vocab: int = VOCAB,
    measure: Callable[..., float] = milliseconds,
) -> Row:  # fmt: skip
    def slowest(row: Row) -> float:
        with mock.patch.dict(package.LAUNCH_TABLE[family][name][of_class], {itemsize: row}):
            return max(measure(*names, TYPES[itemsize][0], rows, vocab) for names in kernels(name, of_class))

    return min(candidates(name, family), key=slowest)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Choose the launch table.")
    parser.add_argument("--time", action="store_true", help="by the clock of this machine's GPU")
    timed = parser.parse_args(argv).time
    table = json.loads(TABLE.read_text())
    families = [driver.active.get_current_target().backend] if timed else list(WARPS)
    choose = by_clock if timed else by_counts
    for family in families:
        for name, classes in table[family].items():
            for of_class, by_itemsize in classes.items():
                for itemsize in by_itemsize:
                    by_itemsize[itemsize] = row = choose(family, name, of_class, itemsize)
                    print(family, name, of_class, itemsize, row, flush=True)
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
