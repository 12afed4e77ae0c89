"""The one frame of all timings: a gate, peak memory in a process of its own, then the providers in turns.

Gate: loss and gradients of each provider beside fp64. An error above twice that of eager in chunks in the same type,
plus a few units in the last place, goes on record, and no time is taken. Memory: a process for each provider, in which
that alone runs; what does not fit into the memory that is free fails there, and is not timed. Time: in every round each
provider runs once on fresh copies of the inputs, beginning with another one in each round; medians with 20th and 80th
percentile. On a CPU the time that the process spent on all cores stands beside the wall clock: it does not grow where
other programs take a core away.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from instruments.devices import ROOT, Cpu, Gpu, circumstances, copy_speed, device_of, forget_peak, quantiles, resident

from .providers import Provider, Run, exact, providers
from .workloads import DTYPES, Inputs, Workload, inputs

UNITS = 4.0
"""Beside twice the error of eager in chunks: units in the last place of the type, relative to the largest entry."""
Record = dict[str, Any]


def fresh(x: Inputs) -> Inputs:
    """Copies, since a provider may write over its inputs."""
    return {name: value.clone() for name, value in x.items()}


def error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest error of loss and gradients, each relative to its largest entry."""
    smallest = torch.finfo(torch.float32).tiny
    return max(
        ((x.double() - y).abs().max() / y.abs().max().clamp_min(smallest)).item()
        for x, y in zip(got, expected, strict=True)
    )


def reason(failure: BaseException) -> str:
    text = str(failure).strip()
    return f"{type(failure).__name__}: {text.splitlines()[0] if text else 'no message'}"


def gate(w: Workload, found: dict[str, Provider], x: Inputs, device: str) -> dict[str, Record]:
    """The error of each provider, and why it is refused."""
    expected = exact(device)(x, w)
    yardstick = error(providers(w, device)["eager in chunks"].run(fresh(x), w), expected)
    allowed = 2.0 * yardstick + UNITS * torch.finfo(DTYPES[w.dtype]).eps
    records: dict[str, Record] = {}
    for name, provider in found.items():
        record = records[name] = {}
        if missing := provider.needs(device):
            record["failed"] = missing
            continue
        try:
            record["error"] = error(provider.run(fresh(x), w), expected)
        except Exception as failure:  # a peer's failure is a result
            record["failed"] = reason(failure)
            continue
        if not record["error"] <= allowed:
            record["failed"] = f"error {record['error']:.2e} is above {allowed:.2e}"
    return records


def timed(device: Gpu | Cpu, call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds: of the clock, and of all threads of this process."""
    start = time.process_time()
    wall = device.milliseconds(call)
    return wall, (time.process_time() - start) * 1e3


def in_turns(device: Gpu | Cpu, w: Workload, runs: dict[str, Run], x: Inputs, rounds: int) -> dict[str, Record]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            copies = fresh(x)  # not timed: what a model would just have written
            times[name].append(timed(device, partial(runs[name], copies, w)))
    found = {}
    for name, pairs in times.items():
        wall, of_threads = zip(*pairs, strict=True)
        found[name] = {"ms": quantiles(list(wall)), "rounds": rounds}
        if device.device == "cpu":
            found[name]["cpu_ms"] = quantiles(list(of_threads))
    return found


def available() -> int:
    """Bytes that this machine could still give, by Linux's own estimate."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")


def peak(w: Workload, provider: Provider, device: Gpu | Cpu) -> int:
    """Bytes beside the inputs that a run holds at its peak: of the device, or resident in this process."""
    x = inputs(w, device.device)
    if device.device == "cuda":
        return device.peak_bytes(lambda: provider.run(x, w))
    gc.collect()
    before, _ = resident()
    forget_peak()
    result = provider.run(x, w)
    highest = resident()[1]
    del result
    return highest - before


def measure_peaks() -> None:
    """The other side of `peaks`: the task on standard input, a line of JSON for each workload on standard output."""
    task = json.load(sys.stdin)
    device = device_of(task["device"])
    if device.device == "cpu":
        import resource

        limit = available()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    threads = torch.get_num_threads()
    workloads = [Workload(**fields) for fields in task["workloads"]]
    for w in workloads:
        torch.set_num_threads(w.threads or threads)
        try:
            provider = providers(w, device.device, tuple(task["formulas"]))[task["provider"]]
            provider.run(inputs(w, device.device), w)  # libraries load what they need, torch.compile compiles
            found: Record = {"peak_bytes": peak(w, provider, device)}
        except Exception as failure:
            found = {"failed": reason(failure)}
        print(json.dumps(found), flush=True)


def peaks(provider: str, workloads: list[Workload], device: str, formulas: tuple[str, ...]) -> list[Record]:
    """Peak memory of one provider, in a process of its own; of all workloads after one that it did not survive, why."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return [{} for _ in workloads]  # the peak is read from Linux
    task = {
        "provider": provider, "device": device, "formulas": formulas, "workloads": [asdict(w) for w in workloads],
    }  # fmt: skip
    command = [sys.executable, "-c", "from benchmarks.frame import measure_peaks; measure_peaks()"]
    # What is freed goes back to the system at once, so that pages of one run do not serve the next.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=json.dumps(task), capture_output=True, text=True
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last = done.stderr.strip().splitlines()[-1:] or [f"its process ended with status {done.returncode}"]
    return found + [{"failed": f"in a process of its own: {last[0]}"}] * (len(workloads) - len(found))


class Bench:
    """A benchmark's workloads, measured one after the other; each provider's record is written when it is there."""

    def __init__(
        self, name: str, device: str, out: TextIO, rounds: int, formulas: tuple[str, ...] = (),
        only: tuple[str, ...] = (), memory: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.device, self.out, self.rounds = name, device_of(device), out, rounds
        self.formulas, self.only, self.memory = formulas, only, memory
        self.around = circumstances(self.device)
        self.copy_rates: dict[int, float] = {}

    def providers(self, w: Workload) -> dict[str, Provider]:
        found = providers(w, self.device.device, self.formulas)
        return {name: p for name, p in found.items() if not self.only or name in (*self.only, *self.formulas)}

    def copy_rate(self) -> float:
        """Bytes a second of a copy, with as many threads as there are now."""
        threads = torch.get_num_threads()
        if threads not in self.copy_rates:
            self.copy_rates[threads] = copy_speed(self.device, self.device.size(2**30, 2**28))
        return self.copy_rates[threads]

    def run(self, workloads: Iterable[Workload], say: Callable[[str], None] = print) -> list[Record]:
        workloads = list(workloads)
        found = []
        memory = self.peaks_of(workloads) if self.memory else {}
        threads = torch.get_num_threads()
        for i, w in enumerate(workloads):
            torch.set_num_threads(w.threads or threads)
            say(f"\n[{i + 1}/{len(workloads)}] {w}")
            for record in self.measure(w, {name: memory.get((name, w), {}) for name in self.providers(w)}):
                print(json.dumps(record), file=self.out, flush=True)
                say(f"  {line(record)}")
                found.append(record)
        torch.set_num_threads(threads)
        return found

    def peaks_of(self, workloads: list[Workload]) -> dict[tuple[str, Workload], Record]:
        found: dict[tuple[str, Workload], Record] = {}
        by_provider: dict[str, list[Workload]] = {}
        for w in workloads:
            for name, provider in self.providers(w).items():
                if provider.needs(self.device.device) is None:
                    by_provider.setdefault(name, []).append(w)
        for name, of in by_provider.items():
            for w, record in zip(of, peaks(name, of, self.device.device, self.formulas), strict=True):
                found[name, w] = record
        return found

    def measure(self, w: Workload, memory: dict[str, Record]) -> list[Record]:
        found = self.providers(w)
        x = inputs(w, self.device.device)
        alive = {name: provider for name, provider in found.items() if "failed" not in memory[name]}
        records = {name: {**memory[name]} for name in found}
        for name, record in gate(w, alive, x, self.device.device).items():
            records[name] |= record
        passing = {name: provider.run for name, provider in alive.items() if "failed" not in records[name]}
        for name, record in in_turns(self.device, w, passing, x, self.rounds).items():
            records[name] |= record
        shared: Record = {"benchmark": self.name, "workload": w.record()}
        rate = self.copy_rate()
        if w.floor_bytes is not None:
            shared |= {"floor_bytes": w.floor_bytes, "floor_ms": w.floor_bytes / rate * 1e3}
        shared |= {"copy_gb_per_s": rate / 1e9}
        return [{**shared, "provider": name, **record, **self.around} for name, record in records.items()]


def line(record: Record) -> str:
    """A record for the eye."""
    name = f"{record['provider']:<24}"
    if "failed" in record:
        return f"{name} not measured: {record['failed']}"
    times = "{median:8.1f} ms [{p20:.1f}, {p80:.1f}]".format(**record["ms"])
    cpu = f", {record['cpu_ms']['median']:.1f} ms of all threads" if "cpu_ms" in record else ""
    floor = f", floor {record['floor_ms']:.1f} ms" if "floor_ms" in record else ""
    memory = f", {record['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in record else ""
    return f"{name} {times}{cpu}{floor}{memory}, error {record['error']:.1e}"
