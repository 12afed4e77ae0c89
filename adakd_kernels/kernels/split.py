"""Rows that are split over programs, where there are too few of them to fill the GPU (docs/maths.md, section 9).

A part of a row is whole steps, and a program computes its numbers as if it was the row; another kernel merges those of
all parts of a token, one program a token, always in the same order and in fp64. Statistics and divergences of one sweep
take both kernels. Those of two sweeps take them twice: the second sweep needs the normalisers of the whole row. What is
read of the rows is the same as of whole ones. The gradient needs numbers of the
token alone, so its programs take parts and nothing is merged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..divergences import DIVERGENCES
from .divergence_terms import Parameters, divergence_terms, number, peak_terms, whole_g
from .hellinger import sweep_distance, sweep_hellinger
from .kl import sweep_both
from .launch import FUSED, MOST_PARTS, acc_type, parameters, row_parts, row_strides, sweeps
from .peak import store_peak
from .rows import (
    LN2,
    LOG2E,
    UNIT,
    Normalizers,
    Rows,
    exponent_rounding,
    exponent_scale,
    load_normalizers,
    log2_1p,
    lowest,
    part_of_row,
    row_start,
    saturated,
    store_normalizers,
)
from .token_terms import sweep_parts_of_terms
from .two_sweeps import sweep_normalizers

# Mass of a peak from which on (10) could cancel there, so that its terms are computed apart, as in `ops/shards.py`.
HEAVY = tl.constexpr(1.0 / 16.0)
# In the place of a logarithm of 0: products with 0 stay 0, and sums of a few stay finite in fp64.
NO_LOG = tl.constexpr(-1.0e300)


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


class Mass(NamedTuple):
    """How the mass of a row lies on its parts, in fp64 but for the maximum."""

    max: tl.tensor  # the row's normaliser
    sum: tl.tensor
    log_sum: tl.tensor  # log2 of it, 0 for an empty row
    exists: tl.tensor  # (BLOCK,) whether the part has a finite entry
    log: tl.tensor  # (BLOCK,) log2 of the part's share of the mass, 0 for one without any
    share: tl.tensor  # (BLOCK,)


class RowPeak(NamedTuple):
    """The student's most likely entry of a row, in fp64."""

    own: tl.tensor  # (BLOCK,) whether it is that of the part; in the lowest part of those that have the maximum
    finite: tl.tensor  # whether it is finite in the teacher's row, too
    q: tl.tensor
    p: tl.tensor  # 0 if it is not finite there
    gap: tl.tensor  # log2(q/p), 0 likewise


class RowSums(NamedTuple):
    """D and Σg of a row, and τ·∂D/∂zˢ at its peak, in fp64."""

    d: tl.tensor
    sum_g: tl.tensor
    peak_grad: tl.tensor


@triton.jit
def power_of_two(x, ACC: tl.constexpr):
    """2^x of an fp64 x ≤ 0: in its range, with the digits of ACC. The library's fp64 takes several times as long."""
    if tl.float64 == ACC:
        return tl.exp2(x)
    else:
        whole = tl.floor(x)
        of_whole = ((tl.maximum(whole, -1022.0).to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        return of_whole * tl.exp2((x - whole).to(tl.float32)).to(tl.float64)


@triton.jit
def log2_of(x, ACC: tl.constexpr):
    """log2 of a normal fp64 number, with the digits of ACC, also near 1."""
    if tl.float64 == ACC:
        return tl.log2(x)
    else:
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) >> 52  # that of x/√½
        r = (bits - (exponent << 52)).to(tl.float64, bitcast=True) - 1.0
        # x − x keeps NaN, which has an exponent and digits, too.
        return exponent.to(tl.float64) + log2_1p(r.to(tl.float32)).to(tl.float64) + (x - x)


@triton.jit
def reciprocal_of(x, ACC: tl.constexpr):
    """1/x of an fp64 number between 1 and the size of a vocabulary: in fp32, and a step of Newton's."""
    if tl.float64 == ACC:
        return 1.0 / x
    else:
        rough = (1.0 / x.to(tl.float32)).to(tl.float64)
        return rough * (2.0 - x * rough)


@triton.jit
def load_mass(Sums, at, size, inside, exponent, ACC: tl.constexpr):
    """`Mass` of a row from the maxima and, `size` after them, the sums of its parts."""
    m = tl.load(Sums + at, mask=inside, other=0.0)
    l = tl.load(Sums + at + size, mask=inside, other=0.0).to(tl.float64)
    exists = l != 0.0
    top = tl.max(tl.where(exists, m, -float("inf")), 0)
    moved = tl.maximum((m.to(tl.float64) - top.to(tl.float64)) * exponent, NO_LOG)
    mass = tl.where(exists, l * power_of_two(moved, ACC), 0.0)
    total = tl.sum(mass, 0)
    some = tl.where(total == 0.0, 1.0, total)
    log_total = log2_of(some, ACC)
    log = tl.where(exists, moved + log2_of(tl.where(exists, l, 1.0), ACC) - log_total, 0.0)
    return Mass(top, total, log_total, exists, log, mass * reciprocal_of(some, ACC))


@triton.jit
def find_row_peak(Sums, TPeak, at, inside, student, teacher, exponent, ACC: tl.constexpr):
    """`RowPeak` from the parts' maxima and the teacher's logits at their peaks."""
    m = tl.load(Sums + at, mask=inside, other=0.0)
    part = tl.arange(0, at.shape[0])
    t_peak = tl.load(TPeak + at, mask=inside, other=-float("inf"))
    owner = tl.min(tl.where(student.exists & (m == student.max), part, at.shape[0]), 0)
    own = part == owner
    t_peak = tl.max(tl.where(own, t_peak, -float("inf")), 0)
    finite = t_peak != -float("inf")
    log_p = tl.maximum((t_peak.to(tl.float64) - teacher.max.to(tl.float64)) * exponent, NO_LOG) - teacher.log_sum
    gap = tl.where(finite, -student.log_sum - log_p, 0.0)
    q = tl.where(finite, power_of_two(-student.log_sum, ACC), 0.0)
    return RowPeak(own, finite, q, tl.where(finite, power_of_two(log_p, ACC), 0.0), gap)


@triton.jit
def of_own_and_others(own, mine, others):
    """Σ over the parts of `mine` where the peak lies, less `others` elsewhere."""
    return tl.sum(tl.where(own, mine, -others), 0)


@triton.jit
def merge_distance(student, teacher, d, ACC: tl.constexpr):
    """s² of a row from those of its parts: Σ [½(√Q − √P)² + √(QP)·s²], in which every term is ≥ 0."""
    root_q = tl.sqrt(student.share.to(ACC))
    root_p = tl.sqrt(teacher.share.to(ACC))
    sum = root_q + root_p
    # (Q − P)/(√Q + √P), which has all digits of the difference.
    apart = (student.share - teacher.share).to(ACC) / tl.where(sum == 0.0, 1.0, sum)
    distance = tl.sum(0.5 * (apart * apart) + root_q * root_p * d, 0)
    return tl.where(distance > 1.0, 1.0, distance)  # by comparison, since a minimum would lose NaN


@triton.jit
def merge_hellinger(student, teacher, d, sum_g, grad, peak, ACC: tl.constexpr):
    """`RowSums` of the Hellinger distance from D, Σg and the peak's gradient of the parts."""
    roots = tl.sqrt(student.share.to(ACC)) * tl.sqrt(teacher.share.to(ACC))
    total_g = tl.where(student.exists & teacher.exists, roots * sum_g, 0.0)
    of_peak = tl.sqrt(peak.p.to(ACC)) * tl.sqrt(peak.q.to(ACC))
    others = peak.q * total_g + 0.5 * of_peak * student.share
    peak_grad = of_own_and_others(peak.own, roots * student.share * grad, others)
    return RowSums(merge_distance(student, teacher, d, ACC), tl.sum(total_g, 0), peak_grad)


@triton.jit
def log_ratio(student, teacher):
    """(BLOCK,) whether a part has mass of both sides, and log(Q/P), by which log(q/p) of the row is above its own."""
    both = student.exists & teacher.exists
    return both, tl.where(both, LN2 * (student.log - teacher.log), 0.0)


@triton.jit
def merge_forward_kl(student, teacher, d, kept, grad, peak):
    """`RowSums` of KL(p‖q) from D, the mass of p on the finite entries and the peak's gradient, of parts."""
    both, ratio = log_ratio(student, teacher)
    kept = tl.where(both, kept, 0.0)
    total = tl.where(both, teacher.share * (d - kept * ratio), 0.0)
    others = peak.p * student.share - peak.q * teacher.share * kept
    peak_grad = of_own_and_others(peak.own, student.share * teacher.share * grad, others)
    return RowSums(tl.sum(total, 0), -tl.sum(teacher.share * kept, 0), peak_grad)


@triton.jit
def merge_reverse_kl(student, teacher, d, lost, grad, peak):
    """`RowSums` of KL(q‖p) from D, the mass of q on the other entries and the peak's gradient, of parts."""
    both, ratio = log_ratio(student, teacher)
    lost = tl.where(both, lost, 1.0)
    total = tl.where(both, d + (1.0 - lost) * ratio, 0.0)
    others = peak.q * student.share * (total - LN2 * peak.gap - lost)
    mine = student.share * (student.share * grad + peak.q * ratio * lost)
    peak_grad = of_own_and_others(peak.own, mine, others)
    return RowSums(tl.sum(student.share * total, 0), tl.sum(student.share * (total - lost), 0), peak_grad)


@triton.jit
def merge_parts(Sums, at, size, inside, student, teacher, peak, WHAT: tl.constexpr, ACC: tl.constexpr):
    """`RowSums` of a divergence of one sweep."""
    one = tl.load(Sums + at + 4 * size, mask=inside, other=0.0).to(tl.float64)
    two = tl.load(Sums + at + 5 * size, mask=inside, other=0.0).to(tl.float64)
    grad = tl.load(Sums + at + 6 * size, mask=inside, other=0.0).to(tl.float64)
    if WHAT == "hellinger":
        return merge_hellinger(student, teacher, one, two, grad, peak, ACC)
    elif WHAT == "forward_kl":
        return merge_forward_kl(student, teacher, one, two, grad, peak)
    elif WHAT == "reverse_kl":
        return merge_reverse_kl(student, teacher, one, two, grad, peak)
    else:
        tl.static_assert(WHAT == "jeffreys", "a divergence of one sweep needs a merge of its own")
        forward = merge_forward_kl(student, teacher, one, two, grad, peak)
        one = tl.load(Sums + at + 7 * size, mask=inside, other=0.0).to(tl.float64)
        two = tl.load(Sums + at + 8 * size, mask=inside, other=0.0).to(tl.float64)
        grad = tl.load(Sums + at + 9 * size, mask=inside, other=0.0).to(tl.float64)
        reverse = merge_reverse_kl(student, teacher, one, two, grad, peak)
        return RowSums(forward.d + reverse.d, forward.sum_g + reverse.sum_g, forward.peak_grad + reverse.peak_grad)


@triton.jit
def in_range(x, ACC: tl.constexpr):
    """fp64 as ACC, cut off at its range; NaN stays."""
    LOWEST: tl.constexpr = lowest(ACC)
    x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, -LOWEST, propagate_nan=tl.PropagateNan.ALL).to(ACC)


@triton.jit
def exponent_of(tau):
    """log2(e)/τ in fp64, from the scale of the sweeps and its rounding error."""
    return exponent_scale(tau).to(tl.float64) * UNIT * (1.0 + exponent_rounding(tau).to(tl.float64))


@triton.jit(do_not_specialize=["parts"])
def merge_stats_kernel(
    Sums,  # (5, parts·N) of `row_parts_kernel`, in ACC
    Mask,  # (N,) bool
    Difficulty,  # (N,) result s², in ACC
    Normalizers1,  # (4, N) result, in ACC
    parts,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the number of parts
):
    n = tl.program_id(0)
    N = tl.num_programs(0)
    if tl.load(Mask + n) == 0:
        tl.store(Difficulty + n, 0.0)
        store_normalizers(Normalizers1, n, Normalizers(0.0, 1.0, 0.0, 1.0))
        return
    part = tl.arange(0, BLOCK)
    at, size, inside = part * N + n, parts * N, part < parts
    exponent = tl.full((), LOG2E, tl.float64)
    student = load_mass(Sums, at, size, inside, exponent, ACC)
    teacher = load_mass(Sums + 2 * size, at, size, inside, exponent, ACC)
    d = merge_distance(student, teacher, tl.load(Sums + at + 4 * size, mask=inside, other=0.0).to(tl.float64), ACC)
    empty = (student.sum == 0.0) | (teacher.sum == 0.0)
    tl.store(Difficulty + n, in_range(tl.where(empty, 0.0, d), ACC))
    store_normalizers(Normalizers1, n, Normalizers(student.max, student.sum, teacher.max, teacher.sum))


@triton.jit(do_not_specialize=["parts"])
def merge_one_sweep_kernel(
    Sums,  # (fields, parts·N) of `row_parts_kernel`, in ACC
    PartPeak,  # (parts·N,) of it
    Tau,  # (N,) temperature, in ACC
    Mask,  # (N,) bool
    D,  # (N,) result, in ACC
    SumG,  # (N,) result Σg, in ACC
    NormalizersTau,  # (4, N) result, in ACC
    Peak,  # (N,) result, int64: place of the student's peak or −1
    PeakGrad,  # (N,) result τ·∂D/∂zˢ there, in ACC
    parts,
    WHAT: tl.constexpr,  # the divergence
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the number of parts
):
    n = tl.program_id(0)
    N = tl.num_programs(0)
    if tl.load(Mask + n) == 0:
        tl.store(D + n, 0.0)
        tl.store(SumG + n, 0.0)
        store_normalizers(NormalizersTau, n, Normalizers(0.0, 1.0, 0.0, 1.0))
        store_peak(Peak, PeakGrad, n, 0, 0, False, 0.0)
        return
    part = tl.arange(0, BLOCK)
    at, size, inside = part * N + n, parts * N, part < parts
    exponent = exponent_of(tl.load(Tau + n))
    student = load_mass(Sums, at, size, inside, exponent, ACC)
    teacher = load_mass(Sums + 2 * size, at, size, inside, exponent, ACC)
    FIELDS: tl.constexpr = numbers(WHAT)
    peak = find_row_peak(Sums, Sums + (4 + FIELDS) * size, at, inside, student, teacher, exponent, ACC)
    of_row = merge_parts(Sums, at, size, inside, student, teacher, peak, WHAT, ACC)
    some = (student.sum != 0.0) & (teacher.sum != 0.0)
    sum_g = in_range(of_row.sum_g, ACC)
    if WHAT != "hellinger":
        # Where D leaves the type's range, Σg stops where the backward's log-ratios do, as in `kl.py`.
        sum_g = tl.minimum(sum_g, -LN2 * lowest(ACC), propagate_nan=tl.PropagateNan.ALL)
    tl.store(D + n, tl.where(some, in_range(of_row.d, ACC), 0.0))
    tl.store(SumG + n, tl.where(some, sum_g, 0.0))
    store_normalizers(NormalizersTau, n, Normalizers(student.max, student.sum, teacher.max, teacher.sum))
    place = tl.max(tl.where(peak.own, tl.load(PartPeak + at, mask=inside, other=-1), -1), 0)
    store_peak(Peak, PeakGrad, n, place, 0, peak.finite, in_range(of_row.peak_grad, ACC))


@triton.jit(do_not_specialize=["parts", "of_p", "of_q"])
def merge_normalizers_kernel(
    Sums,  # (5, parts·N) of `row_parts_kernel`, in ACC
    PartPeak,  # (parts·N,) of it
    Tau,  # (N,) temperature, in ACC
    Mask,  # (N,) bool
    NormalizersTau,  # (4, N) result, in ACC
    Peak,  # (N,) result, int64: place of the student's peak, or −1 where it is not heavy
    PeakTerms,  # (2, N) result: c = −g/q of a heavy peak and f, else 0, in ACC
    parts,
    of_p: tl.int64,  # the numbers of the divergence, see `launch.parameters`
    of_q: tl.int64,
    DIVERGENCE: tl.constexpr,
    LIGHT: tl.constexpr,  # see `Parameters`
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the number of parts
):
    n = tl.program_id(0)
    N = tl.num_programs(0)
    if tl.load(Mask + n) == 0:
        store_normalizers(NormalizersTau, n, Normalizers(0.0, 1.0, 0.0, 1.0))
        tl.store(Peak + n, -1)
        tl.store(PeakTerms + n, 0.0)
        tl.store(PeakTerms + N + n, 0.0)
        return
    part = tl.arange(0, BLOCK)
    at, size, inside = part * N + n, parts * N, part < parts
    exponent = exponent_of(tl.load(Tau + n))
    student = load_mass(Sums, at, size, inside, exponent, ACC)
    teacher = load_mass(Sums + 2 * size, at, size, inside, exponent, ACC)
    # From the rounded sums, which the second sweep takes.
    rounded_s = student.sum.to(ACC).to(tl.float64)
    rounded_t = teacher.sum.to(ACC).to(tl.float64)
    of_s = Mass(student.max, rounded_s, log2_of(tl.where(rounded_s == 0.0, 1.0, rounded_s), ACC), student.exists,
                student.log, student.share)  # fmt: skip
    of_t = Mass(teacher.max, rounded_t, log2_of(tl.where(rounded_t == 0.0, 1.0, rounded_t), ACC), teacher.exists,
                teacher.log, teacher.share)  # fmt: skip
    peak = find_row_peak(Sums, Sums + 4 * size, at, inside, of_s, of_t, exponent, ACC)
    heavy = peak.finite & (peak.q >= HEAVY)
    log_q = tl.where(heavy, -of_s.log_sum, 0.0).to(ACC)
    gap = tl.where(heavy, peak.gap, 0.0)
    # g as the second sweep has it, so that g + c·q of equal rows cancels in every entry.
    _, g, q = divergence_terms(
        log_q, in_range(log_q - gap, ACC), DIVERGENCE, Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT)
    )
    f, _, _ = peak_terms(
        -log_q, in_range(gap, ACC), DIVERGENCE, Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT)
    )
    store_normalizers(NormalizersTau, n, Normalizers(student.max, student.sum, teacher.max, teacher.sum))
    place = tl.max(tl.where(peak.own, tl.load(PartPeak + at, mask=inside, other=-1), -1), 0)
    tl.store(Peak + n, tl.where(heavy, place, -1).to(tl.int64))
    g = whole_g(tl.where(heavy, g, 0.0), DIVERGENCE, Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT))
    tl.store(PeakTerms + n, saturated(-g / q))
    tl.store(PeakTerms + N + n, saturated(tl.where(heavy, f, 0.0)))


@triton.jit(do_not_specialize=["parts"])
def merge_terms_kernel(
    F,  # (parts·N,) Σf of every part, in ACC
    G,  # (parts·N,) Σ(g + c·q), in ACC
    Mask,  # (N,) bool
    NormalizersTau,  # (4, N) at temperature τ, in ACC
    Peak,  # (N,) int64, place of a heavy peak or −1
    PeakTerms,  # (2, N) of `merge_normalizers_kernel`
    D,  # (N,) result, in ACC
    SumG,  # (N,) result Σg, in ACC
    PeakGrad,  # (N,) result τ·∂D/∂zˢ at the peak, in ACC
    parts,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the number of parts
):
    n = tl.program_id(0)
    N = tl.num_programs(0)
    of = load_normalizers(NormalizersTau, n)
    if (tl.load(Mask + n) == 0) | (of.l_s == 0.0) | (of.l_t == 0.0):
        tl.store(D + n, 0.0)
        tl.store(SumG + n, 0.0)
        tl.store(PeakGrad + n, 0.0)
        return
    part = tl.arange(0, BLOCK)
    f = tl.sum(tl.load(F + part * N + n, mask=part < parts, other=0.0).to(tl.float64), 0)
    g = tl.sum(tl.load(G + part * N + n, mask=part < parts, other=0.0).to(tl.float64), 0)
    c = tl.load(PeakTerms + n).to(tl.float64)
    f_peak = tl.load(PeakTerms + N + n).to(tl.float64)
    tl.store(D + n, in_range(f + f_peak, ACC))
    tl.store(SumG + n, in_range(g - c, ACC))
    grad = tl.where(tl.load(Peak + n) >= 0, -g / of.l_s.to(tl.float64), 0.0)
    tl.store(PeakGrad + n, in_range(grad, ACC))


def _sweep_parts(
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


def split_stats(
    student: Tensor, teacher: Tensor, mask: Tensor, difficulty: Tensor, normalizers_1: Tensor, config: dict[str, Any]
) -> None:
    """`token_stats` of split rows, into (B, L) and (4, B·L); `config` is that of its launch."""
    acc = acc_type(student, teacher)[1]
    sums, _, parts = _sweep_parts(student, teacher, None, mask, "difficulty", config)
    merge_stats_kernel[(mask.numel(),)](
        sums, mask, difficulty, normalizers_1, parts, ACC=acc, BLOCK=MOST_PARTS, num_warps=1, **FUSED
    )


def split_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    mask: Tensor,
    divergence: str,
    alpha: float,
    beta: float,
    d: Tensor,
    sum_g: Tensor,
    normalizers_tau: Tensor,
    peak: Tensor,
    peak_grad: Tensor,
    config: dict[str, Any],
) -> None:
    """`token_divergence` of split rows, into its five results; `config` is that of its launch."""
    dtype, acc = acc_type(student, teacher)
    if DIVERGENCES[divergence].sweeps == 2:
        config["TILES"] = 1  # two spill where rows are skewed
    sums, part_peak, parts = _sweep_parts(student, teacher, temperature, mask, divergence, config)
    grid, fixed = (mask.numel(),), {"ACC": acc, "BLOCK": MOST_PARTS, "num_warps": 1, **FUSED}
    if DIVERGENCES[divergence].sweeps == 1:
        merge_one_sweep_kernel[grid](
            sums, part_peak, temperature, mask, d, sum_g, normalizers_tau, peak, peak_grad, parts, WHAT=divergence,
            **fixed,
        )  # fmt: skip
        return
    of_peak = torch.empty(2, mask.numel(), dtype=dtype, device=mask.device)
    merge_normalizers_kernel[grid](
        sums, part_peak, temperature, mask, normalizers_tau, peak, of_peak, parts,
        DIVERGENCE=divergence, **parameters(divergence, alpha, beta, dtype), **fixed,
    )  # fmt: skip
    f, g, parts = sweep_parts_of_terms(
        student, teacher, temperature, mask, normalizers_tau, of_peak[0], peak, divergence, alpha, beta
    )
    merge_terms_kernel[grid](f, g, mask, normalizers_tau, peak, of_peak, d, sum_g, peak_grad, parts, **fixed)
