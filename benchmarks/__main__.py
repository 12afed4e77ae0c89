"""`make bench`: losses of this package beside what users write and the peers that are installed.

One JSON line for each workload and provider, in a file for each benchmark. Those of README and docs are in
benchmarks/results/, which a run replaces if --out names it:

  peers     all providers side by side, for vocabularies by the name of a model
  scaling   time and memory against tokens, vocabulary, share and threads
  accuracy  errors against fp64, from teachers that nearly equal the student to distant ones
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import accuracy, workloads
from .frame import Bench
from .workloads import DTYPES, VOCABULARIES

ONLY = {
    "scaling": ("eager in chunks", "torch.compile in chunks", "ours", "ours in place"),
    "accuracy": (
        "eager", "torch.compile in chunks", "liger-kernel fused", "liger-kernel chunked", "trl", "orda-kernel", "ours",
    ),
}  # fmt: skip
"""Providers of a benchmark that does not take all of them."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmarks", nargs="*", help="which of the three; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--models", nargs="+", default=list(VOCABULARIES),
        help=f"vocabularies: {', '.join(f'{k} {v:,}' for k, v in VOCABULARIES.items())}, or any size (all)",
    )  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=int, help="64 to 4,096 (256; on a GPU 4096)")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="(fp32 bf16; on a GPU bf16)")
    parser.add_argument("--rounds", type=int, help="times each provider is run (5; on a GPU 30)")
    parser.add_argument("--providers", nargs="+", default=[], help="these alone, by name (all)")
    parser.add_argument(
        "--formula", action="append", default=[], metavar="FILE.py:FUNCTION",
        help="a formula of your own: student and teacher logits (N, V) and labels (N,) -> loss",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the folder of the files (build/bench; of a GPU build/bench-gpu)")
    chosen = parser.parse_args(argv)
    for name in chosen.benchmarks:
        if name not in ("peers", "scaling", "accuracy"):
            parser.error(f"there is no benchmark {name!r}; there are peers, scaling and accuracy")
    for name in chosen.models:
        if name not in VOCABULARIES and not (name.isdigit() and int(name) > 1):
            parser.error(f"--models takes {', '.join(VOCABULARIES)} or a number above 1, not {name!r}")
    if any(n < 1 for n in chosen.tokens or ()) or (chosen.rounds is not None and chosen.rounds < 2):
        parser.error("--tokens takes numbers from 1 on, --rounds from 2 on: a spread takes two")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA or ROCm device on this machine; make bench measures on the CPU")
    gpu = chosen.device == "cuda"
    chosen.out = chosen.out or Path("build/bench-gpu" if gpu else "build/bench")
    chosen.tokens = chosen.tokens or [4096 if gpu else 256]
    chosen.dtypes = chosen.dtypes or (["bf16"] if gpu else ["fp32", "bf16"])
    chosen.rounds = chosen.rounds or (30 if gpu else 5)
    return chosen


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.benchmarks or ("peers", "scaling", "accuracy"):
        path = chosen.out / f"{name}.jsonl"
        print(f"\n{name} -> {path}")
        with path.open("w") as out:
            only = tuple(chosen.providers) or ONLY.get(name, ())
            bench = Bench(name, chosen.device, out, chosen.rounds, tuple(chosen.formula), only)
            if name == "accuracy":
                accuracy.run(bench, list(DTYPES))
            else:
                of = workloads.peers if name == "peers" else workloads.scaling
                bench.run(of(chosen.device, chosen.models, chosen.tokens, chosen.dtypes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
