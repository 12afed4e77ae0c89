"""A part of a row, swept as if it was the row: what `split.py` merges (docs/maths.md, section 9).

Reads 2U of the parts of a row, and 3/LANES of 1U again where a peak is kept apart; writes 5 to 11 numbers a part. U is
one pass over an N x V tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..divergences import DIVERGENCES
from .hellinger import sweep_distance, sweep_hellinger
from .kl import sweep_both
from .launch import acc_type, row_parts, row_strides, sweeps
from .rows import Rows, exponent_rounding, exponent_scale, part_of_row, row_start, saturated
from .two_sweeps import sweep_normalizers


@triton.constexpr_function
def numbers(what):
    """How many numbers a part stores between its normalisers and the teacher's logit at its peak."""
    if what == "difficulty":
        return 1
    return {1: 6 if what == "jeffreys" else 3, 2: 0}[DIVERGENCES[what].sweeps]


@triton.jit
def store_part(rows, Sums, Peak, at, size, before, rounding, WHAT: tl.constexpr):
    """Sweep a part and store its numbers: field i of the bundle is i·size after its first.

    `before` is the place in the row of the part's aligned start.
    """
    NUMBERS: tl.constexpr = numbers(WHAT)
    if WHAT == "difficulty":
        of, d = sweep_distance(rows, rounding)
        tl.store(Sums + at + 4 * size, d)
    elif WHAT == "hellinger":
        of, found = sweep_hellinger(rows, rounding)
        tl.store(Sums + at + 4 * size, found.d)
        tl.store(Sums + at + 5 * size, found.sum_g)
        tl.store(Sums + at + 6 * size, found.peak_grad)
        peak, t_peak = found.peak, found.t_peak
    elif sweeps(WHAT) == 1:
        of, both = sweep_both(rows, rounding, WHAT, WHAT != "forward_kl")
        FIRST_OF_REVERSE: tl.constexpr = 7 if WHAT == "jeffreys" else 4
        if WHAT != "reverse_kl":
            tl.store(Sums + at + 4 * size, saturated(both.forward))
            tl.store(Sums + at + 5 * size, both.kept)
            tl.store(Sums + at + 6 * size, saturated(-both.forward_rest))
        if WHAT != "forward_kl":
            tl.store(Sums + at + FIRST_OF_REVERSE * size, saturated(both.reverse))
            tl.store(Sums + at + (FIRST_OF_REVERSE + 1) * size, both.lost)
            tl.store(Sums + at + (FIRST_OF_REVERSE + 2) * size, saturated(-both.reverse_rest))
        peak, t_peak = both.peak, both.t_peak
    else:
        of, first = sweep_normalizers(rows, rounding)
        peak = first.peak
        t_peak = tl.load(rows.T + peak, mask=peak < rows.V + rows.skew, other=-float("inf")).to(rows.scale.dtype)
    tl.store(Sums + at, of.m_s)
    tl.store(Sums + at + size, of.l_s)
    tl.store(Sums + at + 2 * size, of.m_t)
    tl.store(Sums + at + 3 * size, of.l_t)
    if WHAT != "difficulty":
        tl.store(Sums + at + (4 + NUMBERS) * size, t_peak)
        tl.store(Peak + at, before + peak)


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "lead"])
def row_parts_kernel(
    S,  # (B, L, Vs) logits
    T,  # (B, L, Vt)
    Tau,  # (B·L,) temperature, in ACC, or None: 1
    Mask,  # (B·L,) bool; nothing is stored of other tokens
    Sums,  # (fields, parts·B·L) result, in ACC: normalisers and what `store_part` adds
    Peak,  # (parts·B·L,) result, int32: place of the part's peak in the row; None for the difficulty
    L,
    stride_sb,  # distances of two batches and of two tokens, in units
    stride_sl,
    unit_s,  # entries
    stride_tb,
    stride_tl,
    unit_t,
    lead,  # of all logits, see `row_start`
    PART,  # entries of a part
    V: tl.constexpr,  # entries of the common vocabulary
    SKEWED: tl.constexpr,
    WHAT: tl.constexpr,  # a divergence, or "difficulty"
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n, part = tl.program_id(0), tl.program_id(1)
    N, parts = tl.num_programs(0), tl.num_programs(1)
    if tl.load(Mask + n) == 0:
        return
    S, skew = row_start(S, n, L, stride_sb, stride_sl, unit_s, lead, SKEWED)
    T, _ = row_start(T, n, L, stride_tb, stride_tl, unit_t, lead, SKEWED)
    if Tau is None:
        tau = tl.full((), 1.0, ACC)
    else:
        tau = tl.load(Tau + n)
    start, own_skew, entries = part_of_row(part, PART, parts, skew, V, SKEWED)
    store_part(
        Rows(S + start, T + start, own_skew, exponent_scale(tau), entries, (part == 0) if SKEWED else False,
             TILES, LANES, VEC, WIDTH),
        Sums, Peak, part * N + n, N * parts, start - skew, exponent_rounding(tau), WHAT,
    )  # fmt: skip


def sweep_parts(
    student: Tensor, teacher: Tensor, temperature: Tensor | None, mask: Tensor, what: str, config: dict[str, Any]
) -> tuple[Tensor, Tensor | None, int]:
    """(fields, parts·B·L) numbers and (parts·B·L,) peaks of all parts, by `row_parts_kernel`; how many parts."""
    dtype, acc = acc_type(student, teacher)
    vocab = min(student.shape[-1], teacher.shape[-1])
    parts, part = row_parts(config, mask.numel(), vocab, student.device)
    peaked = what != "difficulty"
    sums = torch.empty(4 + numbers(what) + peaked, parts * mask.numel(), dtype=dtype, device=mask.device)
    peak = torch.empty(parts * mask.numel(), dtype=torch.int32, device=mask.device) if peaked else None
    row_parts_kernel[(mask.numel(), parts)](
        student, teacher, temperature, mask, sums, peak,
        mask.shape[1], *row_strides(student), *row_strides(teacher), PART=part,
        V=vocab, WHAT=what, ACC=acc, **config,
    )  # fmt: skip
    return sums, peak, parts
