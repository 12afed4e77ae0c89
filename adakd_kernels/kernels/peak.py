"""The student's most likely entry of a row, its peak, and the sums of a row without it (docs/maths.md, section 4).

A confident row has nearly all its mass on one entry, and everything that its gradient there depends on is a sum over
the others: 1 − q of 1e-9 is lost beside q. The loops do not know the peak and add it to the sums of the lane that meets
it. After the loop that lane's entries, 1/LANES of the row, are read again: once for the peak, once for their sums
without it.
"""

import triton
import triton.language as tl

from .rows import ALIGNED, inside, lowest


@triton.jit
def load_lane(
    Row, start, skew, V: tl.constexpr, SKEWED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr
):
    """(first offset, logits) of what one lane met in LANES tiles, from offset `start` on: (LANES,), (LANES, VEC).

    −inf outside the row. The next ones start LANES²·VEC later. The shape is that of a tile, so that sums of a lane's
    entries add to those of the lanes as they lie. That the number of such rounds depends on the lane keeps them a loop:
    unrolled, they would take the registers of the sweeps.
    """
    first = start + tl.arange(0, LANES) * (LANES * VEC)
    offs_v = first[:, None] + tl.arange(0, VEC)[None, :]
    return first, tl.load(Row + offs_v, mask=inside(offs_v, skew, V, SKEWED), other=-float("inf")).to(ACC)


@triton.jit
def load_rest_of_lane(
    S, T, start, peak, skew, V: tl.constexpr, SKEWED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Both rows' logits by `load_lane`, −inf at the peak."""
    first, s = load_lane(S, start, skew, V, SKEWED, LANES, VEC, ACC)
    _, t = load_lane(T, start, skew, V, SKEWED, LANES, VEC, ACC)
    at_peak = (peak - first)[:, None] == tl.arange(0, VEC)[None, :]
    return tl.where(at_peak, -float("inf"), s), tl.where(at_peak, -float("inf"), t)


@triton.jit
def lane_of_peak(peak, LANES: tl.constexpr, VEC: tl.constexpr):
    """The lane that meets an offset."""
    return (peak // VEC) % LANES


@triton.jit
def lane_with_peak(m_s, l_s):
    """(maximum of the row, or the lowest number where it has no finite entry; the lowest lane that has it)."""
    highest, lane = tl.max(tl.where(l_s == 0.0, -float("inf"), m_s), 0, return_indices=True)
    return tl.maximum(highest, lowest(m_s.dtype)), lane


@triton.jit
def find_peak(
    S, T, m_s, lane, skew, V: tl.constexpr, SKEWED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(offset from the row's aligned start, teacher's logit there) of the row's maximum, the first in its lane.

    Where the row has no finite entry, the offset is one that no entry has and the logit −inf.
    """
    NOWHERE: tl.constexpr = V + ALIGNED
    place = tl.full((LANES,), NOWHERE, tl.int32)
    start = lane * VEC
    while start < V + skew:
        first, s = load_lane(S, start, skew, V, SKEWED, LANES, VEC, ACC)
        in_tile = tl.min(tl.where(s == m_s, tl.arange(0, VEC)[None, :], VEC), 1)
        place = tl.minimum(place, tl.where(in_tile < VEC, first + in_tile, NOWHERE))
        start += LANES * LANES * VEC
    peak = tl.min(place, 0)
    return peak, tl.load(T + peak, mask=peak < NOWHERE, other=-float("inf")).to(ACC)


@triton.jit
def store_peak(Peak, PeakGrad, n, peak, skew, counts, grad):
    """Store the peak's place in the row and τ·∂D/∂zˢ there; (−1, 0) where it does not count."""
    tl.store(Peak + n, tl.where(counts, peak - skew, -1).to(tl.int64))
    tl.store(PeakGrad + n, tl.where(counts, grad, 0.0))
