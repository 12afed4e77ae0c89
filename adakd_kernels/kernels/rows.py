"""What the kernels share: addressing a row, loading a tile of it, and its normaliser.

Logits are in the accumulation type; `scale` turns a difference of logits into a power of two (log2(e)/τ). Maxima start
at a large finite negative number, NEG, so that a tile of nothing but −inf folds to zero sums.
"""

import triton
import triton.language as tl

NEG = tl.constexpr(-1.0e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_start(n, L, stride_b, stride_l, unit):
    """First entry of row n of a (B, L, V) tensor, see `launch.row_strides`; 64 bits, since N·V passes 2³¹."""
    n = n.to(tl.int64)
    return ((n // L) * stride_b + (n % L) * stride_l) * unit


@triton.jit
def load_tile(Row, start, V: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    """BLOCK_V entries of a row; −inf beyond V. Whole blocks carry no mask, so an odd V does not narrow their loads.

    The masked block comes first in every sweep: what only it needs is then not held through the loop of the others.
    """
    offs_v = start + tl.arange(0, BLOCK_V)
    if MASKED:
        z = tl.load(Row + offs_v, mask=offs_v < V, other=-float("inf"))
    else:
        z = tl.load(Row + offs_v)
    return z.to(ACC)


@triton.jit
def log2_mass(z, m, scale):
    """(z − m)·scale, bounded below so that differences of two of them, and their products with 0, stay finite."""
    return tl.maximum((z - m) * scale, NEG)


@triton.jit
def fold_normalizer(z, scale, m, l):
    """Running maximum m and l = Σ 2^((z − m)·scale)."""
    new_m = tl.maximum(m, tl.max(z, 0))
    return new_m, l * tl.exp2((m - new_m) * scale) + tl.sum(tl.exp2((z - new_m) * scale), 0)


@triton.jit
def store_normalizer(Max, Sum, n, m, l):
    """Store (maximum, sum) of a row; an empty row is (−inf, 0)."""
    tl.store(Max + n, tl.where(l == 0.0, -float("inf"), m))
    tl.store(Sum + n, l)
