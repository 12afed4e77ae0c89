"""Chooses the launch table, adakd_kernels/kernels/launch_table.json: `python -m benchmarks.launch_table`.

By the counts, without a GPU: of the candidates below, in their order, the first that spills nowhere and leaves half of
an SM's warps resident on sm_90, else the first that spills nowhere. It looks at every divergence of the class, with and
without cross-entropy, at every target of the family, and at every pair of types of the itemsize. Two tiles a step come
first because a step costs a lane the same with one; 256 threads because a few hundred rows then fill a GPU.

The table holds the first candidate as the default of the family and, with the reason, the launches that differ.

With `--time`, on a GPU: the candidate whose slowest divergence takes the least time. It replaces the table of that
GPU's family.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
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
    2: [(torch.bfloat16, torch.bfloat16)],
    4: [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    8: [(torch.float64, torch.float64)],
}
WARPS = {"cuda": (8, 4), "hip": (4, 2)}  # a warp of AMD has twice the lanes
Row = dict[str, int]


class Launch(NamedTuple):
    """Launches that take the same tiles and warps."""

    kernel: str
    divergences: str  # a class of them
    itemsize: int  # of the wider logits


LAUNCHES = [
    Launch(kernel, of_class, itemsize)
    for kernel, classes in (
        ("stats", ["one_sweep"]),
        ("forward", CLASSES),
        ("backward", CLASSES),
        ("terms", ["two_sweeps"]),
    )
    for of_class in classes
    for itemsize in TYPES
]


def kernels(which: Launch) -> list[tuple[str, str]]:
    """(kernel, divergence) of these launches."""
    if which.kernel == "stats":
        return [("stats", "hellinger")]
    variants: tuple[str, ...] = (which.kernel,)
    if which.kernel == "backward":
        variants = ("backward", "backward_ce")
    elif which.divergences == "both_kls":
        variants = ("forward", "kl")  # `token_kl` folds the same sums
    return [(variant, div) for variant in variants for div in CLASSES[which.divergences]]


def candidates(which: Launch, family: str) -> list[Row]:
    if which.kernel in package.ONE_TILE:
        return [{"warps": warps} for warps in WARPS[family]]
    return [{"tiles": tiles, "warps": warps} for warps in WARPS[family] for tiles in (2, 1)]


def on_trial(row: Row, family: str, which: Launch) -> AbstractContextManager[object]:
    """Inside, these launches take this row."""
    return mock.patch.dict(package.LAUNCH_TABLE[family], exceptions=[{**which._asdict(), **row}])


def codes(row: Row, family: str, which: Launch) -> Iterator[tuple[str, str, Code]]:
    """(target, divergence, code) of what the launches of a row compile to."""
    with on_trial(row, family, which):
        for target, gpu in TARGETS.items():
            if gpu.backend != family:
                continue
            for kernel, div in kernels(which):
                # Both KL divergences take the most registers, and most of them where rows do not start at 16 bytes.
                vocabularies = (VOCAB, 50_257) if which == Launch("forward", "both_kls", 2) else (VOCAB,)
                for vocab, (student, teacher) in itertools.product(vocabularies, TYPES[which.itemsize]):
                    with compiling_for(gpu) as launched:
                        launch(kernel, div, logits(vocab, student), logits(vocab, teacher))
                    yield target, div, read_code(launched[0])


def by_counts(family: str, which: Launch) -> tuple[Row, str]:
    """The row, and why no earlier candidate was taken."""
    clean: list[Row] = []
    refused = []
    for row in candidates(which, family):
        crowded = ""
        for target, div, code in codes(row, family, which):
            if (code.local_bytes or code.spills) and not code.spills_for_guards():
                refused.append(f"{row} spills in {div} on {target}")
                break
            if target == "sm_90" and code.occupancy() < 0.5:
                crowded = f"{row} fills {code.occupancy():.0%} of the warps with {div} on {target}"
        else:
            clean.append(row)
            if not crowded:
                return row, "; ".join(refused)
            refused.append(crowded)
    if not clean:
        raise RuntimeError(f"every candidate spills: {family}, {which}")
    first = candidates(which, family).index(clean[0])
    return clean[0], "; ".join(refused[:first])


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
    family: str, which: Launch, rows: int = ROWS, vocab: int = VOCAB, measure: Callable[..., float] = milliseconds
) -> tuple[Row, str]:
    """The row, and the times of all candidates."""
    times = []
    for row in candidates(which, family):
        with on_trial(row, family, which):
            times.append(max(measure(*names, TYPES[which.itemsize][0], rows, vocab) for names in kernels(which)))
    best = candidates(which, family)[times.index(min(times))]
    found = zip(candidates(which, family), times, strict=True)
    return best, ", ".join(f"{row} takes {milli:.2f} ms" for row, milli in found)


def family_table(family: str, chosen: dict[Launch, tuple[Row, str]]) -> dict[str, Any]:
    """The first candidate as the default, and what differs from it with the reason."""
    default = {"tiles": 2, "warps": WARPS[family][0]}
    exceptions = [
        {**which._asdict(), **row, "why": why.replace("'", "")}
        for which, (row, why) in chosen.items()
        if not row.items() <= default.items()
    ]
    return {"default": default, "exceptions": exceptions}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Choose the launch table.")
    parser.add_argument("--time", action="store_true", help="by the clock of this machine's GPU")
    timed = parser.parse_args(argv).time
    table = json.loads(TABLE.read_text())
    for family in [driver.active.get_current_target().backend] if timed else WARPS:
        chosen = {}
        for which in LAUNCHES:
            chosen[which] = (by_clock if timed else by_counts)(family, which)
            print(family, *which, *chosen[which], flush=True)
        table[family] = family_table(family, chosen)
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
