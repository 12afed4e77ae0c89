"""What all kernels use: addressing a row, loading a tile of it, and the form of its normaliser.

A tile is (LANES, VEC) entries, consecutive in memory: VEC are one load of 16 bytes, LANES the threads of a program. A
step of a sweep takes one tile or two (TILES), so that what a lane pays for a step is shared by more entries. Every lane
folds its own entries, and the lanes meet once, after the row: no loop has a reduction across threads, or a barrier.

Lane i has the entries i·VEC to i·VEC + VEC − 1 of a tile. Where the rows' places in memory allow no load wider than an
entry, it has i, i + LANES, i + 2·LANES and so on: its runs of consecutive entries have a WIDTH of 1 and not of VEC.

Logits are in the accumulation type. Differences of two are taken in a unit of 2²⁴, in which none leaves the type's
range and neither does a sum of them over a row; `scale` turns one into a power of two (2²⁴·log2(e)/τ). Maxima start at
the lowest finite number, so that every finite logit is above or at them, and a tile of nothing but −inf folds to zero
sums.

What belongs together travels as a named tuple, of tensors and of constants: Triton takes tuples apart when it compiles.
"""

import sys
from typing import NamedTuple

import triton
import triton.language as tl

from .launch import ALIGNED_ENTRIES

UNIT = tl.constexpr(2.0**-24)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.925963033500e-8)  # what fp32 leaves of log2(e)
LN2 = tl.constexpr(0.6931471805599453)
ALIGNED = tl.constexpr(ALIGNED_ENTRIES)


class Rows(NamedTuple):
    """The two rows of a token, and how a program walks over them.

    Made where it is passed to a function: an assignment would make Triton take its constants for tensors.
    """

    S: tl.tensor  # pointer to the student's aligned entry at or before its first
    T: tl.tensor  # the same of the teacher
    skew: tl.tensor  # entries from there to the first, in both rows
    scale: tl.tensor  # `exponent_scale` of the token's temperature; its type is the accumulation type
    V: tl.constexpr  # entries of the common vocabulary; where the rows are a part of longer ones, a number
    SKEWED: tl.constexpr  # whether the skew may differ from 0; likewise
    TILES: tl.constexpr  # tiles a step
    LANES: tl.constexpr  # of a tile
    VEC: tl.constexpr  # entries of a lane in a tile
    WIDTH: tl.constexpr  # how many of them are consecutive: all VEC, or 1 where they lie LANES apart


class Normalizers(NamedTuple):
    """The normalisers of a token: maximum m and sum l of 2^((z − m)·scale), of student and teacher."""

    m_s: tl.tensor
    l_s: tl.tensor
    m_t: tl.tensor
    l_t: tl.tensor


@triton.constexpr_function
def lowest(dtype):
    """The lowest finite number of an accumulation type."""
    return -sys.float_info.max if dtype == tl.float64 else -(2.0 - 2.0**-23) * 2.0**127


@triton.jit
def saturated(x):
    """x cut off at the type's range; NaN stays."""
    LOWEST: tl.constexpr = lowest(x.dtype)
    x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, -LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def halves(x):
    """x as two numbers of 12 bits, whose products with another's are exact."""
    high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def exponent_scale(tau):
    """2²⁴·log2(e)/τ: what turns a difference of logits, in its unit, into a power of two."""
    return saturated(tl.full((), LOG2E / UNIT, tau.dtype) / tau)


@triton.jit
def exponent_rounding(tau):
    """The relative rounding error of `exponent_scale`: up to 6e-8 in fp32, and 0 where the scale is cut off.

    A tail of 1e-9 of the mass lies 30 powers of e below the peak, and there it is moved by 2e-6.
    """
    if tau.dtype == tl.float32:
        s_1, s_2 = halves(exponent_scale(tau))
        t_1, t_2 = halves(tau)
        # log2(e)·2²⁴ − scale·τ, where every product of two halves is exact, and so is each difference.
        left = (((tl.full((), LOG2E / UNIT, tl.float32) - s_1 * t_1) - s_1 * t_2) - s_2 * t_1) - s_2 * t_2
        rounding = left * (UNIT / LOG2E) + LOG2E_REST / LOG2E
        rounding = tl.where(tl.abs(rounding) < 1e-6, rounding, 0.0)
    else:
        rounding = 0.0 * tau
    return rounding


@triton.jit
def below(z, m):
    """(z − m)·2⁻²⁴, rounded once. The product with a power of two is exact, so that this is one multiply-add."""
    return z * UNIT - m * UNIT


@triton.jit
def row_start(Logits, n, L, stride_b, stride_l, unit, lead, SKEWED: tl.constexpr):
    """(pointer, skew): row n of a (B, L, V) tensor begins `skew` entries after the pointer, see `launch.row_strides`.

    A skewed row is read from the aligned entry at or before its first. The tensor itself starts `lead` entries after
    one, or at one if `lead` is None. 64 bits, since N·V passes 2³¹.
    """
    n = n.to(tl.int64)
    start = ((n // L) * stride_b + (n % L) * stride_l) * unit
    skew = 0
    if SKEWED:
        if lead is not None:
            start += lead
            Logits = tl.multiple_of(Logits - lead, 16)  # in bytes
        skew = (start % ALIGNED).to(tl.int32)
        start = start // ALIGNED * ALIGNED
    return Logits + start, skew


@triton.constexpr_function
def constant_steps(V, STEP, SKEWED):
    """`whole_steps` of a whole row."""
    first = STEP if SKEWED else 0
    return first, max(first, V // STEP * STEP)


@triton.constexpr_function
def constant_edges(V, REACH, STEP, SKEWED):
    """`edge_entries` of a whole row."""
    first, end = constant_steps(V, STEP, SKEWED)
    last = REACH + (ALIGNED_ENTRIES - 1 if SKEWED else 0)
    return first + max(0, -(-(last - end) // STEP)) * STEP


@triton.jit
def whole_steps(V, STEP: tl.constexpr, SKEWED):
    """(first, end) of the steps that lie inside the row whatever its skew, relative to its aligned start.

    A part of a row that is skewed ends at a whole step (see `part_of_row`).
    """
    if isinstance(V, tl.tensor):
        first = tl.where(SKEWED, STEP, 0)
        end = (V + tl.where(SKEWED, ALIGNED - 1, 0)) // STEP * STEP
    else:
        first = constant_steps(V, STEP, SKEWED)[0]
        end = constant_steps(V, STEP, SKEWED)[1]
    return first, end


@triton.jit
def edge_entries(V, REACH, STEP: tl.constexpr, SKEWED):
    """Entries of the steps beside the whole ones, to the end of a row of REACH >= V: STEP times their number."""
    if isinstance(V, tl.tensor):
        first, end = whole_steps(V, STEP, SKEWED)
        return first + tl.maximum(REACH - end + STEP - 1, 0) // STEP * STEP
    else:
        return constant_edges(V, REACH, STEP, SKEWED)


@triton.jit
def edge_start(i, V, STEP: tl.constexpr, SKEWED):
    """Where the step begins that takes the edge entries from i on: at the aligned start, or after the whole steps."""
    first, end = whole_steps(V, STEP, SKEWED)
    return i + tl.where(i >= first, end - first, 0)


@triton.jit
def part_of_row(part, PART, parts, skew, V: tl.constexpr, SKEWED: tl.constexpr):
    """(offset from the row's aligned start, skew, entries) of a part, which has PART entries from the aligned start on.

    The first part of a skewed row lacks what lies before the row, and the last one has what is left, see
    `launch.row_parts`.
    """
    start = part * PART
    if SKEWED:
        own_skew = tl.where(part == 0, skew, 0)
        entries = tl.where(part == parts - 1, skew + V - start, PART - own_skew)
    else:
        own_skew = 0
        entries = tl.where(part == parts - 1, V - start, PART)
    return start, own_skew, entries


@triton.jit
def first_of_lanes(LANES: tl.constexpr, WIDTH: tl.constexpr):
    """(LANES,) offset of every lane's first entry in a tile from the tile's first one."""
    return tl.arange(0, LANES) * WIDTH


@triton.jit
def entries_of_lane(LANES: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr):
    """(1, VEC) offsets of a lane's entries in a tile from its first one."""
    return tl.arange(0, VEC)[None, :] * (1 if WIDTH == VEC else LANES)


@triton.jit
def tile_offsets(start, LANES: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr):
    """(LANES, VEC) offsets of a tile."""
    offs_v = start + first_of_lanes(LANES, WIDTH)[:, None] + entries_of_lane(LANES, VEC, WIDTH)
    if WIDTH == 1:
        # Hides that one of the rows may be aligned: a thread would load the entries of several lanes of it at once.
        offs_v = tl.multiple_of(offs_v, [1, 1])
    return offs_v


@triton.jit
def inside(offs_v, skew, V, SKEWED):
    """Which offsets from a row's aligned start are entries of it."""
    mask = offs_v < skew + V
    if isinstance(SKEWED, tl.tensor) or SKEWED:
        mask &= offs_v >= skew
    return mask


@triton.jit
def load_tile(Row, start, rows, EDGE: tl.constexpr):
    """(LANES, VEC) logits of a row, −inf outside it. Whole steps carry no mask: it would narrow the loads of an odd V.

    The edges come first in every sweep: what only they need is then not held through the loop of the others.
    """
    offs_v = tile_offsets(start, rows.LANES, rows.VEC, rows.WIDTH)
    if EDGE:
        z = tl.load(Row + offs_v, mask=inside(offs_v, rows.skew, rows.V, rows.SKEWED), other=-float("inf"))
    elif Row.dtype.element_ty == tl.bfloat16 and rows.WIDTH == rows.VEC:
        # Two entries at once: of each, the compiler would make one of 16 bits before it widens it.
        HALF: tl.constexpr = rows.VEC // 2
        pairs = tl.load((Row + start).to(tl.pointer_type(tl.int32)) + tile_offsets(0, rows.LANES, HALF, HALF))
        first = (pairs << 16).to(tl.float32, bitcast=True)
        second = (pairs & -65536).to(tl.float32, bitcast=True)
        z = tl.reshape(tl.join(first, second), (rows.LANES, rows.VEC))
    else:
        z = tl.load(Row + offs_v)
    return z.to(rows.scale.dtype)


@triton.jit
def store_zeros(
    Row,
    skew,
    V,
    SKEWED,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Make a row of V entries one of zeros."""
    STEP: tl.constexpr = LANES * VEC
    zeros = tl.zeros((LANES, VEC), Row.dtype.element_ty)
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        offs_v = tile_offsets(edge_start(i, V, STEP, SKEWED), LANES, VEC, WIDTH)
        tl.store(Row + offs_v, zeros, mask=inside(offs_v, skew, V, SKEWED))
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        tl.store(Row + tile_offsets(start, LANES, VEC, WIDTH), zeros)


@triton.jit
def open_log2_mass(z, m, c, scale):
    """(z − m)/τ·log2(e) − c; −inf where z is, and where the type's range ends."""
    # Rounded once: a small c would else always round to the same side of a product that is rounded before.
    return tl.fma(below(z, m), scale, -c)


@triton.jit
def log2_mass(z, m, c, scale):
    """The same, bounded below so that differences of two of them, and products with 0, stay finite."""
    return tl.maximum(open_log2_mass(z, m, c, scale), lowest(z.dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def shrink(m, new_m, scale, rounding):
    """2^((m − new_m)/τ·log2(e)): what the masses below one maximum shrink by below another.

    In fp32 the difference, its product with the scale and the scale bring errors of 1e-6 each where it is large, so
    that here, once a row, the three rounding errors are added (the scale's is `rounding`, see `exponent_rounding`), and
    the whole power of two is split off.
    """
    x = below(m, new_m)
    factor = tl.exp2(x * scale)
    if factor.dtype == tl.float32:
        # What the difference lost: Knuth's exact sum of m and −new_m, whose rounded value is x.
        moved = x - m * UNIT
        left = (m * UNIT - (x - moved)) - (new_m * UNIT + moved)
        x_1, x_2 = halves(x)
        s_1, s_2 = halves(scale)
        # The product of the high halves is exact, so that its whole part can be taken away without an error.
        whole = tl.floor(x_1 * s_1)
        part = (x_1 * s_1 - whole) + ((x_1 * s_2 + x_2 * s_1) + (x_2 * s_2 + x * scale * rounding + left * scale))
        factor = tl.where(x * scale < -200.0, 0.0, tl.exp2(whole) * tl.exp2(part))
    return factor


@triton.jit
def log2_1p(x):
    """log2(1 + x) of x > −1, relatively exact near 0: the logarithm of the rounded sum, corrected for its rounding."""
    rounded = (1.0 + x) - 1.0
    return tl.where(rounded == 0.0, x * LOG2E, tl.log2(1.0 + x) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def store_normalizers(Bundle, n, of):
    """Store the `Normalizers` of token n in a (4, N) bundle; an empty row is (−inf, 0)."""
    N = tl.num_programs(0)
    tl.store(Bundle + n, tl.where(of.l_s == 0.0, -float("inf"), of.m_s))
    tl.store(Bundle + N + n, of.l_s)
    tl.store(Bundle + 2 * N + n, tl.where(of.l_t == 0.0, -float("inf"), of.m_t))
    tl.store(Bundle + 3 * N + n, of.l_t)


@triton.jit
def load_normalizers(Bundle, n):
    """The `Normalizers` of token n from a (4, N) bundle."""
    N = tl.num_programs(0)
    return Normalizers(
        tl.load(Bundle + n), tl.load(Bundle + N + n), tl.load(Bundle + 2 * N + n), tl.load(Bundle + 3 * N + n)
    )
