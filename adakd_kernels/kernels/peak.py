"""The student's most likely entry of a row, its peak, and the sums of a row without it (docs/maths.md, sections 4 and 5).

A confident row has nearly all its mass on one entry, and everything that its gradient there depends on is a sum over the
others: 1 − q of 1e-9 is lost beside q. The loops do not know the peak and add it to the sums of the lane that meets it.
After the loop that lane's entries, 1/LANES of the row, are read again: once for the peak, once for their sums without.
"""

import triton
import triton.language as tl

from .launch import ALIGNED_ENTRIES
from .rows import inside


@triton.constexpr_function
def lane_rounds(V, LANES, VEC, SKEWED):
    """How many tiles take the tiles of a row, one entry of the first axis each, from its aligned start."""
    tiles = -(-(V + (ALIGNED_ENTRIES - 1 if SKEWED else 0)) // (LANES * VEC))
    return -(-tiles // LANES)


@triton.jit
def load_lane(
    Row, i, lane, skew, V: tl.constexpr, SKEWED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(offsets, logits) of what one lane met in tiles i·LANES to (i + 1)·LANES: (LANES, VEC), −inf outside the row."""
    tiles = i * LANES + tl.arange(0, LANES)
    offs_v = tiles[:, None] * (LANES * VEC) + lane * VEC + tl.arange(0, VEC)[None, :]
    return offs_v, tl.load(Row + offs_v, mask=inside(offs_v, skew, V, SKEWED), other=-float("inf")).to(ACC)


@triton.jit
def load_rest_of_lane(
    S, T, i, lane, peak, skew, V: tl.constexpr, SKEWED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Both rows' logits by `load_lane`, −inf at the peak."""
    offs_v, s = load_lane(S, i, lane, skew, V, SKEWED, LANES, VEC, ACC)
    _, t = load_lane(T, i, lane, skew, V, SKEWED, LANES, VEC, ACC)
    return tl.where(offs_v == peak, -float("inf"), s), tl.where(offs_v == peak, -float("inf"), t)


@triton.jit
def lane_of_peak(peak, LANES: tl.constexpr, VEC: tl.constexpr):
    """The lane that meets an offset."""
    return (peak // VEC) % LANES


@triton.jit
def find_peak(
    S, T, m_s, l_s, skew, V: tl.constexpr, SKEWED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(offset from the row's aligned start, teacher's logit there) from the lanes' maxima and sums.

    The first of equal entries of the lowest lane. Where a row has no finite entry, or NaN hides it, the offset is one
    that no entry has and the logit −inf.
    """
    ROUNDS: tl.constexpr = lane_rounds(V, LANES, VEC, SKEWED)
    NOWHERE: tl.constexpr = ROUNDS * LANES * LANES * VEC
    highest, lane = tl.max(tl.where(l_s == 0.0, -float("inf"), m_s), 0, return_indices=True)
    first = tl.full((LANES,), NOWHERE, tl.int32)
    for i in range(0, ROUNDS):
        offs_v, s = load_lane(S, i, lane, skew, V, SKEWED, LANES, VEC, ACC)
        first = tl.minimum(first, tl.min(tl.where(s == highest, offs_v, NOWHERE), 1))
    peak = tl.where(highest == -float("inf"), NOWHERE, tl.min(first, 0))
    return peak, tl.load(T + peak, mask=peak < NOWHERE, other=-float("inf")).to(ACC)


@triton.jit
def store_peak(Peak, PeakGrad, n, peak, skew, counts, grad):
    """Store the peak's place in the row and τ·∂D/∂zˢ there; (−1, 0) where it does not count."""
    tl.store(Peak + n, tl.where(counts, peak - skew, -1).to(tl.int64))
    tl.store(PeakGrad + n, tl.where(counts, grad, 0.0))
