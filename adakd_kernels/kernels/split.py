"""Rows that are split over programs, where there are too few of them to fill the GPU (docs/maths.md, section 9).

`row_parts.py` sweeps the parts of all rows; the kernels here merge those of a token, one program a token, always in the
same order and in fp64. Statistics and divergences of one sweep take both. Those of two sweeps take them twice: the
second sweep needs the normalisers of the whole row. What is read of the rows is the same as of whole ones. The gradient
needs numbers of the token alone, so its programs take parts and nothing is merged.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..divergences import DIVERGENCES
from .divergence_terms import Parameters, number
from .launch import FUSED, MOST_PARTS, acc_type, parameters
from .merge import (
    Mass,
    exponent_of,
    find_row_peak,
    in_range,
    load_mass,
    log2_of,
    merge_distance,
    merge_parts,
    merge_terms_kernel,
    terms_of_peak,
)
from .peak import store_peak
from .row_parts import numbers, sweep_parts
from .rows import LN2, LOG2E, Normalizers, lowest, saturated, store_normalizers
from .token_terms import sweep_parts_of_terms

# Mass of a peak from which on (10) could cancel there, so that its terms are computed apart, as in `ops/shards.py`.
HEAVY = tl.constexpr(1.0 / 16.0)


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
    f, c = terms_of_peak(
        log_q, gap, DIVERGENCE, Parameters(number(of_p, ACC), number(of_q, ACC), LIGHT, False), ACC
    )  # fmt: skip
    store_normalizers(NormalizersTau, n, Normalizers(student.max, student.sum, teacher.max, teacher.sum))
    place = tl.max(tl.where(peak.own, tl.load(PartPeak + at, mask=inside, other=-1), -1), 0)
    tl.store(Peak + n, tl.where(heavy, place, -1).to(tl.int64))
    tl.store(PeakTerms + n, saturated(tl.where(heavy, c, 0.0)))
    tl.store(PeakTerms + N + n, saturated(tl.where(heavy, f, 0.0)))


def split_stats(
    student: Tensor, teacher: Tensor, mask: Tensor, difficulty: Tensor, normalizers_1: Tensor, config: dict[str, Any]
) -> None:
    """`token_stats` of split rows, into (B, L) and (4, B·L); `config` is that of its launch."""
    acc = acc_type(student, teacher)[1]
    sums, _, parts = sweep_parts(student, teacher, None, mask, "difficulty", config)
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
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    config: dict[str, Any],
) -> None:
    """`token_divergence` of split rows, into its five results; `config` is that of its launch."""
    d, sum_g, normalizers_tau, peak, peak_grad = results
    dtype, acc = acc_type(student, teacher)
    if DIVERGENCES[divergence].sweeps == 2:
        config["TILES"] = 1  # two spill where rows are skewed
    sums, part_peak, parts = sweep_parts(student, teacher, temperature, mask, divergence, config)
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
