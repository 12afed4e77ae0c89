"""The gradient of `token_divergence` in the student's logits: equation (10).

Rebuilds p and q from the normalisers; reads 2U of the rows with a weight, writes 1U, in place if asked. U is one pass
over an N x V tensor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence_terms import gradient_terms, needs_bounds, vanishes_with_q, whole_g
from .rows import (
    ALIGNED,
    LOG2E,
    below,
    constant_edges,
    constant_steps,
    inside,
    load_normalizers,
    load_tile,
    log2_mass,
    lowest,
    open_log2_mass,
    saturated,
    tile_offsets,
    whole_steps,
)


class Token(NamedTuple):
    """The numbers of one token that its gradient needs."""

    weight: tl.tensor  # gradient of the loss in D, over τ
    sum_g: tl.tensor  # Σg
    m_s: tl.tensor  # maxima and c = log2 l at temperature τ
    c_s: tl.tensor
    m_t: tl.tensor
    c_t: tl.tensor
    peak: tl.tensor  # offset of the student's peak from the row's aligned start, or −1
    peak_grad: tl.tensor  # gradient there
    label: tl.tensor  # as the peak
    ce_weight: tl.tensor  # gradient of the loss in the cross-entropy
    m_1: tl.tensor  # the student's maximum and c at temperature 1
    c_1: tl.tensor


@triton.jit
def divergence_grad(s, t, scale, token, DIVERGENCE: tl.constexpr, parameters):
    """weight/τ·(g − q Σg) of every finite entry, from a `Token` by `in_units`."""
    log_q = open_log2_mass(s, token.m_s, token.c_s, scale)
    if DIVERGENCE == "reverse_kl":
        # q·(log2(q/p) − Σg), with Σg in p's constant, and bounded where `log2_mass` is.
        bound = lowest(s.dtype) + token.sum_g
        log_p = open_log2_mass(t, token.m_t, token.c_t - token.sum_g, scale)
        gap = log_q - tl.maximum(log_p, bound, propagate_nan=tl.PropagateNan.ALL)
        return token.weight * (tl.exp2(log_q) * tl.maximum(gap, lowest(s.dtype)))
    else:
        if needs_bounds(DIVERGENCE):
            log_q = log2_mass(s, token.m_s, token.c_s, scale)
            log_p = log2_mass(t, token.m_t, token.c_t, scale)
        else:
            log_p = open_log2_mass(t, token.m_t, token.c_t, scale)
        g, q = gradient_terms(log_q, log_p, DIVERGENCE, parameters)
        return token.weight * (g - q * token.sum_g)


@triton.jit
def write_grad(
    Grad,  # pointer to the gradient's aligned entry at or before the row's first
    rows,
    start,
    token,
    VS,  # entries of the student's vocabulary, of a part those that it writes
    EDGE: tl.constexpr,
    MARKED: tl.constexpr,  # whether the student's peak or the label may be in the tile
    DIVERGENCE: tl.constexpr,
    parameters,
    WITH_CE: tl.constexpr,
):
    """(10) for a tile: weight/τ·(g − q Σg), 0 where either side is −inf; plus the gradient of the cross-entropy.

    At the student's peak the difference may cancel, so that there the forward's own result takes its place.
    """
    offs_v = tile_offsets(start, rows.LANES, rows.VEC, rows.WIDTH)
    s = load_tile(rows.S, start, rows, EDGE)
    t = load_tile(rows.T, start, rows, EDGE)
    grad = divergence_grad(s, t, rows.scale, token, DIVERGENCE, parameters)
    if vanishes_with_q(DIVERGENCE):
        finite = t != -float("inf")
    else:  # the sum of both differences is −inf only where one is
        finite = below(s, token.m_s) + below(t, token.m_t) != -float("inf")
    grad = tl.where(finite, grad, 0.0)
    if MARKED:
        grad = tl.where(offs_v == token.peak, token.peak_grad, grad)
    if WITH_CE:
        # A token without a weight of D has no normalisers at τ either, and what stands in their place may give NaN.
        grad = tl.where(token.weight != 0.0, grad, 0.0)
        grad_ce = tl.exp2((s - token.m_1) * LOG2E - token.c_1)
        if MARKED:
            grad_ce -= tl.where(offs_v == token.label, 1.0, 0.0)
        grad_ce *= token.ce_weight
        if EDGE:  # a weight that is NaN is seen in the common vocabulary, and nowhere else
            grad_ce = tl.where(inside(offs_v, rows.skew, rows.V, rows.SKEWED), grad_ce, 0.0)
        grad += grad_ce
    grad = grad.to(Grad.dtype.element_ty)
    if EDGE:
        tl.store(Grad + offs_v, grad, mask=inside(offs_v, rows.skew, VS, rows.SKEWED))
    elif rows.WIDTH == 1:
        tl.store(Grad + offs_v, grad)
    else:
        tl.store((Grad + start) + tile_offsets(0, rows.LANES, rows.VEC, rows.WIDTH), grad)


@triton.jit
def in_units(token, unit):
    """The `Token` for g in this unit; its weight is NaN if Σg is, and an empty row has numbers below which −inf is."""
    sum_g = saturated(token.sum_g / unit)
    empty_s = token.m_s == -float("inf")
    empty_t = token.m_t == -float("inf")
    return Token(
        token.weight * unit + 0.0 * sum_g, sum_g,
        tl.where(empty_s, 0.0, token.m_s), tl.where(empty_s, 0.0, token.c_s),
        tl.where(empty_t, 0.0, token.m_t), tl.where(empty_t, 0.0, token.c_t),
        token.peak, token.peak_grad, token.label, token.ce_weight, token.m_1, token.c_1,
    )  # fmt: skip


@triton.jit
def step_of(place, first, end, STEP: tl.constexpr):
    """Where the whole step begins that has this offset; the first one, if none has it."""
    return tl.where((place >= first) & (place < end), place // STEP * STEP, first)


@triton.jit
def write_steps(
    Grad,  # as in `write_grad`
    rows,
    token,
    VS,
    first,  # where the whole steps begin and end
    end,
    edges,  # entries of the steps beside them
    marks,  # entries of the whole steps that are taken with the edges
    MARKED: tl.constexpr,  # whether there are none
    STEP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    parameters,
    WITH_CE: tl.constexpr,
):
    """`write_grad` for every tile of a row, two a step."""
    TILE: tl.constexpr = STEP // 2
    low = step_of(token.peak, first, end, STEP)
    high = low
    if WITH_CE:
        high = step_of(token.label, first, end, STEP)
        high = tl.where(high == low, tl.where(low == first, first + STEP, first), high)
        low, high = tl.minimum(low, high), tl.maximum(low, high)
    for i in range(0, 2 * (edges + marks), STEP):
        step = i // (2 * STEP) * STEP
        start = step + tl.where(step >= first, end - first, 0)
        start = tl.where(step < edges, start, tl.where(step == edges, low, high)) + i % (2 * STEP) // 2
        start = tl.multiple_of(start, rows.VEC)
        write_grad(Grad, rows, start, token, VS, True, True, DIVERGENCE, parameters, WITH_CE)
    for i in range(first, end - marks, STEP):
        start = i
        if not MARKED:
            start += tl.where(start >= low, STEP, 0)
            if WITH_CE:
                start += tl.where(start >= high, STEP, 0)
            start = tl.multiple_of(start, rows.VEC)
        write_grad(Grad, rows, start, token, VS, False, MARKED, DIVERGENCE, parameters, WITH_CE)
        write_grad(Grad, rows, start + TILE, token, VS, False, MARKED, DIVERGENCE, parameters, WITH_CE)


@triton.jit
def write_row(
    Grad,  # as in `write_grad`
    rows,
    token,
    VS,
    DIVERGENCE: tl.constexpr,
    parameters,
    WITH_CE: tl.constexpr,
):
    """`write_grad` for every tile of a row of VS entries.

    The steps with the peak and the label are taken with the edges, so that no other one looks for them.
    """
    STEP: tl.constexpr = 2 * rows.LANES * rows.VEC
    MARKS: tl.constexpr = (2 if WITH_CE else 1) * STEP
    token = in_units(token, whole_g(tl.full((), 1.0, rows.scale.dtype), DIVERGENCE, parameters))
    if isinstance(rows.V, tl.tensor):
        first, end = whole_steps(rows.V, STEP, rows.SKEWED)
        end = tl.where(end - first > 2 * STEP, end, first)  # of few steps, all are taken with the edges
        edges = first + tl.maximum(VS + tl.where(rows.SKEWED, ALIGNED - 1, 0) - end + STEP - 1, 0) // STEP * STEP
        marks = tl.where(end > first, MARKS, 0)
        write_steps(
            Grad, rows, token, VS, first, end, edges, marks, False, STEP, DIVERGENCE, parameters, WITH_CE
        )  # fmt: skip
    else:
        FIRST: tl.constexpr = constant_steps(rows.V, STEP, rows.SKEWED)[0]
        END: tl.constexpr = constant_steps(rows.V, STEP, rows.SKEWED)[1]
        EDGES: tl.constexpr = constant_edges(rows.V, VS, STEP, rows.SKEWED)
        FEW: tl.constexpr = END - FIRST <= 2 * STEP
        write_steps(
            Grad, rows, token, VS, FIRST, END, EDGES, 0 if FEW else MARKS, FEW, STEP,
            DIVERGENCE, parameters, WITH_CE,
        )  # fmt: skip


@triton.jit
def load_cross_entropy(
    Label,
    CeWeight,
    Normalizers1,
    n,
    first,
    V: tl.constexpr,
    WITH_CE: tl.constexpr,
    ACC: tl.constexpr,
):
    """(place of the label or −1, weight, m_1, c_1) of token n; `first` is the place of the row's first entry."""
    label = -1
    ce_weight = tl.full((), 0.0, ACC)
    m_1 = ce_weight
    c_1 = ce_weight
    if WITH_CE:
        label = tl.load(Label + n)
        label = tl.where((label >= 0) & (label < V), label + first, -1).to(tl.int32)
        ce_weight = tl.load(CeWeight + n)
        of_1 = load_normalizers(Normalizers1, n)
        # A token without a weight of the cross-entropy may have no normaliser: relative to the largest number in its
        # place, no logit has a mass.
        m_1 = tl.where(ce_weight != 0.0, of_1.m_s, -lowest(ACC))
        c_1 = tl.where(ce_weight != 0.0, tl.log2(of_1.l_s), -lowest(ACC))
    return label, ce_weight, m_1, c_1
