"""The mathematics of AdaKD in plain torch: equations (1)-(10) of docs/maths.md, on any device, in fp32 or fp64.

Kernels and compiled code are tested against these functions. They are also the body of every op on a device that has
no kernel, which hands them some rows at a time, and `adakd_loss` below is the eager baseline of the benchmarks. They
allocate several temporaries of the size of the rows, which the kernels do not.

Most rows have no entry at −inf. To look for one costs little beside the masks that such an entry takes, so that these
are made only where there is one.

Shapes: logits are (..., V), per-token tensors are (...). Logits of other types are computed in fp32, fp64 stays fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence, get_divergence, with_parameters

Summand = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def accumulation_dtype(*logits: Tensor) -> torch.dtype:
    """fp64 where any of the logits is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


class Normalizer(NamedTuple):
    """Σᵥ exp(zᵥ/τ) of each row, kept as the row's maximum and the sum relative to it; an empty row is (−inf, 0)."""

    max: Tensor
    sum: Tensor


class Normalizers(NamedTuple):
    """The `Normalizer` of student and teacher. The operators bundle the four in one (4, ...) tensor, in this order."""

    max_s: Tensor
    sum_s: Tensor
    max_t: Tensor
    sum_t: Tensor

    @classmethod
    def of(cls, bundle: Tensor) -> Normalizers:
        """The (4, ...) tensor of an operator, taken apart: views of shape (...)."""
        return cls(*bundle.unbind())


class GradientCall(NamedTuple):
    """The arguments of `adakd::token_divergence_backward` and of its twin in place: what equation (10) needs.

    (B, L) numbers are in the accumulation type or are converted to it. `labels`, `ce_weight` and `normalizers_1` add
    the gradient of the cross-entropy; all three or none.
    """

    student: Tensor  # (B, L, Vˢ) logits
    teacher: Tensor  # (B, L, Vᵗ) logits; the common vocabulary is the first min(Vˢ, Vᵗ) entries
    temperature: Tensor  # (B, L) τ
    weight: Tensor  # (B, L) gradient of the loss in D; the rows of weight 0 are not read, and their gradient is 0
    sum_g: Tensor  # (B, L) Σg
    normalizers_tau: Tensor  # (4, B, L) `Normalizers` at temperature τ
    peak: Tensor  # (B, L) int64, the student's most likely entry or −1
    peak_grad: Tensor  # (B, L) τ·∂D/∂zˢ there
    labels: Tensor | None  # (B, L)
    ce_weight: Tensor | None  # (B, L) gradient of the loss in the cross-entropy
    normalizers_1: Tensor | None  # (4, B, L) `Normalizers` at temperature 1
    divergence: str  # a name of `DIVERGENCES`
    alpha: float
    beta: float


def _shifted(logits: Tensor, z_max: Tensor, temperature: Tensor) -> Tensor:
    """(z − m)/τ."""
    return (logits - z_max.unsqueeze(-1)).div_(temperature.unsqueeze(-1))


def _below_maximum(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Row maximum m, a constant for autograd, and (z − m)/τ; an empty row stays −inf."""
    z_max = logits.detach().amax(-1)
    return z_max, _shifted(logits, z_max.masked_fill(z_max == -math.inf, 0.0), temperature)


def _own_normalizer(logits: Tensor, temperature: Tensor) -> tuple[Normalizer, Tensor]:
    """`normalizer`, and the logits relative to it."""
    z_max, shifted = _below_maximum(logits, temperature)
    return Normalizer(z_max, shifted.exp().sum(-1)), shifted


def normalizer(logits: Tensor, temperature: Tensor | float = 1.0) -> Normalizer:
    """Row maximum m and Σᵥ exp((zᵥ − m)/τ); the maximum is a constant for autograd."""
    return _own_normalizer(logits, torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device))[0]


def common_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The first min(Vˢ, Vᵗ) entries of both, in the accumulation type."""
    vocab = min(student.shape[-1], teacher.shape[-1])
    acc = accumulation_dtype(student, teacher)
    return student[..., :vocab].to(acc), teacher[..., :vocab].to(acc)


def _bounded(values: Tensor, lowest: float) -> bool:
    """Whether all values are at least so high, and none is NaN."""
    return not values.shape[-1] or bool((values.detach().amin(-1) >= lowest).all())


def _log_mass(logits: Tensor, of: Normalizer, temperature: Tensor, shifted: Tensor | None = None) -> Tensor:
    """log of the masses below a normaliser: (1) in logs where it is the row's own; an empty row stays −inf.

    The logarithm of a finite logit is finite: where it would leave the type's range it is half of the lowest number, so
    that differences of two are finite too. Its derivative there is 1/τ, as elsewhere. `shifted` is (z − m)/τ, if
    known, and is overwritten.
    """
    empty = of.sum == 0
    if shifted is None:
        shifted = _shifted(logits, of.max.masked_fill(empty, 0.0), temperature)
    log_p = shifted.sub_(of.sum.masked_fill(empty, 1.0).log().unsqueeze(-1))
    lowest = 0.5 * torch.finfo(logits.dtype).min
    if _bounded(log_p, lowest):
        return log_p
    below = (log_p < lowest) & (logits != -math.inf)
    return torch.where(below, lowest + (logits - logits.detach()) / temperature.unsqueeze(-1), log_p)


def _log_softmax(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Normalizer]:
    """(1) in logs and the normaliser."""
    of, shifted = _own_normalizer(logits, temperature)
    return _log_mass(logits, of, temperature, shifted), of


def _log_over_mixture(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(a/m) with m = weight_a·a + (1 − weight_a)·b, exactly 0 at a = b."""
    return -torch.logaddexp(torch.full_like(log_a, math.log(weight_a)), log_b - log_a + math.log1p(-weight_a))


def _powers(log_p: Tensor, log_q: Tensor, *powers: tuple[float, float]) -> Iterator[Tensor]:
    """pᵃqᵇ of each (a, b): the larger mass to the power a + b times a factor that is exactly 1 at p = q."""
    top = torch.maximum(log_p, log_q).detach()
    over_p, over_q = log_p - top, log_q - top
    scale = (sum(powers[0]) * top).exp()
    for a, b in powers:  # all of one a + b
        exponent = a * over_p if b == 0.0 else b * over_q if a == 0.0 else a * over_p + b * over_q
        yield scale * exponent.exp()


def _alpha_beta_summand(p: Tensor, q: Tensor, lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    mixed, p_ab, q_ab = _powers(lp, lq, (a, b), (a + b, 0.0), (0.0, a + b))
    return (a * (p_ab - mixed) + b * (q_ab - mixed)) / (a * b * (a + b))


def _alpha_beta_gradient(p: Tensor, q: Tensor, lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    mixed, q_ab = _powers(lp, lq, (a, b), (0.0, a + b))
    return (q_ab - mixed) / a


def _skew_reverse_gradient(p: Tensor, q: Tensor, lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    over_mixture = _log_over_mixture(lq, lp, a)
    return q * (over_mixture - a * over_mixture.exp())


# The summand f(p, q) and g = q ∂f/∂q of every divergence, from p, q and their logarithms (the table of docs/maths.md).
# Arguments: p, q, log p, log q, alpha, beta. Entries that are not finite come as log p = log q = 0, masked afterwards.
SUMMANDS: dict[str, Summand] = {
    "forward_kl": lambda p, q, lp, lq, a, b: p * (lp - lq),
    "reverse_kl": lambda p, q, lp, lq, a, b: q * (lq - lp),
    "jeffreys": lambda p, q, lp, lq, a, b: (p - q) * (lp - lq),
    "jensen_shannon": lambda p, q, lp, lq, a, b: (
        b * p * _log_over_mixture(lp, lq, b) + (1 - b) * q * _log_over_mixture(lq, lp, 1 - b)
    ),
    "skew_forward_kl": lambda p, q, lp, lq, a, b: p * _log_over_mixture(lp, lq, a),
    "skew_reverse_kl": lambda p, q, lp, lq, a, b: q * _log_over_mixture(lq, lp, a),
    "total_variation": lambda p, q, lp, lq, a, b: 0.5 * (p - q).abs(),
    "alpha_beta": _alpha_beta_summand,
    "hellinger": lambda p, q, lp, lq, a, b: 0.5 * ((0.5 * lp).exp() - (0.5 * lq).exp()).square(),
}

GRADIENTS: dict[str, Summand] = {
    "forward_kl": lambda p, q, lp, lq, a, b: -p,
    "reverse_kl": lambda p, q, lp, lq, a, b: q * (lq - lp),
    "jeffreys": lambda p, q, lp, lq, a, b: q * (lq - lp) - p,
    "jensen_shannon": lambda p, q, lp, lq, a, b: (1 - b) * q * _log_over_mixture(lq, lp, 1 - b),
    "skew_forward_kl": lambda p, q, lp, lq, a, b: -(1 - a) * p * _log_over_mixture(lq, lp, 1 - a).exp(),
    "skew_reverse_kl": _skew_reverse_gradient,
    "total_variation": lambda p, q, lp, lq, a, b: 0.5 * q * ((q - p).sign() + 0.0 * p),  # the sign of NaN is 0 in torch
    "alpha_beta": _alpha_beta_gradient,
    "hellinger": lambda p, q, lp, lq, a, b: -0.5 * (0.5 * (lp + lq)).exp(),
}


# Divergences whose g above leaves out a term c·q with c = 1. In (10) it cancels if all entries are finite; otherwise
# the mass Σ q of the others is subtracted from Σ g instead (docs/maths.md, section 4).
_G_WITHOUT_Q = ("reverse_kl", "jeffreys", "skew_reverse_kl")
# Divergences whose f and g do not read the masses themselves, which then need no exponential.
_OF_LOGARITHMS = ("alpha_beta", "hellinger")


class _Masses:
    """The masses of rows (…, V) of both sides, from their logarithms."""

    def __init__(self, log_p: Tensor, log_q: Tensor) -> None:
        self.log_p, self.log_q = log_p, log_q

    @cached_property
    def others(self) -> Tensor | None:
        """The entries that are not finite, −inf on a side; None if there are none. NaN is, so that it is seen."""
        if all(_bounded(x, torch.finfo(x.dtype).min) for x in (self.log_p, self.log_q)):
            return None
        return (self.log_p == -math.inf) | (self.log_q == -math.inf)

    def only_finite(self, values: Tensor) -> Tensor:
        """The values, 0 at the others."""
        return values if self.others is None else values.masked_fill(self.others, 0.0)

    def only_others(self, values: Tensor) -> Tensor:
        """Σ of the values of the others of every row."""
        if self.others is None:
            return torch.zeros_like(values[..., 0])
        return values.masked_fill(~self.others, 0.0).sum(-1)

    @cached_property
    def empty(self) -> Tensor:
        """Rows without a finite entry on a side."""
        if self.others is None:
            return torch.zeros_like(self.log_q[..., 0], dtype=torch.bool)
        return (self.log_q == -math.inf).all(-1) | (self.log_p == -math.inf).all(-1)

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def q(self) -> Tensor:
        return self.log_q.exp()

    def entries(self, table: dict[str, Summand], div: Divergence) -> Tensor:
        """The summand at the finite entries, 0 elsewhere."""
        log_p, log_q = self.only_finite(self.log_p), self.only_finite(self.log_q)
        p, q = (log_p, log_q) if div.name in _OF_LOGARITHMS else (self.p, self.q)
        return self.only_finite(table[div.name](p, q, log_p, log_q, *div.parameters))


def _total(masses: _Masses, div: Divergence) -> Tensor:
    """D of every row; 0 where a row is empty."""
    total = masses.entries(SUMMANDS, div).sum(-1)
    if div.name == "hellinger" and masses.others is not None:  # 1 − Σ√(pq): one that is left out adds half of its mass
        total = total + 0.5 * masses.only_others(masses.p + masses.q)
    return total.masked_fill(masses.empty, 0.0)


class _Gradient(NamedTuple):
    """Of every row Σ g, its peak, and τ·∂D/∂zˢ at the peak; what `entries` makes of them the gradient of all entries.

    `rest` (N, V) is g + c·q of the entries beside the peak, and `sum_rest` its sum with what the others add.
    """

    sum_g: Tensor
    peak: Tensor
    peak_grad: Tensor
    rest: Tensor
    sum_rest: Tensor

    def entries(self, masses: _Masses) -> Tensor:
        """τ·∂D/∂zˢ (N, V)."""
        return masses.only_finite(self.rest - masses.q * self.sum_rest.unsqueeze(-1))


def _first_largest(values: Tensor) -> Tensor:
    """`argmax(-1, keepdim=True)`, at a fifth of its time: by `amax` of blocks, and then within a block."""
    vocab, width = values.shape[-1], 128
    if vocab <= width:
        return values.argmax(-1, keepdim=True)
    whole = vocab - vocab % width
    of_blocks = [values[..., :whole].reshape(*values.shape[:-1], whole // width, width).amax(-1)]
    if whole < vocab:
        of_blocks.append(values[..., whole:].amax(-1, keepdim=True))
    block = width * torch.cat(of_blocks, -1).argmax(-1, keepdim=True)
    inside = (block + torch.arange(width, device=values.device)).clamp_max_(vocab - 1)
    return block + values.gather(-1, inside).argmax(-1, keepdim=True)


def _gradient(masses: _Masses, div: Divergence) -> _Gradient:
    """Equation (10) without its weight, with c such that g + c·q is 0 at the student's peak.

    At a peak of mass near 1, g and q·Σ g cancel. q·Σ (g + c·q) over the other entries does not, and so keeps its
    relative accuracy (docs/maths.md, section 4). Where the teacher has −inf at the peak, `peak` is −1.
    """
    g, q = masses.entries(GRADIENTS, div), masses.q
    top = _first_largest(masses.log_q)
    q_top, g_top = q.gather(-1, top), g.gather(-1, top)
    finite = torch.ones_like(top, dtype=torch.bool) if masses.others is None else ~masses.others.gather(-1, top)
    c = torch.where(finite, -g_top / q_top, 0.0)
    # 0·c instead of 0, so that a NaN reaches the result.
    rest = masses.only_finite(g + c * q).scatter_(-1, top, 0.0 * c)
    total = rest.sum(-1, keepdim=True)
    if masses.others is not None:
        left_out = masses.only_others(q).unsqueeze(-1)
        total = total + (c - float(div.name in _G_WITHOUT_Q)) * left_out
    peak = top.where(finite, -1)
    peak_grad = (0.0 * c - q_top * total).where(finite, 0.0)
    sum_g, peak, peak_grad, total = (x.squeeze(-1) for x in (total - c, peak, peak_grad, total))
    return _Gradient(sum_g, peak, peak_grad, rest, total)


def _prepare(student: Tensor, teacher: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Both logits over the common vocabulary and one temperature a row, in the accumulation type."""
    z_s, z_t = common_vocabulary(student, teacher)
    return z_s, z_t, torch.as_tensor(temperature, dtype=z_s.dtype, device=z_s.device).expand(z_s.shape[:-1])


def token_divergence(
    student: Tensor, teacher: Tensor, temperature: Tensor | float = 1.0, divergence: str | Divergence = "reverse_kl"
) -> Tensor:
    """D(p^τ, q^τ) of every row, by the table of docs/maths.md; autograd differentiates it in the student's logits.

    An entry that is −inf on either side is a constant of D, so its gradient is 0. An empty row gives 0.
    """
    z_s, z_t, tau = _prepare(student, teacher.detach(), temperature)
    if z_s.requires_grad:
        z_s = torch.where((z_s == -math.inf) | (z_t == -math.inf), z_s.detach(), z_s)
    return _total(_Masses(_log_softmax(z_t, tau)[0], _log_softmax(z_s, tau)[0]), get_divergence(divergence))


def token_stats(student: Tensor, teacher: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Normalizers]:
    """(2) of every row and its normalisers, without a gradient; a row that is empty on a side gives 0."""
    *both, tau = _prepare(student.detach(), teacher.detach(), temperature)
    roots, of_rows = [], []
    for z in both:
        z_max, half = _below_maximum(z, 2.0 * tau)
        root = half.exp_()  # one exponential for √p and p
        z_sum = root.square().sum(-1)
        roots.append(root.div_(z_sum.sqrt().unsqueeze(-1)))
        of_rows += [z_max, z_sum]
    normalizers = Normalizers(*of_rows)
    empty = (normalizers.sum_s == 0) | (normalizers.sum_t == 0)
    difference = roots[0].sub_(roots[1])  # a sum of its squares, so that nothing cancels
    return 0.5 * difference.square_().sum(-1).masked_fill_(empty, 0.0), normalizers


class TokenSums(NamedTuple):
    """Of every row: D, Σ g, the normalisers of student and teacher at τ, the peak and its gradient.

    `peak` is the student's most likely entry, −1 where the teacher has −inf there, and `peak_grad` is τ·∂D/∂zˢ there.
    """

    d: Tensor
    sum_g: Tensor
    normalizers: Normalizers
    peak: Tensor
    peak_grad: Tensor


def token_sums(
    student: Tensor, teacher: Tensor, temperature: Tensor | float, divergence: str | Divergence
) -> TokenSums:
    """`TokenSums` of every row."""
    return token_sums_and_masses(student, teacher, temperature, divergence)[0]


def token_sums_and_masses(
    student: Tensor, teacher: Tensor, temperature: Tensor | float, divergence: str | Divergence
) -> tuple[TokenSums, _Masses]:
    """`TokenSums` of every row, and the masses, which `rebuilt_gradient` takes where it follows at once."""
    z_s, z_t, tau = _prepare(student, teacher, temperature)
    div = get_divergence(divergence)
    (log_q, of_student), (log_p, of_teacher) = _log_softmax(z_s, tau), _log_softmax(z_t, tau)
    masses = _Masses(log_p, log_q)
    sum_g, peak, peak_grad, *_ = _gradient(masses, div)
    return TokenSums(_total(masses, div), sum_g, Normalizers(*of_student, *of_teacher), peak, peak_grad), masses


def token_divergence_grad(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor | float = 1.0,
    divergence: str | Divergence = "reverse_kl",
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Equation (10) without autograd: weight · ∂D/∂zˢ in the student's shape and type."""
    z_s, z_t, tau = _prepare(student, teacher, temperature)
    masses = _Masses(_log_softmax(z_t, tau)[0], _log_softmax(z_s, tau)[0])
    scale = torch.as_tensor(weight, dtype=z_s.dtype, device=z_s.device).expand(z_s.shape[:-1]) / tau
    entries = scale.unsqueeze(-1) * _gradient(masses, get_divergence(divergence)).entries(masses)
    grad = torch.zeros(student.shape, dtype=student.dtype, device=student.device)
    grad[..., : entries.shape[-1]] = entries.to(student.dtype)
    return grad


def cross_entropy_grad(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """∂(−log q at the label)/∂zˢ = q − [v = label], in the student's shape and the accumulation type."""
    z_s, _ = common_vocabulary(student, teacher)
    grad = torch.zeros(student.shape, dtype=z_s.dtype, device=z_s.device)
    index = torch.arange(z_s.shape[-1], device=z_s.device)
    grad[..., : z_s.shape[-1]] = z_s.softmax(-1) - (index == labels.unsqueeze(-1)).to(z_s.dtype)
    return grad


class KlSums(NamedTuple):
    """Of every row, for both KL divergences: the value, the mass that it weighs logarithms with, τ·∂D/∂zˢ at the peak.

    `kept` is Σ p over the finite entries, `lost` is Σ q over the others; peak and normalisers as in `TokenSums`.
    """

    forward: Tensor
    kept: Tensor
    reverse: Tensor
    lost: Tensor
    normalizers: Normalizers
    peak: Tensor
    forward_grad: Tensor
    reverse_grad: Tensor


def kl_sums(student: Tensor, teacher: Tensor, temperature: Tensor | float) -> KlSums:
    """`KlSums` of every row. A row that is empty on a side has kept nothing, and lost the other side's mass."""
    z_s, z_t, tau = _prepare(student, teacher, temperature)
    (log_q, of_student), (log_p, of_teacher) = _log_softmax(z_s, tau), _log_softmax(z_t, tau)
    masses = _Masses(log_p, log_q)
    kept, lost = masses.only_finite(masses.p).sum(-1), masses.only_others(masses.q)
    each = [get_divergence(name) for name in ("forward_kl", "reverse_kl")]
    forward, reverse = (_total(masses, div) for div in each)
    of_forward, of_reverse = (_gradient(masses, div) for div in each)
    return KlSums(
        forward, kept, reverse, lost, Normalizers(*of_student, *of_teacher), of_forward.peak,
        of_forward.peak_grad, of_reverse.peak_grad,
    )  # fmt: skip


def token_terms(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    normalizers: Normalizers,
    constant: Tensor,
    peak: Tensor,
    divergence: str | Divergence,
) -> tuple[Tensor, Tensor]:
    """Σ f and Σ (g + c·q) over a part of every row, without its entry at `peak` where this is not −1.

    The normalisers are those of the whole row, and c is the row's `constant`. An entry that is not finite adds
    (c − 1)·q to the second sum where g leaves out a term q, else c·q. A row that is empty as a whole gives 0.
    """
    z_s, z_t, tau = _prepare(student, teacher, temperature)
    if not z_s.shape[-1]:
        return torch.zeros_like(tau), torch.zeros_like(tau)
    div = get_divergence(divergence)
    masses = _masses_below(z_s, z_t, normalizers, tau)
    c, q = constant.unsqueeze(-1), masses.q
    f, g = (masses.entries(table, div) for table in (SUMMANDS, GRADIENTS))
    g = g + c * q
    if masses.others is not None:
        g = torch.where(masses.others, (c - float(div.name in _G_WITHOUT_Q)) * q, g)
    at, nowhere = peak.clamp_min(0).unsqueeze(-1), (peak < 0).unsqueeze(-1)
    empty = (normalizers.sum_s == 0) | (normalizers.sum_t == 0)
    f, g = (x.scatter(-1, at, x.gather(-1, at).where(nowhere, 0.0)).sum(-1).masked_fill(empty, 0.0) for x in (f, g))
    return f, g


def _masses_below(z_s: Tensor, z_t: Tensor, of: Normalizers, tau: Tensor) -> _Masses:
    """The masses of rows whose normalisers are given."""
    return _Masses(_log_mass(z_t, Normalizer(*of[2:]), tau), _log_mass(z_s, Normalizer(*of[:2]), tau))


def rebuilt_gradient(call: GradientCall, masses: _Masses | None = None) -> Tensor:
    """Equation (10) of every row from what its forward left, in the student's shape and the accumulation type.

    `call` has rows (N, V) in the place of (B, L, V). p and q are rebuilt from the normalisers that are given, which
    need not be those of the logits that are here: the rows may be a part of the vocabulary. Or `masses` has them.
    """
    z_s, z_t, tau = _prepare(call.student, call.teacher, call.temperature)
    weight = call.weight.to(z_s.dtype).unsqueeze(-1)
    weightless = weight == 0
    if bool(weightless.all()):
        entries = torch.zeros_like(z_s)
    else:
        if masses is None:
            masses = _masses_below(z_s, z_t, Normalizers.of(call.normalizers_tau.to(z_s.dtype)), tau)
        div = with_parameters(call.divergence, call.alpha, call.beta)
        entries = masses.only_finite(masses.entries(GRADIENTS, div) - masses.q * call.sum_g.unsqueeze(-1))
        at, peak_grad = call.peak.clamp_min(0).unsqueeze(-1), call.peak_grad.unsqueeze(-1)
        entries.scatter_(-1, at, torch.where(call.peak.unsqueeze(-1) >= 0, peak_grad, entries.gather(-1, at)))
        entries *= weight / tau.unsqueeze(-1)
        if bool(weightless.any()):  # these rows have no normalisers, and what stands in their place may give NaN
            entries.masked_fill_(weightless, 0.0)
    if call.labels is not None and call.ce_weight is not None and call.normalizers_1 is not None:
        of_1 = Normalizer(*call.normalizers_1.to(z_s.dtype)[:2])
        ce_weight, label = call.ce_weight.to(z_s.dtype).unsqueeze(-1), call.labels.unsqueeze(-1)
        of_ce = _log_mass(z_s, of_1, torch.ones_like(tau)).exp_()
        inside = (label >= 0) & (label < z_s.shape[-1])
        of_ce.scatter_add_(-1, label.where(inside, 0), -inside.to(z_s.dtype))
        entries += (of_ce * ce_weight).masked_fill_(ce_weight == 0, 0.0)
    if entries.shape == call.student.shape:
        return entries
    grad = torch.zeros(call.student.shape, dtype=z_s.dtype, device=z_s.device)
    grad[..., : z_s.shape[-1]] = entries
    return grad


def squared_hellinger(student: Tensor, teacher: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """(2): s² = ½ Σ(√p − √q)². An empty row gives 0."""
    return token_stats(student, teacher, temperature)[0]


def difficulty(student: Tensor, teacher: Tensor, labels: Tensor, measure: str = "hellinger") -> Tensor:
    """Difficulty of every token at temperature 1: (2), or another measure by its name."""
    if measure == "hellinger":
        return squared_hellinger(student, teacher)
    if measure == "cross_entropy":
        return cross_entropy(student, teacher, labels)
    return token_divergence(student, teacher, 1.0, measure)


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """−log qᵥ at the label, over the common vocabulary; 0 where the label lies outside it (an ignored token)."""
    z_s, _ = common_vocabulary(student, teacher)
    valid = (labels >= 0) & (labels < z_s.shape[-1])
    index = labels.where(valid, 0).unsqueeze(-1)
    return -_log_softmax(z_s, torch.ones_like(z_s[..., 0]))[0].gather(-1, index).squeeze(-1).where(valid, 0.0)


def adakd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    divergence: str | Divergence = "reverse_kl",
    focus_ratio: float = 1.0,
    temperature_scale: float = 0.5,
    base_temperature: float = 1.0,
    measure: str = "hellinger",
    ce_weight: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """(1)-(7) written plainly: index the valid tokens, take the k hardest, differentiate by autograd.

    Takes (N, V), (N, V') and (N,) tensors. Its boolean indexing waits for the device; the package's loss does not.
    """
    z_s, z_t = common_vocabulary(student, teacher)
    valid = (labels != ignore_index) & ~(z_s == -math.inf).all(-1) & ~(z_t == -math.inf).all(-1)
    if not valid.any():
        return z_s[valid].sum()  # a sum over nothing: 0 with gradient 0, even if a logit is −inf
    z_s, z_t, labels = z_s[valid], z_t[valid], labels[valid]
    of_token = difficulty(z_s.detach(), z_t, labels, measure)
    k = max(1, math.floor(focus_ratio * len(of_token)))  # (3)
    selected = of_token.sort(descending=True, stable=True).indices[:k]
    s2 = of_token[selected]
    m2 = s2.sort().values[(k - 1) // 2]  # (4)
    relative = torch.where(s2 + m2 > 0, (s2 - m2) / (s2 + m2), 0.0)  # (5)
    tau = base_temperature * torch.exp(-temperature_scale * relative)  # (6)
    loss = (tau**2 * token_divergence(z_s[selected], z_t[selected], tau, divergence)).sum() / k  # (7)
    if ce_weight:
        loss = (1 - ce_weight) * loss + ce_weight * cross_entropy(z_s, z_t, labels).mean()
    return loss


class FocusState(NamedTuple):
    """The state of LATF between two optimizer steps, as Python numbers."""

    ratio: float = 1.0
    ema: float = 0.0
    reference: float = 0.0
    steps: int = 0


def focus_step(
    state: FocusState,
    loss: float,
    warmup_steps: int,
    beta: float = 0.99,
    epsilon: float = 0.05,
    delta: float = 0.05,
    min_ratio: float = 0.1,
) -> FocusState:
    """(8) and (9) for one optimizer step."""
    steps = state.steps + 1
    ema = loss if state.steps == 0 else beta * state.ema + (1 - beta) * loss
    ratio, reference = state.ratio, state.reference
    if steps == warmup_steps:
        reference = ema
    elif steps > warmup_steps:
        if ema < reference * (1 - epsilon):
            ratio = max(min_ratio, ratio * (1 - delta))
        elif ema > reference * (1 + epsilon):
            ratio = min(1.0, ratio * (1 + delta))
        if ratio != state.ratio:
            reference = ema
    return FocusState(ratio, ema, reference, steps)
