"""Which resource of a GPU binds a kernel, from its machine code: a model, never compared with hardware.

For an entry of both rows, over the sweeps of a row, it adds up the clocks that one streaming multiprocessor (SM) needs
of each resource; the resource that needs the most binds. Left out: launch, the edges of a row, the last wave of
programs, caches. Copies reach 90 % of the bandwidth; an SM issues 4 x 32 lanes a clock, and executes 128 lanes of fp32
(64 on the A100), 64 of comparison, integer and conversion, 16 of exponentials, 32 of loads. A load takes 800 clocks,
during which all loads that the resident warps issue in a step are in flight.
"""

from __future__ import annotations

from typing import NamedTuple

from instruments.compiled import MACHINES, Code, Loop

COPY_RATE = 0.9
LATENCY = 800


class Gpu(NamedTuple):
    """Bandwidth by the vendor's data sheet, lanes by the architecture's whitepaper."""

    bandwidth: float  # bytes a second
    clock: float  # a second
    target: str  # what its kernels are compiled for
    fma: int = 128  # lanes of fp32 of an SM

    @property
    def sms(self) -> int:
        return MACHINES[self.target].processors

    @property
    def clocks_a_byte(self) -> float:
        return self.sms * self.clock / self.bandwidth

    @property
    def lanes(self) -> dict[str, int]:
        return {"issue": 128, "fma": self.fma, "alu": 64, "mufu": 16, "lsu": 32}


# Boost clocks; that of the B200, which its data sheet leaves out, follows from its 75 TFLOPS in fp32.
GPUS = {
    "A100": Gpu(2.039e12, 1.41e9, "sm_80", fma=64),  # A100 80GB SXM data sheet, 2022; GA100 whitepaper
    "H100": Gpu(3.35e12, 1.755e9, "sm_90"),  # H100 SXM data sheet, 2023; GH100 whitepaper
    "H200": Gpu(4.8e12, 1.755e9, "sm_90"),  # H200 SXM data sheet, 2024: the same chip
    "B200": Gpu(8.0e12, 1.98e9, "sm_100"),  # HGX B200 data sheet, 2024
}
H100 = GPUS["H100"]


def entries(loop: Loop, bytes_read: int) -> float:
    """Entries of both rows that a thread takes in a round, if it reads `bytes_read` for each."""
    return loop.load_bytes / bytes_read


def bytes_moved(code: Code, bytes_read: int) -> float:
    """Bytes read and written for an entry of both rows, over the sweeps."""
    moved = 0.0
    for loop in code.sweeps:
        written = sum(bits // 8 * n for bits, n in loop.stores.items())
        moved += bytes_read + written / entries(loop, bytes_read)
    return moved


def clocks(code: Code, bytes_read: int, gpu: Gpu = H100) -> dict[str, float]:
    """Clocks of an SM by resource, of a kernel whose sweeps read `bytes_read` bytes for each entry of both rows."""
    found = dict.fromkeys(("memory", "latency", *gpu.lanes), 0.0)
    found["memory"] = bytes_moved(code, bytes_read) * gpu.clocks_a_byte / COPY_RATE
    threads = code.occupancy() * 64 * 32
    for loop in code.sweeps:
        e = entries(loop, bytes_read)
        found["latency"] += LATENCY / (threads * e)
        for pipe, lanes in gpu.lanes.items():
            executed = loop.instructions if pipe == "issue" else loop.pipes[pipe]
            found[pipe] += executed / e / lanes
    return found


def bound(code: Code, bytes_read: int, gpu: Gpu = H100) -> str:
    """The resource that needs the most clocks."""
    found = clocks(code, bytes_read, gpu)
    return max(found, key=found.__getitem__)


def over_memory(code: Code, bytes_read: int, gpu: Gpu) -> tuple[float, str]:
    """The clocks of the resource that needs the most beside memory, over those of the memory; and its name."""
    found = clocks(code, bytes_read, gpu)
    memory = found.pop("memory")
    most = max(found, key=found.__getitem__)
    return found[most] / memory, most
