"""The divergences inside a kernel: the terms f and g of an entry.

Logarithms are to base 2 until a result is stored. `docs/maths.md`, sections 3 and 5, derives every line.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from .mixture import log2_of_mixture, logs_over_mixture, mixture_over
from .rows import LN2, LOG2E, log2_1p

# Below this the series of 1 − e^−z is exact in fp64 after nine terms.
SMALL = tl.constexpr(2.0**-5)


class Parameters(NamedTuple):
    """The numbers of a divergence, in the accumulation type; made where it is passed to a function, as `rows.Rows`."""

    of_p: tl.tensor  # α of alpha_beta, the exponent of p; of the others the weight of p in the mixture m
    of_q: tl.tensor  # β, the exponent of q; the weight of q, which 1 − of_p would round where of_p is next to 1
    LIGHT: tl.constexpr  # "p" or "q", whose weight is next to 0; None if no one's is
    ROOT: tl.constexpr  # see `mixture.reciprocal`


@triton.jit
def number(bits, ACC: tl.constexpr):
    """A number of type ACC from its bits in int64, see `launch.parameters`."""
    return bits.to(tl.int32 if ACC.primitive_bitwidth == 32 else tl.int64).to(ACC, bitcast=True)


@triton.constexpr_function
def units(DIVERGENCE):
    """(of f, of g): the constants in what `divergence_terms` leaves out of every entry."""
    if DIVERGENCE in ("reverse_kl", "jeffreys"):
        return 1.0, math.log(2)
    if DIVERGENCE == "hellinger":
        return 1.0, -0.5
    if DIVERGENCE == "total_variation":
        return 0.5, 0.5
    if DIVERGENCE == "jensen_shannon":
        return -math.log(2), -math.log(2)
    if DIVERGENCE == "skew_forward_kl":
        return -math.log(2), -1.0
    if DIVERGENCE == "skew_reverse_kl":
        return -math.log(2), -math.log(2)
    return 1.0, 1.0


@triton.jit
def whole_f(f, DIVERGENCE: tl.constexpr, parameters):
    """f, or a sum of it, with what `divergence_terms` leaves out of every entry."""
    f *= units(DIVERGENCE)[0]
    if DIVERGENCE == "alpha_beta":
        f *= 1.0 / (parameters.of_p * parameters.of_q * (parameters.of_p + parameters.of_q))
    return f


@triton.jit
def whole_g(g, DIVERGENCE: tl.constexpr, parameters):
    """The same of g."""
    g *= units(DIVERGENCE)[1]
    if DIVERGENCE == "alpha_beta":
        g *= 1.0 / parameters.of_p
    elif DIVERGENCE == "jensen_shannon" or DIVERGENCE == "skew_forward_kl":
        g *= parameters.of_q
    return g


@triton.jit
def divergence_terms(log_q, log_p, DIVERGENCE: tl.constexpr, parameters):
    """(f, g, q) of every entry, from log2 q and log2 p, f and g in their `units`; f only where a second sweep needs it.

    The mass whose logarithm over the mixture counts, or the larger one where both do, is taken out of the mixture, so
    that log-ratios of masses that underflow stay finite and every divergence is exactly 0 where log2 q = log2 p.
    """
    gap = log_q - log_p
    if DIVERGENCE == "forward_kl":
        return 0.0, -tl.exp2(log_p), tl.exp2(log_q)
    elif DIVERGENCE == "reverse_kl":
        q = tl.exp2(log_q)
        return 0.0, q * gap, q
    elif DIVERGENCE == "jeffreys":
        q = tl.exp2(log_q)
        return 0.0, q * gap - LOG2E * tl.exp2(log_p), q
    elif DIVERGENCE == "hellinger":
        root_q = tl.exp2(0.5 * log_q)
        return 0.0, root_q * tl.exp2(0.5 * log_p), root_q * root_q
    elif DIVERGENCE == "alpha_beta":
        q_above = gap > 0.0
        # The larger of p and q to the power α + β is taken out; p_ab, q_ab and mixed are the powers relative to it.
        alpha, beta = parameters.of_p, parameters.of_q
        scale = tl.exp2((alpha + beta) * tl.where(q_above, log_q, log_p))
        low = tl.exp2(-(alpha + beta) * tl.abs(gap))
        mixed = tl.exp2(tl.where(q_above, -alpha, beta) * gap)
        p_ab = tl.where(q_above, low, 1.0)
        q_ab = tl.where(q_above, 1.0, low)
        f = scale * (alpha * (p_ab - mixed) + beta * (q_ab - mixed))
        return f, scale * (q_ab - mixed), tl.exp2(log_q)
    elif DIVERGENCE == "total_variation":
        q = tl.exp2(log_q)
        # A gap that is neither is 0 or NaN.
        signed = tl.where(gap > 0.0, q, tl.where(gap < 0.0, -q, gap))
        return tl.abs(q - tl.exp2(log_p)), signed, q
    elif DIVERGENCE == "jensen_shannon":
        q_above = gap > 0.0
        top = tl.exp2(tl.where(q_above, log_q, log_p))
        low = tl.exp2(-tl.abs(gap))
        w_low = tl.where(q_above, parameters.of_p, parameters.of_q)
        w_top = tl.where(q_above, parameters.of_q, parameters.of_p)
        part = w_low * low
        mix = w_top + part
        if parameters.LIGHT is not None:
            log_p, log_q = logs_over_mixture(gap, mix, parameters)
            of_top = -tl.where(q_above, log_q, log_p)
            of_low = -tl.where(q_above, log_p, log_q)
            f = top * (part * of_low + w_top * of_top)
        else:
            of_top = log2_of_mixture(mix)
            of_low = of_top + tl.abs(gap)
            f = top * (mix * of_top + part * tl.abs(gap))
        g = top * tl.where(q_above, of_top, low * of_low)
        return f, g, top * tl.where(q_above, 1.0, low)
    elif DIVERGENCE == "skew_forward_kl":
        p = tl.exp2(log_p)
        log_mix, ratio, rcp = mixture_over(
            gap, parameters.of_q, parameters.of_p, parameters.LIGHT == "q", parameters.ROOT
        )
        return p * log_mix, p * (ratio * rcp), tl.exp2(log_q)
    else:
        tl.static_assert(DIVERGENCE == "skew_reverse_kl", "a divergence without a branch in divergence_terms")
        q = tl.exp2(log_q)
        log_mix, _, rcp = mixture_over(-gap, parameters.of_p, parameters.of_q, parameters.LIGHT == "p", parameters.ROOT)
        return q * log_mix, q * (log_mix + (parameters.of_q * LOG2E) * rcp), q


@triton.constexpr_function
def needs_bounds(DIVERGENCE):
    """Whether `gradient_terms` are finite only if both logarithms are."""
    return DIVERGENCE not in (
        "forward_kl", "hellinger", "total_variation", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl"
    )  # fmt: skip


@triton.constexpr_function
def vanishes_with_q(DIVERGENCE):
    """Whether g is 0 where q is."""
    return DIVERGENCE in (
        "reverse_kl", "hellinger", "total_variation", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl",
        "alpha_beta",
    )  # fmt: skip


@triton.jit
def gradient_terms(log_q, log_p, DIVERGENCE: tl.constexpr, parameters):
    """(g, q) of every entry, those of `divergence_terms` where f is not asked for."""
    gap = log_q - log_p
    q = tl.exp2(log_q)
    if DIVERGENCE == "jensen_shannon":
        g = q * mixture_over(-gap, parameters.of_p, parameters.of_q, parameters.LIGHT == "p", parameters.ROOT)[0]
    elif DIVERGENCE == "skew_forward_kl":
        g = q * mixture_over(gap, parameters.of_q, parameters.of_p, parameters.LIGHT == "q", parameters.ROOT)[2]
    elif DIVERGENCE == "alpha_beta":
        # q^β·(q^α − p^α) with the larger of p and q taken out of the difference, and out of the power beside it.
        alpha, beta = parameters.of_p, parameters.of_q
        away = 1.0 - tl.exp2(-tl.abs(alpha * gap))
        g = tl.exp2(tl.fma(beta, log_q, alpha * tl.maximum(log_p, log_q))) * tl.where(gap > 0.0, away, -away)
    elif DIVERGENCE == "total_variation":
        g = tl.where(log_q > log_p, q, tl.where(log_q < log_p, -q, 0.0))
    else:
        _, g, q = divergence_terms(log_q, log_p, DIVERGENCE, parameters)
    return g, q


@triton.jit
def one_minus_exp2(x):
    """1 − 2^−x of x ≥ 0, relatively exact near 0."""
    z = x * LN2
    series = 0.0 * z + 1.0
    for n in tl.static_range(9, 1, -1):
        series = 1.0 - z * (1.0 / n) * series
    return tl.where(z < SMALL, z * series, 1.0 - tl.exp2(-x))


@triton.jit
def peak_terms(log_l, gap, DIVERGENCE: tl.constexpr, parameters):
    """(f, −g/q, q) of the student's peak, from log2 of its normaliser and log2(q/p): those above, exact at p ≈ q.

    There, f may be smaller than the rounding of p and q, and so may the D of a confident row.
    """
    q = tl.exp2(-log_l)
    q_above = gap > 0.0
    # `top` is the larger of p and q, and `away` is 1 − (the smaller)/(the larger).
    log_top = -log_l - tl.where(q_above, 0.0, gap)
    away = one_minus_exp2(tl.abs(gap))
    top = tl.where(q_above, q, q * tl.exp2(-gap))
    if DIVERGENCE == "total_variation":
        return 0.5 * top * away, tl.where(gap > 0.0, -0.5, tl.where(gap < 0.0, 0.5, 0.0 * gap)), q
    elif DIVERGENCE == "alpha_beta":
        alpha, beta = parameters.of_p, parameters.of_q
        scale = tl.exp2((alpha + beta) * log_top)
        one = one_minus_exp2(tl.where(q_above, alpha * gap, -beta * gap))
        all_ = one_minus_exp2((alpha + beta) * tl.abs(gap))
        f = scale * ((alpha + beta) * one - tl.where(q_above, alpha * all_, beta * all_))
        # q_ab − mixed of `divergence_terms`
        g = scale * tl.where(q_above, one, one - all_)
        return f * (1.0 / (alpha * beta * (alpha + beta))), g * (-1.0 / alpha) / q, q
    elif DIVERGENCE == "jensen_shannon" or DIVERGENCE == "skew_forward_kl" or DIVERGENCE == "skew_reverse_kl":
        # m over the larger of p and q is 1 − lost; where that cancels, its logarithm is taken from its parts.
        of_p, of_q = parameters.of_p, parameters.of_q
        lost = tl.where(q_above, of_p * away, of_q * away)
        low = tl.exp2(-tl.abs(gap))
        parts = tl.where(q_above, of_p * low + of_q, of_q * low + of_p)
        log_mix = tl.where(lost < 0.5, log2_1p(-lost), tl.log2(parts))
        p_term = LN2 * (tl.minimum(-gap, 0.0, propagate_nan=tl.PropagateNan.ALL) - log_mix)
        q_term = LN2 * (tl.minimum(gap, 0.0, propagate_nan=tl.PropagateNan.ALL) - log_mix)
        p = tl.where(q_above, q * tl.exp2(-gap), top)
        mix = of_p * p + of_q * q
        if DIVERGENCE == "jensen_shannon":
            return of_p * p * p_term + of_q * q * q_term, -of_q * q_term, q
        elif DIVERGENCE == "skew_forward_kl":
            return p * p_term, of_q * (p / mix), q
        else:
            return q * q_term, of_q * (q / mix) - q_term, q
    else:
        f, g, _ = divergence_terms(-log_l, -log_l - gap, DIVERGENCE, parameters)
        return whole_f(f, DIVERGENCE, parameters), -whole_g(g, DIVERGENCE, parameters) / q, q
