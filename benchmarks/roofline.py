"""Which resource of an H100 binds a kernel, from its machine code: a model, never compared with hardware.

For an entry of both rows, over the sweeps of a row, it adds up the clocks that one streaming multiprocessor (SM) needs
of each resource; the resource that needs the most binds. Left out: launch, the edges of a row, the last wave of
programs, caches. Rates: 3.35 TB/s, of which copies reach 90 %; 132 SMs at 1.755 GHz; an SM issues 4 x 32 lanes a clock,
and executes 128 lanes of fp32, 64 of comparison, integer and conversion, 16 of exponentials, 32 of loads. A load takes
800 clocks, during which all loads that the resident warps issue in a step are in flight.
"""

from __future__ import annotations

from instruments.compiled import Code, Loop

BANDWIDTH, COPY_RATE = 3.35e12, 0.9
SMS, CLOCK = 132, 1.755e9
LANES = {"issue": 128, "fma": 128, "alu": 64, "mufu": 16, "lsu": 32}
LATENCY = 800
CLOCKS_A_BYTE = SMS * CLOCK / BANDWIDTH


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


def clocks(code: Code, bytes_read: int) -> dict[str, float]:
    """Clocks of an SM by resource, of a kernel whose sweeps read `bytes_read` bytes for each entry of both rows."""
    found = dict.fromkeys(("memory", "latency", *LANES), 0.0)
    found["memory"] = bytes_moved(code, bytes_read) * CLOCKS_A_BYTE / COPY_RATE
    threads = code.occupancy() * 64 * 32
    for loop in code.sweeps:
        e = entries(loop, bytes_read)
        found["latency"] += LATENCY / (threads * e)
        for pipe, lanes in LANES.items():
            executed = loop.instructions if pipe == "issue" else loop.pipes[pipe]
            found[pipe] += executed / e / lanes
    return found


def bound(code: Code, bytes_read: int) -> str:
    """The resource that needs the most clocks."""
    found = clocks(code, bytes_read)
    return max(found, key=found.__getitem__)
