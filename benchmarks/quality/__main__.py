"""Runs the experiment of docs/quality.md, in pieces: each arm and seed that is not in the results yet.

Progress goes to stderr. A run that is stopped goes on: an arm that was trained is evaluated, an evaluation continues
with the next batch, and an arm in training begins again. Two processes may share the work by different `--seeds`, once
the teacher's line is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from adakd_kernels.demo.config import DemoConfig
from adakd_kernels.demo.models import locate_teacher, prepare_teacher, quiet_transformers
from instruments.devices import circumstances, device_of

from .arms import ARMS
from .experiment import START, TEACHER, Experiment, Plan

RESULTS = Path(__file__).parent.parent / "results" / "quality.jsonl"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="records to train on")
    add("--held_out", required=True, nargs="+", metavar="FILE", help="sets to evaluate on; NAME=FILE names one")
    add("--teacher", type=Path, help="folder of the teacher; left out, the demo's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the order of the data, and of the start")
    add("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="and those that they need; left out, all")
    add("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    add("--results", type=Path, default=RESULTS, help="JSON lines; a run that is there is not run again")
    add("--work_dir", type=Path, default=Path("quality_output"), help="for what is not done yet")
    for name, value in Plan.__dataclass_fields__.items():
        if name != "draws":
            add(f"--{name}", type=type(value.default), default=value.default, help="of the plan")
    options = parser.parse_args(argv)
    plan = Plan(**{name: getattr(options, name) for name in Plan.__dataclass_fields__ if name != "draws"})
    begin = time.monotonic()
    quiet_transformers()
    demo = DemoConfig(dtype="bfloat16")
    teacher = options.teacher or prepare_teacher(demo, locate_teacher(demo))
    experiment = Experiment(plan, teacher, options.train, options.held_out, options.work_dir)
    same = as_json({"plan": asdict(plan), "inputs": experiment.inputs})
    if others := [
        line["arm"] for line in read_results(options.results) if {key: line.get(key) for key in same} != same
    ]:
        parser.error(
            f"{options.results} holds runs of another plan, teacher or data ({', '.join(others)}): "
            "give another --results"
        )
    device = device_of("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {START, *options.arms, *(need for arm in options.arms for need in ARMS[arm].needs)}
    todo: list[tuple[str, int | None]] = [(TEACHER, None)]
    todo += [(arm, seed) for seed in options.seeds for arm in (START, *ARMS) if arm in wanted]
    for arm, seed in todo:
        done = {(line["arm"], line["seed"]): line for line in read_results(options.results)}
        if (arm, seed) in done:
            continue
        if time.monotonic() - begin > 60 * options.minutes:
            break
        print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
        before = {name: line for (name, other), line in done.items() if other == seed}
        line = experiment.run(arm, seed, before) | circumstances(device)
        add_result(options.results, line)
        experiment.forget(arm, seed)


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """As a line of results has it."""
    result: dict[str, Any] = json.loads(json.dumps(found))
    return result


def read_results(path: Path) -> list[dict[str, Any]]:
    """The whole lines of results; none where there is no file."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def add_result(path: Path, line: dict[str, Any]) -> None:
    """Put a line at the end; a last line that a killed run left unfinished is taken off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    main()
