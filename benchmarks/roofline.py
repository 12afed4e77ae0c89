"""What an H100 can do at best and at worst with a kernel, from its machine code: a model, never compared with hardware.

All is counted for an entry of both rows, over the sweeps of a row, in clocks of one streaming multiprocessor (SM). The
lower end takes whatever is busiest, everything else hidden behind it; the upper end adds to the memory's time that of
the busiest other resource, as if nothing overlapped. Left out: launch, the edges of a row, the last wave of programs,
caches. Rates: 3.35 TB/s, of which copies reach 90 %; 132 SMs at 1.755 GHz; an SM issues 4 x 32 lanes a clock, and
executes 128 lanes of fp32, 64 of comparison, integer and conversion, 16 of exponentials, 32 of loads. A load takes 800
clocks; what the resident warps ask for in a step is in flight meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from instruments.compiled import Code, Loop

BANDWIDTH, SHARE_OF_COPIES = 3.35e12, 0.9
SMS, CLOCK = 132, 1.755e9
LANES = {"issue": 128, "fma": 128, "alu": 64, "mufu": 16, "lsu": 32}
LATENCY = 800
CLOCKS_A_BYTE = SMS * CLOCK / BANDWIDTH


@dataclass(frozen=True)
class Bracket:
    """Clocks of an SM for an entry of both rows."""

    floor: float  # the bytes at the full bandwidth
    lower: float
    upper: float
    bound: str  # the resource that sets the lower end

    def microseconds(self, rows: int, vocab: int) -> tuple[float, float]:
        """(lower, upper) for a whole tensor."""
        a_clock = rows * vocab / SMS / CLOCK * 1e6
        return self.lower * a_clock, self.upper * a_clock


def entries(loop: Loop, bytes_read: int) -> float:
    """Entries of both rows that a thread takes in a round, if it reads `bytes_read` for each."""
    return loop.load_bytes / bytes_read


def bytes_written(loop: Loop) -> int:
    return sum(bits // 8 * n for bits, n in loop.stores.items())


def bracket(code: Code, bytes_read: int) -> Bracket:
    """Of a kernel whose sweeps read `bytes_read` bytes for each entry of both rows."""
    clocks = dict.fromkeys(("memory", "latency", *LANES), 0.0)
    moved = 0.0
    threads = code.occupancy() * 64 * 32
    for loop in code.sweeps:
        e = entries(loop, bytes_read)
        moved += (loop.load_bytes + bytes_written(loop)) / e
        clocks["latency"] += LATENCY / (threads * e)
        for pipe, lanes in LANES.items():
            count = loop.instructions if pipe == "issue" else loop.pipes[pipe]
            clocks[pipe] += count / e / lanes
    floor = moved * CLOCKS_A_BYTE
    clocks["memory"] = floor / SHARE_OF_COPIES
    bound = max(clocks, key=clocks.__getitem__)
    busiest_other = max(value for name, value in clocks.items() if name != "memory")
    return Bracket(floor, clocks[bound], clocks["memory"] + busiest_other, bound)
