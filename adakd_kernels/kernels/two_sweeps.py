"""The divergences whose summands are not linear in the masses: normalisers first, then the terms (section 5.4)."""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence_terms import divergence_terms, peak_terms, units, whole_f, whole_g
from .peak import TokenResult, find_peak, lane_of_peak, lane_with_peak, load_rest_of_lane
from .rows import (
    ALIGNED,
    Normalizers,
    below,
    edge_entries,
    edge_start,
    exponent_rounding,
    load_tile,
    log2_1p,
    log2_mass,
    lowest,
    open_log2_mass,
    saturated,
    shrink,
    whole_steps,
)


class FirstSweep(NamedTuple):
    """What the first sweep finds beside the normalisers."""

    tail_s: tl.tensor  # (LANES,) l_s of every lane without the peak
    peak: tl.tensor  # offset of the student's peak from the row's aligned start
    gap: tl.tensor  # log2(q/p) there


class LogMass(NamedTuple):
    """What turns logits into log2 q and log2 p: the maxima, and c = log2 l; scalars or (LANES, 1)."""

    m_s: tl.tensor
    c_s: tl.tensor
    m_t: tl.tensor
    c_t: tl.tensor


@triton.jit
def fold_normalizer(Row, start, rows, m, l, EDGE: tl.constexpr):
    """A step of every lane's running maximum m and l = Σ 2^((z − m)·scale), (LANES,) each."""
    z = load_tile(Row, start, rows, EDGE)
    new_m = tl.maximum(m, tl.max(z, 1))
    if rows.TILES == 2:
        z_2 = load_tile(Row, start + rows.LANES * rows.VEC, rows, EDGE)
        new_m = tl.maximum(new_m, tl.max(z_2, 1))
    l = l * tl.exp2(below(m, new_m) * rows.scale) + tl.sum(tl.exp2(below(z, new_m[:, None]) * rows.scale), 1)
    if rows.TILES == 2:
        l += tl.sum(tl.exp2(below(z_2, new_m[:, None]) * rows.scale), 1)
    return new_m, l


@triton.jit
def finite_terms(s, t, log_q, log_p, c, DIVERGENCE: tl.constexpr, parameters):
    """(Σf, Σg) of every lane over its finite entries, in their `units`, or (Σf, Σ(g + c·q)), where c is given, without.

    Skew reverse KL leaves q out of g, see `reference.py`.
    """
    f, g, q = divergence_terms(log_q, log_p, DIVERGENCE, parameters)
    if c is not None and (DIVERGENCE == "skew_forward_kl" or DIVERGENCE == "skew_reverse_kl"):
        hidden = 0.0 * log_q + 0.0 * log_p  # a NaN, which the ratio in the mixture hides
        f += hidden
        g += hidden
    finite = (s != -float("inf")) & (t != -float("inf"))
    lost = -q / units(DIVERGENCE)[1] if DIVERGENCE == "skew_reverse_kl" else 0.0
    f = tl.sum(tl.where(finite, f, 0.0), 1)
    g = tl.where(finite, g, lost)
    if c is not None:
        f = whole_f(f, DIVERGENCE, parameters)
        g = tl.fma(q, c, whole_g(g, DIVERGENCE, parameters))
    return f, tl.sum(g, 1)


@triton.jit
def own_terms(s, t, scale, of, GUARDED: tl.constexpr, DIVERGENCE: tl.constexpr, parameters):
    """(Σf, Σg, finite) of every lane below the row's own `LogMass`, in their `units`.

    Without guards, `finite` is a number that an entry at −inf on either side makes infinite or NaN.
    """
    if GUARDED:
        log_q = log2_mass(s, of.m_s, of.c_s, scale)
        log_p = log2_mass(t, of.m_t, of.c_t, scale)
        f, g = finite_terms(s, t, log_q, log_p, None, DIVERGENCE, parameters)
        finite = 0.0 * f
    else:
        log_q = open_log2_mass(s, of.m_s, of.c_s, scale)
        log_p = open_log2_mass(t, of.m_t, of.c_t, scale)
        f, g, _ = divergence_terms(log_q, log_p, DIVERGENCE, parameters)
        f = tl.sum(f, 1)
        g = tl.sum(g, 1)
        finite = tl.sum(log_q * log_p, 1)
    return f, g, finite


@triton.jit
def sweep_normalizers(rows, rounding):
    """(`Normalizers`, `FirstSweep`) of a row; `rounding` is that of its scale, if the second sweep has none."""
    STEP: tl.constexpr = rows.TILES * rows.LANES * rows.VEC
    lane_m_s = tl.full((rows.LANES,), lowest(rows.scale.dtype), rows.scale.dtype)
    lane_m_t = lane_m_s
    l_s = tl.zeros((rows.LANES,), rows.scale.dtype)
    l_t = l_s
    for i in range(0, edge_entries(rows.V, rows.V, STEP, rows.SKEWED), STEP):
        start = edge_start(i, rows.V, STEP, rows.SKEWED)
        lane_m_s, l_s = fold_normalizer(rows.S, start, rows, lane_m_s, l_s, True)
        lane_m_t, l_t = fold_normalizer(rows.T, start, rows, lane_m_t, l_t, True)
    for start in range(whole_steps(rows.V, STEP, rows.SKEWED)[0], whole_steps(rows.V, STEP, rows.SKEWED)[1], STEP):
        lane_m_s, l_s = fold_normalizer(rows.S, start, rows, lane_m_s, l_s, False)
        lane_m_t, l_t = fold_normalizer(rows.T, start, rows, lane_m_t, l_t, False)
    m_s, lane = lane_with_peak(lane_m_s, l_s)
    m_t = tl.max(lane_m_t, 0)
    l_s *= shrink(lane_m_s, m_s, rows.scale, rounding)
    l_t *= shrink(lane_m_t, m_t, rows.scale, rounding)
    peak, t_peak = find_peak(rows, m_s, lane)
    # (LANES,) sums over the entries beside the peak: those of its lane are computed anew.
    other = tl.arange(0, rows.LANES) != lane
    l_s = tl.where(other, l_s, 0.0)
    l_t = tl.where(other, l_t, 0.0)
    start = lane * rows.WIDTH
    while start < rows.V + rows.skew:
        s, t = load_rest_of_lane(rows, start, peak)
        l_s += tl.sum(tl.exp2(below(s, m_s) * rows.scale), 1)
        l_t += tl.sum(tl.exp2(below(t, m_t) * rows.scale), 1)
        start += rows.LANES * rows.LANES * rows.WIDTH
    tail_s = tl.sum(l_s, 0)
    tail_t = tl.sum(l_t, 0)
    more_t = tl.sum(l_t - l_s, 0)
    # A student without finite entries has no mass; the peak of any other one has unnormalised mass 1.
    sum_s = tail_s + tl.where(peak < rows.V + rows.skew, 1.0, 0.0)
    b = shrink(t_peak, m_t, rows.scale, rounding)
    sum_t = tail_t + b
    some_t = tl.where(sum_t == 0.0, 1.0, sum_t)
    # Where both peaks are the same entry and the masses nearly equal, their difference is summed lane by lane, so that
    # its sign is right.
    gap = tl.where(b == 1.0, log2_1p(more_t / sum_s), tl.log2(some_t) - log2_1p(tail_s))
    gap -= log2_mass(t_peak, m_t, 0.0, rows.scale)
    return Normalizers(m_s, sum_s, m_t, sum_t), FirstSweep(l_s, peak, gap)


@triton.jit
def sweep_lanes(rows, of, hidden, GUARDED: tl.constexpr, DIVERGENCE: tl.constexpr, parameters):
    """`own_terms` of every lane over a row, one tile a step; `hidden` is 0."""
    STEP: tl.constexpr = rows.LANES * rows.VEC
    d = tl.zeros((rows.LANES,), rows.scale.dtype)
    sum_g = d
    finite = d
    for i in range(0, edge_entries(rows.V, rows.V, STEP, rows.SKEWED), STEP):
        start = edge_start(i, rows.V, STEP, rows.SKEWED) + hidden
        s = load_tile(rows.S, start, rows, True)
        t = load_tile(rows.T, start, rows, True)
        more_d, more_g, _ = own_terms(s, t, rows.scale, of, True, DIVERGENCE, parameters)
        d += more_d
        sum_g += more_g
    for start in range(whole_steps(rows.V, STEP, rows.SKEWED)[0], whole_steps(rows.V, STEP, rows.SKEWED)[1], STEP):
        s = load_tile(rows.S, start, rows, False)
        t = load_tile(rows.T, start, rows, False)
        more_d, more_g, more = own_terms(s, t, rows.scale, of, GUARDED, DIVERGENCE, parameters)
        d += more_d
        sum_g += more_g
        finite += more
    return d, sum_g, finite


@triton.jit
def sweep_terms(rows, Tau, of, first, DIVERGENCE: tl.constexpr, parameters):
    """The `TokenResult` of a row from its `Normalizers` and `FirstSweep`: the second sweep.

    With c = −g/q of the peak, g + c·q is 0 there, and the gradient is −q·S, S = Σ (g + c·q) over the other entries.
    """
    # As in the backward, so that both find the same sign of q − p.
    c_s = tl.log2(tl.where(of.l_s == 0.0, 1.0, of.l_s))
    c_t = tl.log2(tl.where(of.l_t == 0.0, 1.0, of.l_t))
    # (LANES, 1) Adding 0 makes them each lane's own numbers to the compiler: an instruction takes at most one operand
    # that is the same in all lanes, and the terms need two.
    own = (0.0 * first.tail_s)[:, None]
    of_lane = LogMass(of.m_s + own, c_s + own, of.m_t + own, c_t + own)
    d, sum_g, finite = sweep_lanes(rows, of_lane, 0, False, DIVERGENCE, parameters)
    # The D of Jensen–Shannon is such a number itself.
    finite = tl.sum(d if DIVERGENCE == "jensen_shannon" else finite, 0)
    if finite - finite != 0.0:
        # So that the compiler does not hold the addresses at the edges through the sweeps before.
        hidden = ALIGNED * (finite == 0.0).to(tl.int32)
        d, sum_g, _ = sweep_lanes(rows, of_lane, hidden, True, DIVERGENCE, parameters)
    # (LANES,) sums over the entries beside the peak: those of its lane are computed anew.
    lane = lane_of_peak(first.peak, rows)
    other = tl.arange(0, rows.LANES) != lane
    d = tl.where(other, d, 0.0)
    sum_g = tl.where(other, sum_g, 0.0)
    of_row = LogMass(of.m_s, c_s, of.m_t, c_t)
    start = lane * rows.WIDTH
    while start < rows.V + rows.skew:
        s, t = load_rest_of_lane(rows, start, first.peak)
        f, g, _ = own_terms(s, t, rows.scale, of_row, True, DIVERGENCE, parameters)
        d += f
        sum_g += g
        start += rows.LANES * rows.LANES * rows.WIDTH
    d = whole_f(d, DIVERGENCE, parameters)
    sum_g = whole_g(sum_g, DIVERGENCE, parameters)
    found = first.peak < rows.V + rows.skew
    t_peak = tl.load(rows.T + first.peak, mask=found, other=-float("inf")).to(rows.scale.dtype)
    finite = t_peak != -float("inf")
    # Where the peak has less than half of the mass, nothing cancels, and c is the sweep's with its own roundings.
    confident = c_s < 1.0
    gap = tl.where(confident, first.gap, -c_s - log2_mass(t_peak, of.m_t, c_t, rows.scale))
    f, c, q = peak_terms(c_s, gap, DIVERGENCE, parameters)
    # What cancels does so in every lane, before the lanes' sums are rounded.
    rest = tl.sum(sum_g + c * q * first.tail_s, 0)
    # Where a row is confident, the rounding of the scale multiplies all masses but the peak's by the same factor; its
    # part q does not cancel with the normaliser's.
    typical = tl.maximum(tl.log2(tl.sum(first.tail_s, 0) * (1.0 / rows.V)), -64.0)
    rest *= tl.exp2(q * typical * exponent_rounding(tl.load(Tau)))
    lost = tl.where(found, -q, 0.0) if DIVERGENCE == "skew_reverse_kl" else 0.0
    d = tl.sum(d, 0) + tl.where(finite, f, 0.0)
    sum_g = tl.sum(sum_g, 0) + tl.where(finite, -c * q, lost)
    grad = saturated(-q * tl.where(confident, rest, sum_g + c))
    return TokenResult(saturated(d), saturated(sum_g), first.peak, t_peak, grad)
