"""`token_terms`: the second of two sweeps over a part of every row, from the normalisers of the whole row.

Σf and Σ(g + c·q) over the part, without the row's peak where it lies in it (docs/maths.md, section 4). Reads 2U of the
part, writes two numbers a token; a masked token and an empty row cost these writes only. U is one pass over an N x V
tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergence_terms import Parameters, number
from .launch import acc_type, bounded, launch_config, on_device, parameters, row_parts, row_strides
from .rows import (
    Rows,
    below,
    edge_entries,
    edge_start,
    entries_of_lane,
    exponent_rounding,
    exponent_scale,
    first_of_lanes,
    load_normalizers,
    load_tile,
    lowest,
    part_of_row,
    row_start,
    saturated,
    whole_steps,
)
from .two_sweeps import finite_terms


class WholeRow(NamedTuple):
    """What turns logits into log2 q and log2 p, and c, all of the whole row."""

    m_s: tl.tensor  # maxima, and log2 l
    log_l_s: tl.tensor
    m_t: tl.tensor
    log_l_t: tl.tensor
    scale_rest: tl.tensor  # what rounding took from the scale
    lowest: tl.tensor  # the lowest difference of two logits, in the unit of `rows.below`, whose power of two is finite
    c: tl.tensor


@triton.jit
def log2_mass_exactly(z, m, log_l, scale, row):
    """`rows.log2_mass` without the rounding error of the scale.

    In a forward, the masses of the normaliser have this error too, and most of it cancels. Here others made it.
    """
    x = tl.maximum(below(z, m), row.lowest, propagate_nan=tl.PropagateNan.ALL)
    return tl.fma(x, scale, tl.fma(x, row.scale_rest, -log_l))


@triton.jit
def fold_terms(rows, start, row, peak, f, g, EDGE: tl.constexpr, DIVERGENCE: tl.constexpr, parameters):
    """(Σf, Σ(g + c·q)) of every lane with those of a tile, to which the entry at `peak` adds nothing."""
    s = load_tile(rows.S, start, rows, EDGE)
    t = load_tile(rows.T, start, rows, EDGE)
    s = tl.where((peak - start)[:, None] == entries_of_lane(rows.LANES, rows.VEC, rows.WIDTH), -float("inf"), s)
    log_q = log2_mass_exactly(s, row.m_s, row.log_l_s, rows.scale, row)
    log_p = log2_mass_exactly(t, row.m_t, row.log_l_t, rows.scale, row)
    more_f, more_g = finite_terms(s, t, log_q, log_p, row.c, DIVERGENCE, parameters)
    return f + more_f, g + more_g


@triton.jit
def sweep_part(
    rows,
    row,
    peak,  # (LANES,) offset of the entry that is left out, less that of a lane's first entry in the first tile
    DIVERGENCE: tl.constexpr,
    parameters,
):
    """(Σf, Σ(g + c·q)) over the entries of `rows`."""
    STEP: tl.constexpr = rows.LANES * rows.VEC
    f = tl.zeros((rows.LANES,), rows.scale.dtype)
    g = f
    for i in range(0, edge_entries(rows.V, rows.V, STEP, rows.SKEWED), STEP):
        start = edge_start(i, rows.V, STEP, rows.SKEWED)
        f, g = fold_terms(rows, start, row, peak, f, g, True, DIVERGENCE, parameters)
    for start in range(whole_steps(rows.V, STEP, rows.SKEWED)[0], whole_steps(rows.V, STEP, rows.SKEWED)[1], STEP):
        f, g = fold_terms(rows, start, row, peak, f, g, False, DIVERGENCE, parameters)
    return saturated(tl.sum(f, 0)), saturated(tl.sum(g, 0))


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "lead", "of_p", "of_q"])
def token_terms_fwd_kernel(
    S,  # (B, L, Vs) logits of the part
    T,  # (B, L, Vt)
    Tau,  # (B·L,) temperature, in ACC
    Mask,  # (B·L,) bool
    NormalizersTau,  # (4, B·L) of the whole row at temperature τ, in ACC
    Constant,  # (B·L,) c, in ACC
    Peak,  # (B·L,) int64, place of the entry that is left out, or −1
    F,  # (parts·B·L,) result Σf, in ACC; of a whole row, parts is 1
    G,  # (parts·B·L,) result Σ(g + c·q), in ACC
    L,
    stride_sb,  # distances of two batches and of two tokens, in units
    stride_sl,
    unit_s,  # entries
    stride_tb,
    stride_tl,
    unit_t,
    lead,  # of all logits, see `row_start`
    PART,  # entries of a part, see `part_of_row`, or None
    of_p: tl.int64,  # the numbers of the divergence, see `launch.parameters`
    of_q: tl.int64,
    V: tl.constexpr,  # entries of the common vocabulary
    SKEWED: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LIGHT: tl.constexpr,  # see `Parameters`
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n, part = tl.program_id(0), tl.program_id(1)
    of = load_normalizers(NormalizersTau, n)
    at = n + part * tl.num_programs(0)
    if (tl.load(Mask + n) == 0) | (of.l_s == 0.0) | (of.l_t == 0.0):
        tl.store(F + at, 0.0)
        tl.store(G + at, 0.0)
        return
    S, skew = row_start(S, n, L, stride_sb, stride_sl, unit_s, lead, SKEWED)
    T, _ = row_start(T, n, L, stride_tb, stride_tl, unit_t, lead, SKEWED)
    tau = tl.load(Tau + n)
    scale = exponent_scale(tau)
    peak = (tl.load(Peak + n) + skew).to(tl.int32)  # of −1, a place before the row
    entries = V
    if PART is not None:
        start, skew, entries = part_of_row(part, PART, tl.num_programs(1), skew, V, SKEWED)
        S += start
        T += start
        peak -= start
    row = WholeRow(
        of.m_s, tl.log2(of.l_s), of.m_t, tl.log2(of.l_t), scale * exponent_rounding(tau),
        saturated(0.5 * lowest(ACC) / scale), tl.load(Constant + n),
    )  # fmt: skip
    f, g = sweep_part(
        Rows(S, T, skew, scale, V if PART is None else entries, SKEWED if PART is None or not SKEWED else part == 0, 1,
             LANES, VEC, WIDTH),
        row, peak - first_of_lanes(LANES, WIDTH), DIVERGENCE,
        Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT, True),
    )  # fmt: skip
    tl.store(F + at, f)
    tl.store(G + at, g)


def sweep_parts_of_terms(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    normalizers_tau: Tensor,
    constant: Tensor,
    peak: Tensor,
    divergence: str,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor, int]:
    """(parts·B·L,) Σf and Σ(g + c·q) of every part of a row that `row_parts` makes, and how many parts there are.

    Of what is a token's, all is contiguous, in the accumulation type but mask and peak; the normalisers are (4, B·L).
    """
    dtype, acc = acc_type(student, teacher)
    vocab = min(student.shape[-1], teacher.shape[-1])
    config = launch_config("terms", divergence, vocab, student, teacher)
    parts, part = row_parts(config, mask.numel(), vocab, student.device)
    if parts > 1:  # whose edges take more registers than those of whole rows
        config = bounded(config, student, teacher)
    f, g = (torch.empty(parts * mask.numel(), dtype=dtype, device=mask.device) for _ in range(2))
    with on_device(student):
        token_terms_fwd_kernel[(mask.numel(), parts)](
            student, teacher, temperature, mask, normalizers_tau, constant, peak, f, g,
            mask.shape[1], *row_strides(student), *row_strides(teacher), PART=part,
            V=vocab, DIVERGENCE=divergence, ACC=acc, **parameters(divergence, alpha, beta, dtype), **config,
        )  # fmt: skip
    return f, g, parts


def token_terms_fwd(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    normalizers_tau: Tensor,
    constant: Tensor,
    peak: Tensor,
    divergence: str,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """(B, L, Vs), (B, L, Vt), (B, L), (B, L) bool, (4, B, L), (B, L), (B, L) int64 -> Σf, Σ(g + c·q)."""
    dtype = acc_type(student, teacher)[0]
    if not mask.numel():
        return torch.empty(mask.shape, dtype=dtype, device=mask.device), torch.empty(
            mask.shape, dtype=dtype, device=mask.device
        )
    f, g, parts = sweep_parts_of_terms(
        student, teacher, temperature.to(dtype).contiguous(), mask.contiguous(),
        normalizers_tau.to(dtype).contiguous().flatten(1), constant.to(dtype).contiguous(), peak.contiguous(),
        divergence, alpha, beta,
    )  # fmt: skip
    if parts == 1:
        return f.view(mask.shape), g.view(mask.shape)
    largest = torch.finfo(dtype).max
    f, g = (x.view(parts, *mask.shape).sum(0, dtype=torch.float64).clamp(-largest, largest).to(dtype) for x in (f, g))
    return f, g
