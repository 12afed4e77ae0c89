"""Logarithms over the mixture m = of_p·p + of_q·q of two masses (docs/maths.md, section 5)."""

import triton
import triton.language as tl
from triton.language import target_info
from triton.language.extra.cuda import libdevice

from .rows import log2_1p

# log2(1 + r)/r for |r| < NEAR, lowest power first: the polynomial of least relative error, 3.5e-8, which is less than
# fp32 rounds.
LOG2_POLYNOMIAL = tl.constexpr((1.44269502, -0.721347451, 0.48118031, -0.360955656))
NEAR = tl.constexpr(2.0**-5)

# 1/(centre + r) for |r| <= 1/16, lowest power first: the polynomial of least relative error, 4.4e-8.
RECIPROCAL_CENTRE = tl.constexpr(17 / 16)
RECIPROCAL_POLYNOMIAL = tl.constexpr((0.941176474, -0.885809839, 0.833703339, -0.788070619, 0.741713524))

# The power of two beyond which one mass is nothing beside another, with either in the place of both.
FAR = tl.constexpr(100.0)


@triton.jit
def approximate_log2(x):
    """log2 of a normal number, with an absolute error of 2^-22 between 1/2 and 2 on NVIDIA's GPUs."""
    if x.dtype == tl.float32 and target_info.is_cuda():
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def log2_of_mixture(x):
    """log2 of a normal number, relatively exact near 1, where the GPU's own logarithm is not."""
    result = approximate_log2(x)
    if x.dtype == tl.float32:
        r = x - 1.0
        near = tl.full(x.shape, LOG2_POLYNOMIAL[3], tl.float32)
        for power in tl.static_range(2, -1, -1):
            near = near * r + LOG2_POLYNOMIAL[power]
        result = tl.where(tl.abs(r) < NEAR, near * r, result)
    return result


@triton.jit
def reciprocal_polynomial(x):
    """1/x of a normal fp32 number, to 1.4e-7, in seven instructions of which none is of the unit for exponentials."""
    # The bits of a number are nearly its logarithm: x times this guess lies between 1 and 9/8.
    guess = (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    r = tl.fma(x, guess, -RECIPROCAL_CENTRE)
    rest = tl.full(x.shape, RECIPROCAL_POLYNOMIAL[4], tl.float32)
    for power in tl.static_range(3, -1, -1):
        rest = rest * r + RECIPROCAL_POLYNOMIAL[power]
    return guess * rest


@triton.jit
def reciprocal(x, ROOT: tl.constexpr):
    """1/x of a number of moderate size, without the care for the largest and smallest that a division takes.

    From Blackwell on, memory is so fast that the unit for exponentials, logarithms and roots would bind. ROOT: the
    kernel has so many other instructions that it does not.
    """
    if x.dtype == tl.float32 and target_info.cuda_capability_geq(10, 0) and not ROOT:
        result = reciprocal_polynomial(x)
    else:
        root = tl.rsqrt(x)
        result = root * root
    return result


@triton.jit
def mixture_over(log_ratio, weight, rest, LIGHT: tl.constexpr, ROOT: tl.constexpr):
    """(log2 x, 2^log_ratio, 1/x) of the mixture x = rest + weight·2^log_ratio, which is m over one of p and q.

    LIGHT: the weight is next to 0. Then so is the logarithm: it is taken from a small number with all its digits.
    """
    ratio = tl.exp2(tl.minimum(log_ratio, FAR))  # FAR also where both logarithms are −inf
    x = rest + weight * ratio
    over_x = reciprocal(x, ROOT)  # before the logarithm: after it, more registers were held
    log_x = log2_1p(weight * (ratio - 1.0)) if LIGHT else log2_of_mixture(x)
    return log_x, ratio, over_x


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
