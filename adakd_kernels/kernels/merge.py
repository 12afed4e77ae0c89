"""The numbers of a row from those of its parts, (BLOCK,) each: the equations of docs/maths.md, section 9, in fp64.

As in `ops/shards.py`, but that the parts of a row are in one program, and that every peak is kept apart.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence_terms import divergence_terms, peak_terms, whole_g
from .rows import LN2, UNIT, exponent_rounding, exponent_scale, load_normalizers, log2_1p, lowest

# In the place of a logarithm of 0: products with 0 stay 0, and sums of a few stay finite in fp64.
NO_LOG = tl.constexpr(-1.0e300)


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


@triton.jit
def terms_of_peak(log_q, gap, DIVERGENCE: tl.constexpr, parameters, ACC: tl.constexpr):
    """(f, c = −g/q) of the peak; g as the second sweep has it, so that g + c·q of equal rows cancels in every entry."""
    _, g, q = divergence_terms(log_q, in_range(log_q - gap, ACC), DIVERGENCE, parameters)
    f, _, _ = peak_terms(-log_q, in_range(gap, ACC), DIVERGENCE, parameters)
    return f, -whole_g(g, DIVERGENCE, parameters) / q


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
