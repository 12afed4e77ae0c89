"""The student's most likely entry of a row, its peak, and the sums of a row without it (docs/maths.md, section 4).

A confident row has nearly all its mass on one entry, and everything that its gradient there depends on is a sum over
the others: 1 − q of 1e-9 is lost beside q. The loops do not know the peak and add it to the sums of the lane that meets
it. After the loop that lane's entries, 1/LANES of the row, are read again: once for the peak, once for their sums
without it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import ALIGNED, inside, lowest


class TokenResult(NamedTuple):
    """What a forward finds of a token beside its normalisers."""

    d: tl.tensor  # D
    sum_g: tl.tensor  # Σg
    peak: tl.tensor  # offset of the student's peak from the row's aligned start
    t_peak: tl.tensor  # the teacher's logit there
    peak_grad: tl.tensor  # τ·∂D/∂zˢ there


@triton.jit
def load_lane(Row, start, rows):
    """(first offset, logits) of LANES runs that one lane met, from offset `start` on: (LANES,), (LANES, WIDTH).

    −inf outside the row. The next ones start LANES²·WIDTH later. A thread has a run as it has a lane of a tile, so that
    sums of the runs add to those of the lanes in place. That the number of such rounds depends on the lane keeps them a
    loop: unrolled, they would take the registers of the sweeps.
    """
    first = start + tl.arange(0, rows.LANES) * (rows.LANES * rows.WIDTH)
    offs_v = first[:, None] + tl.arange(0, rows.WIDTH)[None, :]
    z = tl.load(Row + offs_v, mask=inside(offs_v, rows.skew, rows.V, rows.SKEWED), other=-float("inf"))
    return first, z.to(rows.scale.dtype)


@triton.jit
def load_rest_of_lane(rows, start, peak):
    """Both rows' logits by `load_lane`, −inf at the peak."""
    first, s = load_lane(rows.S, start, rows)
    _, t = load_lane(rows.T, start, rows)
    at_peak = (peak - first)[:, None] == tl.arange(0, rows.WIDTH)[None, :]
    return tl.where(at_peak, -float("inf"), s), tl.where(at_peak, -float("inf"), t)


@triton.jit
def lane_of_peak(peak, rows):
    """The lane that meets an offset."""
    return (peak // rows.WIDTH) % rows.LANES


@triton.jit
def lane_with_peak(m_s, l_s):
    """(maximum of the row, or the lowest number where it has no finite entry; the lowest lane that has it)."""
    highest, lane = tl.max(tl.where(l_s == 0.0, -float("inf"), m_s), 0, return_indices=True)
    return tl.maximum(highest, lowest(m_s.dtype)), lane


@triton.jit
def find_peak(rows, m_s, lane):
    """(offset from the row's aligned start, teacher's logit there) of the row's maximum, the first in its lane.

    Where the row has no finite entry, the offset is one that no entry has and the logit −inf.
    """
    nowhere = rows.V + ALIGNED
    place = tl.zeros((rows.LANES,), tl.int32) + nowhere
    start = lane * rows.WIDTH
    while start < rows.V + rows.skew:
        first, s = load_lane(rows.S, start, rows)
        # (LANES,) the first entry of a run that is the maximum, WIDTH where none is.
        in_tile = tl.min(tl.where(s == m_s, tl.arange(0, rows.WIDTH)[None, :], rows.WIDTH), 1)
        place = tl.minimum(place, tl.where(in_tile < rows.WIDTH, first + in_tile, nowhere))
        start += rows.LANES * rows.LANES * rows.WIDTH
    peak = tl.min(place, 0)
    t_peak = tl.load(rows.T + peak, mask=peak < nowhere, other=-float("inf"))
    return peak, t_peak.to(rows.scale.dtype)


@triton.jit
def store_peak(Peak, PeakGrad, n, peak, skew, finite, grad):
    """Store the peak's place in the row and τ·∂D/∂zˢ there; (−1, 0) where the peak is no finite entry."""
    tl.store(Peak + n, tl.where(finite, peak - skew, -1).to(tl.int64))
    tl.store(PeakGrad + n, tl.where(finite, grad, 0.0))
