"""The divergences inside a kernel: the terms f and g of an entry.

Logarithms are to base 2 until a result is stored. `docs/maths.md`, sections 3 and 5, derives every line.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import LN2, log2_1p

# log2(1 + r)/r for r in [√½ − 1, √2 − 1), lowest power first: the polynomial of least relative error, 2.6e-8, which is
# less than fp32 rounds.
LOG2_POLYNOMIAL = tl.constexpr(
    (1.44269502, -0.72134733, 0.48091063, -0.36070368, 0.28791624, -0.23894481, 0.21571563, -0.20726982, 0.12583704)
)

# Below this the series of 1 − e^−z is exact in fp64 after nine terms.
SMALL = tl.constexpr(2.0**-5)


class Parameters(NamedTuple):
    """The numbers of a divergence, in the accumulation type; made where it is passed to a function, as `rows.Rows`."""

    of_p: tl.tensor  # α of alpha_beta, the exponent of p; of the others the weight of p in the mixture m
    of_q: tl.tensor  # β, the exponent of q; the weight of q, which 1 − of_p would round where of_p is next to 1
    LIGHT: tl.constexpr  # "p" or "q", whose weight is next to 0; None if no one's is


@triton.jit
def number(bits, ACC: tl.constexpr):
    """A number of type ACC from its bits in int64, see `launch.parameters`."""
    return bits.to(tl.int32 if ACC.primitive_bitwidth == 32 else tl.int64).to(ACC, bitcast=True)


@triton.jit
def log2_of_mixture(x):
    """log2 of a number in (0, 1], relatively exact near 1. The library's logarithm pays for subnormals, 0 and inf."""
    if x.dtype == tl.float64:
        result = tl.log2(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) & -0x800000  # that of x/√½, still in its place among the bits
        r = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
        ratio = tl.full(x.shape, LOG2_POLYNOMIAL[8], tl.float32)
        for power in tl.static_range(7, -1, -1):
            ratio = ratio * r + LOG2_POLYNOMIAL[power]
        result = ratio * r + exponent.to(tl.float32) * (1.0 / 0x800000)
    return result


@triton.jit
def reciprocal(x):
    """1/x of a number of moderate size, without the care for the largest and smallest that a division takes."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def logs_over_mixture(gap, mix, parameters):
    """log2(p/m) and log2(q/m) for m = of_p·p + of_q·q; `mix` is m over the larger of p and q.

    Where one weight is next to 0, m is next to its heavy part nearly everywhere, and that part's logarithm next to 0:
    it is taken as that of 1 + x, from a small x with all its digits.
    """
    log_mix = log2_of_mixture(mix)
    log_p = tl.minimum(-gap, 0.0) - log_mix
    log_q = tl.minimum(gap, 0.0) - log_mix
    if parameters.LIGHT is not None:
        light = parameters.of_p if parameters.LIGHT == "p" else parameters.of_q
        light_over_heavy = -gap if parameters.LIGHT == "p" else gap  # log2
        ratio = light * tl.exp2(tl.minimum(light_over_heavy, 100.0))
        of_heavy = -log2_1p(ratio - light)
        of_light = light_over_heavy + of_heavy
        near = ratio <= 1.0
        log_p = tl.where(near, of_light if parameters.LIGHT == "p" else of_heavy, log_p)
        log_q = tl.where(near, of_heavy if parameters.LIGHT == "p" else of_light, log_q)
    return log_p, log_q


@triton.jit
def divergence_terms(log_q, log_p, DIVERGENCE: tl.constexpr, parameters):
    """(f, g, q) of every entry, from log2 q and log2 p; f only where a second sweep needs it.

    The larger of p and q is taken out of every mixture, so that log-ratios of masses that underflow stay finite and
    every divergence is exactly 0 where log2 q = log2 p.
    """
    gap = log_q - log_p
    if DIVERGENCE == "forward_kl":
        return 0.0, -tl.exp2(log_p), tl.exp2(log_q)
    elif DIVERGENCE == "reverse_kl":
        q = tl.exp2(log_q)
        return 0.0, q * gap * LN2, q
    elif DIVERGENCE == "jeffreys":
        q = tl.exp2(log_q)
        return 0.0, q * gap * LN2 - tl.exp2(log_p), q
    elif DIVERGENCE == "hellinger":
        root_q = tl.exp2(0.5 * log_q)
        return 0.0, -0.5 * root_q * tl.exp2(0.5 * log_p), root_q * root_q
    elif DIVERGENCE == "alpha_beta":
        q_above = gap > 0.0
        # The larger of p and q to the power α + β is taken out; p_ab, q_ab and mixed are the powers relative to it.
        alpha, beta = parameters.of_p, parameters.of_q
        scale = tl.exp2((alpha + beta) * tl.where(q_above, log_q, log_p))
        low = tl.exp2(-(alpha + beta) * tl.abs(gap))
        mixed = tl.exp2(tl.where(q_above, -alpha, beta) * gap)
        p_ab = tl.where(q_above, low, 1.0)
        q_ab = tl.where(q_above, 1.0, low)
        f = scale * (alpha * (p_ab - mixed) + beta * (q_ab - mixed)) * (1.0 / (alpha * beta * (alpha + beta)))
        return f, scale * (q_ab - mixed) * (1.0 / alpha), tl.exp2(log_q)
    else:
        q_above = gap > 0.0
        # p = top·r_p and q = top·r_q; one of r_p and r_q is exactly 1.
        top = tl.exp2(tl.where(q_above, log_q, log_p))
        low = tl.exp2(-tl.abs(gap))
        r_p = tl.where(q_above, low, 1.0)
        r_q = tl.where(q_above, 1.0, low)
        q = top * r_q
        if DIVERGENCE == "total_variation":
            half = 0.5 * top * (1.0 - low)
            sign = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, -1.0, 0.0))
            return half, 0.5 * q * sign, q
        elif DIVERGENCE == "jensen_shannon":
            p_term, q_term = logs_over_mixture(gap, parameters.of_p * r_p + parameters.of_q * r_q, parameters)
            q_term = (parameters.of_q * LN2) * q * q_term
            return (parameters.of_p * LN2) * top * r_p * p_term + q_term, q_term, q
        elif DIVERGENCE == "skew_forward_kl":
            mix = parameters.of_p * r_p + parameters.of_q * r_q
            p = top * r_p
            return (
                LN2 * p * logs_over_mixture(gap, mix, parameters)[0],
                -parameters.of_q * p * (r_q * reciprocal(mix)),
                q,
            )
        else:
            tl.static_assert(DIVERGENCE == "skew_reverse_kl", "a divergence without a branch in divergence_terms")
            mix = parameters.of_q * r_q + parameters.of_p * r_p
            log_ratio = LN2 * logs_over_mixture(gap, mix, parameters)[1]
            return q * log_ratio, q * (log_ratio - parameters.of_q * (r_q * reciprocal(mix))), q


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
        return f, -g / q, q
