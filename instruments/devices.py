"""What measuring and testing ask of a device, for a GPU and, so that the same code runs without one, for the CPU.

Finds time, peak memory, hidden waits for the device and what a number was measured on. On the CPU it cannot find a
missing synchronisation of streams (there are none), and of waits only those that the operators of torch show; the peak
of the CPU counts torch's own allocations alone, `resident` all memory of the process.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from adakd_kernels import ops

ROOT = Path(__file__).parent.parent
PACKAGES = (
    *("torch", "triton", "adakd-kernels", "liger-kernel", "orda-kernel", "trl"),
    *("transformers", "accelerate", "rouge-score"),
)


class _Produced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def produced(leaf: Tensor) -> Tensor:
    """The leaf's memory as the result of an operator, without a copy: like a model's logits, a gradient may replace it.

    The leaf itself is overwritten then, which `inplace=True` refuses to do to a leaf that it can see.
    """
    result: Tensor = _Produced.apply(leaf)
    return result


class Gpu:
    """The current CUDA or ROCm device."""

    device = "cuda"
    compiler = "inductor"

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        return {
            "machine": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "runtime": torch.version.cuda or torch.version.hip,
        }

    def size(self, real: int, small: int) -> int:
        """The size that a test or a benchmark is about; on the CPU the small one."""
        return real

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Time of a call on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """The most memory that a call holds beside what was held before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @contextlib.contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """Inside, whatever makes the host wait for the device raises an error."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """A stream of its own that is late: what runs on another one meanwhile finds the inputs unwritten."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, function: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], tuple[torch.Tensor, ...]]:
        """A CUDA graph of the call, which reads and writes the same memory at each replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()

        def replay() -> tuple[torch.Tensor, ...]:
            graph.replay()
            return results

        return replay


class Cpu:
    """Stands in for a GPU. It measures what it says, and for what only a GPU has it does the nearest thing."""

    device = "cpu"
    compiler = "aot_eager"  # traces as inductor does, and needs no C++ compiler

    def describe(self) -> dict[str, Any]:
        return {"machine": _processor(), "threads": torch.get_num_threads()}

    def synchronize(self) -> None:
        """Nothing runs on after a call."""

    def size(self, real: int, small: int) -> int:
        return small

    def free_bytes(self) -> int:
        return 2**62

    def milliseconds(self, function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        gc.collect()  # what is freed meanwhile counts against what the call allocates
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            function()
        held = peak = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    @contextlib.contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """Refuses what would wait on a GPU: values read by the host, shapes that depend on them, numbers sent over."""

        def refuse(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(data: Any, *args: Any, **kwargs: Any) -> Any:
                if not isinstance(data, torch.Tensor):
                    raise RuntimeError(f"torch.{name} of {data!r} would copy it to the device and wait")
                return function(data, *args, **kwargs)

            return call

        with contextlib.ExitStack() as stack:
            for name in ("tensor", "as_tensor"):
                stack.enter_context(mock.patch.object(torch, name, refuse(name, getattr(torch, name))))
            stack.enter_context(_NothingWaits())
            yield

    def side_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capture(self, function: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], tuple[torch.Tensor, ...]]:
        results = function()

        def replay() -> tuple[torch.Tensor, ...]:
            for result, value in zip(results, function(), strict=True):
                result.copy_(value)
            return results

        return replay


class _NothingWaits(TorchDispatchMode):
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if namespace == "aten" and (by_mask or name.startswith(self.WAITS)):
            raise RuntimeError(f"{func} would wait for the device")
        return func(*args, **(kwargs or {}))


def device_of(device_type: str) -> Gpu | Cpu:
    """Of a torch device's type, "cuda" or "cpu"."""
    return Gpu() if device_type == "cuda" else Cpu()


def _processor() -> str:
    """The name that Linux gives the processor, or what Python knows of it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(": ")[1]
    return f"{platform.machine()} {platform.processor()}".strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def circumstances(device: Gpu | Cpu) -> dict[str, Any]:
    """What a number is worth nothing without: machine, versions, commit, day, and the implementation that was taken."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    backend = ops.backend(device.device)
    return {
        **device.describe(),
        "versions": {"python": sys.version.split()[0], **{package: _version(package) for package in PACKAGES}},
        "commit": git.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
        "backend": backend.name,
        "backend_because": backend.reason,
    }


def copy_speed(device: Gpu | Cpu, size: int = 2**30) -> float:
    """Bytes a second of a copy of `size` bytes, read and written."""
    x = torch.zeros(size, dtype=torch.uint8, device=device.device)
    y = torch.empty_like(x)
    times = [device.milliseconds(lambda: y.copy_(x)) for _ in range(12)]
    return 2 * x.numel() / (quantiles(times[2:])["median"] * 1e-3)


def resident() -> tuple[int, int]:
    """Resident bytes of this process: now, and at the peak. Linux only."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    fields = {words[0]: int(words[1]) * 1024 for words in lines if words and words[0] in ("VmRSS:", "VmHWM:")}
    return fields["VmRSS:"], fields["VmHWM:"]


def forget_peak() -> None:
    """From here on, the peak of `resident` starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}
