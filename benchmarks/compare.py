"""`make bench-compare BASE=<commit>`: the working tree beside an earlier commit, in turns.

Both are copied to `build/compare/`, with their C++ kernels built there, and each runs in a process of its own that
stays alive. In every round `base`, `new` and a second process of `base` run once, beginning with another one in each
round. The ratio of a round is new over base, of the time of all threads of the process on a CPU, else of the clock. The
ratio of base to itself beside it says what the machine alone makes of a ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from instruments.devices import ROOT, quantiles
from instruments.project_copy import copy_project

from .workloads import VOCABULARIES, Workload

FOLDER = ROOT / "build" / "compare"
PROVIDERS = {"logits": "ours in place", "hidden": "ours hidden"}


def check_out(commit: str, folder: Path) -> None:
    """The files of a commit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(f"error: BASE={commit!r} is no commit of this repository: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def build(folder: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True)


class Version:
    """A process that runs the package of a folder, and answers a line of JSON with one."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", "from benchmarks.compare_worker import main; main()", str(folder)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )

    def ask(self, **task: Any) -> dict[str, Any]:
        to, answers = self.process.stdin, self.process.stdout
        assert to is not None and answers is not None
        print(json.dumps(task), file=to, flush=True)
        for line in answers:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"a version ended with status {self.process.wait()}; its messages are above")

    def __enter__(self) -> Version:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def ratios(
    base: Path, new: Path, workloads: list[Workload], rounds: int, device: str, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """For each workload: median, 20th and 80th percentile of new over base, and of base over itself."""
    found = []
    with ExitStack() as stack:
        folders = {"base": base, "new": new, "again": base}
        versions = {name: stack.enter_context(Version(folder)) for name, folder in folders.items()}
        for w in workloads:
            fields = {key: value for key, value in w.record().items() if key != "vocab"}
            failed = {}
            for name, version in versions.items():
                answer = version.ask(workload=fields, provider=PROVIDERS[w.route], device=device)
                if "failed" in answer:
                    failed[name] = answer["failed"]
            if failed:
                found.append({"workload": w.record(), "failed": failed})
                say(f"{w}\n  not measured: {failed}")
                continue
            times: dict[str, list[float]] = {name: [] for name in versions}
            names = list(versions)
            for i in range(rounds):
                for name in names[i % 3 :] + names[: i % 3]:
                    times[name].append(versions[name].ask(run=True)["ms"])
            record = {
                "workload": w.record(), "ms": {name: statistics.median(times[name]) for name in ("base", "new")},
                "new_over_base": quantiles([a / b for a, b in zip(times["new"], times["base"], strict=True)]),
                "base_over_base": quantiles([a / b for a, b in zip(times["again"], times["base"], strict=True)]),
            }  # fmt: skip
            found.append(record)
            text = ["{median:.3f} [{p20:.3f}, {p80:.3f}]".format(**record[key]) for key in list(record)[2:]]
            say("{}\n  {:.1f} -> {:.1f} ms, ratio {}; base to itself {}".format(w, *record["ms"].values(), *text))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="a commit, a tag or a branch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--models", nargs="+", default=["llama2", "qwen2"], help=f"of {', '.join(VOCABULARIES)}")
    chosen = parser.parse_args(argv)
    base, new = FOLDER / "base", FOLDER / "new"
    check_out(chosen.base, base)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    copy_project(new)
    for folder in (base, new):
        build(folder)
    logits = [
        Workload(model=model, tokens=chosen.tokens, dtype=dtype, divergence=divergence)
        for model in chosen.models
        for dtype in ("fp32", "bf16")
        for divergence in ("reverse_kl", "jensen_shannon")
    ]
    hidden = Workload(route="hidden", model=chosen.models[0], tokens=chosen.tokens)
    ratios(base, new, [*logits, hidden], chosen.rounds, chosen.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
