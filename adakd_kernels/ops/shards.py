"""Rows that are split over the vocabulary: what each shard tells the others, and the whole row's numbers from it.

A shard is the columns that one rank holds. The operators compute its numbers as if it were the row; they are gathered
(one message for statistics, one or two for a divergence), and every rank merges the same numbers in the same order, so
that results are equal bit for bit on all of them. Nothing of the vocabulary's size is sent, and the backward sends
nothing. docs/maths.md, section 9, derives the equations.

Per-token tensors are (B, L), those of all shards (ranks, B, L). What is merged is in fp64 where the device has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import reference
from ..adaptive import exact_dtype
from ..divergences import DIVERGENCES, Divergence
from ..reference import GRADIENTS, SUMMANDS, Normalizers
from .token_divergence import Sums, token_divergence
from .token_kl import token_kl
from .token_stats import TokenStatistics, token_stats
from .token_terms import token_terms

HEAVY = 1.0 / 16.0
"""Mass of a peak from which on (10) could cancel there, so that the peak's gradient is computed apart."""


class Shards(Protocol):
    """How a rank reaches the other shards of its rows."""

    @property
    def rank(self) -> int:
        """Which shard is this rank's."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of common entries of the whole vocabulary."""
        ...

    def local(self, labels: Tensor) -> Tensor:
        """Labels as indices of this rank's columns; those of other ranks are outside of them."""
        ...

    def gather(self, numbers: Tensor) -> Tensor:
        """(k, B, L) numbers of this rank -> (ranks, k, B, L) of all ranks."""
        ...


class RowMasses(NamedTuple):
    """How the mass of a row lies on its shards."""

    max: Tensor  # (B, L) the row's normaliser
    sum: Tensor  # (B, L)
    exists: Tensor  # (ranks, B, L) bool: the shard has a finite entry
    log: Tensor  # (ranks, B, L) log of the shard's share of the mass, 0 for one without any
    share: Tensor  # (ranks, B, L)


def row_masses(maxima: Tensor, sums: Tensor, temperature: Tensor) -> RowMasses:
    """From the normalisers of all shards, (ranks, B, L) each, at temperature τ (B, L)."""
    top, none = maxima.amax(0), sums == 0
    distance = ((maxima - top) / temperature).clamp_min(0.5 * torch.finfo(sums.dtype).min)
    log = distance.masked_fill(none, 0.0) + sums.masked_fill(none, 1.0).log()
    total = log.exp().masked_fill(none, 0.0).sum(0)
    log = (log - total.masked_fill(total == 0, 1.0).log()).masked_fill(none, 0.0)
    return RowMasses(top, total, ~none, log, log.exp().masked_fill(none, 0.0))


def normalizers_of(student: RowMasses, teacher: RowMasses, dtype: torch.dtype) -> Tensor:
    """(4, B, L) `Normalizers` of the rows."""
    return torch.stack([student.max, student.sum, teacher.max, teacher.sum]).to(dtype)


class RowSums(NamedTuple):
    """D and Σg of a row, and τ·∂D/∂zˢ at this rank's own peak."""

    d: Tensor
    sum_g: Tensor
    peak_grad: Tensor


class Peak(NamedTuple):
    """This rank's own peak."""

    rank: int
    q: Tensor  # (B, L) its mass in the row, of the student
    p: Tensor  # of the teacher
    gap: Tensor  # log(q/p)
    shard_grad: Tensor  # τ·∂D/∂zˢ there as if the shard were the row

    def others(self, values: Tensor) -> Tensor:
        """The sum of (ranks, B, L) values over all shards but this rank's."""
        return values.masked_fill(_ranks(values) == self.rank, 0.0).sum(0)


def row_statistics(
    shards: Shards, student: Tensor, teacher: Tensor, mask: Tensor, labels: Tensor, measure: str
) -> TokenStatistics:
    """The statistics of whole rows: one message, for the difficulty 'jensen_shannon' two more.

    `labels` (B, L) are indices of the whole vocabulary. The difficulty is one of `DIFFICULTIES`.
    """
    sent = "hellinger" if measure == "jensen_shannon" else measure
    gathered = shards.gather(shard_statistics(shards, student, teacher, mask, labels, sent))
    found = merge_statistics(shards, gathered, mask, labels, sent)
    if measure == sent:
        return found
    ones, div = torch.ones_like(found.difficulty), DIVERGENCES[measure]()
    difficulty, *_ = shard_divergence(shards, student, teacher, ones, found.valid, div, found.maxima)
    return found._replace(difficulty=difficulty)


def shard_statistics(
    shards: Shards, student: Tensor, teacher: Tensor, mask: Tensor, labels: Tensor, measure: str
) -> Tensor:
    """What this rank sends in message 1, (k, B, L): normalisers, the label's logit, and its part of the difficulty.

    A label that is not in the shard has the logit −inf.
    """
    labels = shards.local(labels)
    vocab = min(student.shape[-1], teacher.shape[-1])
    dtype = reference.accumulation_dtype(student, teacher)
    if measure in ("hellinger", "cross_entropy"):
        distance, normalizers = _token_stats(student, teacher, mask)
        parts = [distance]
    else:
        ones = torch.ones(mask.shape, dtype=dtype, device=mask.device)
        of_shard = _one_sweep_of(measure, student, teacher, ones, mask)
        normalizers, parts = of_shard.normalizers, [*of_shard.numbers[0]]
    inside = (labels >= 0) & (labels < vocab)
    logit = torch.full(mask.shape, -math.inf, dtype=dtype, device=mask.device)
    if vocab:
        logit = student.gather(-1, labels.where(inside, 0).unsqueeze(-1)).squeeze(-1).to(dtype).where(inside, logit)
    return torch.stack([*normalizers, logit, *parts])


def merge_statistics(shards: Shards, gathered: Tensor, mask: Tensor, labels: Tensor, measure: str) -> TokenStatistics:
    """The statistics of whole rows from message 1, (ranks, k, B, L)."""
    dtype, exact = gathered.dtype, gathered.to(exact_dtype(gathered.device))
    max_s, sum_s, max_t, sum_t, logits, *parts = exact.unbind(1)
    ones = torch.ones_like(max_s[0])
    student, teacher = row_masses(max_s, sum_s, ones), row_masses(max_t, sum_t, ones)
    valid = mask & (student.sum != 0) & (teacher.sum != 0)
    inside = (labels >= 0) & (labels < shards.vocab_size)
    cross_entropy = (student.max - logits.amax(0) + student.sum.log()).where(inside, math.nan).where(valid, 0.0)
    if measure == "cross_entropy":
        difficulty = cross_entropy
    elif measure == "hellinger":
        difficulty = hellinger_distance(student, teacher, parts[0])
    else:
        zero = torch.zeros_like(student.sum)
        difficulty = MERGES[measure](student, teacher, parts[0], parts[1], Peak(0, zero, zero, zero, zero)).d
    return TokenStatistics(
        difficulty.where(valid, 0.0).to(dtype),
        valid,
        normalizers_of(student, teacher, dtype),
        cross_entropy.to(dtype),
        torch.stack((max_s, max_t)).to(dtype),
    )


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the accumulation type, cut off at its range; NaN stays."""
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def hellinger_distance(student: RowMasses, teacher: RowMasses, distances: Tensor) -> Tensor:
    """s² of a row from those of its shards: Σ [½(√Q − √P)² + √(QP)·s²], in which every term is ≥ 0."""
    root_q, root_p = student.share.sqrt(), teacher.share.sqrt()
    distance = (0.5 * (root_q - root_p).square() + root_q * root_p * distances).sum(0)
    distance = torch.where(distance > 1.0, 1.0, distance)  # by comparison: a minimum would lose NaN
    return distance.where((student.sum != 0) & (teacher.sum != 0), 0.0)


def merge_hellinger(student: RowMasses, teacher: RowMasses, d: Tensor, sum_g: Tensor, peak: Peak) -> RowSums:
    """`RowSums` of the Hellinger distance, from D and Σg of the shards; its c of the peak is ½√(p/q)."""
    roots = (student.share * teacher.share).sqrt()
    total_g = (roots * sum_g).where(student.exists & teacher.exists, 0.0)
    others = peak.others(peak.q * total_g + 0.5 * (peak.p * peak.q).sqrt() * student.share)
    own = roots[peak.rank] * student.share[peak.rank]
    return RowSums(hellinger_distance(student, teacher, d), total_g.sum(0), own * peak.shard_grad - others)


def merge_forward_kl(student: RowMasses, teacher: RowMasses, d: Tensor, kept: Tensor, peak: Peak) -> RowSums:
    """`RowSums` of KL(p‖q), by the chain rule, from D and Σ p of the shards' finite entries; c of the peak is p/q."""
    both, ratio = _log_ratio(student, teacher)
    kept = kept.where(both, 0.0)
    total = teacher.share * (d.where(both, 0.0) - kept * ratio)
    others = peak.others(peak.p * student.share - peak.q * teacher.share * kept)
    own = student.share[peak.rank] * teacher.share[peak.rank]
    return RowSums(total.sum(0), -(teacher.share * kept).sum(0), own * peak.shard_grad - others)


def merge_reverse_kl(student: RowMasses, teacher: RowMasses, d: Tensor, lost: Tensor, peak: Peak) -> RowSums:
    """`RowSums` of KL(q‖p), by the chain rule, from D and Σ q of the shards' other entries; c is −log(q/p)."""
    both, ratio = _log_ratio(student, teacher)
    lost = lost.where(both, 1.0)
    total = d.where(both, 0.0) + (1.0 - lost) * ratio
    others = peak.others(student.share * (total - peak.gap - lost))
    own = student.share[peak.rank]
    peak_grad = own * own * peak.shard_grad + peak.q * (own * ratio[peak.rank] * lost[peak.rank] - others)
    return RowSums((student.share * total).sum(0), (student.share * (total - lost)).sum(0), peak_grad)


def _log_ratio(student: RowMasses, teacher: RowMasses) -> tuple[Tensor, Tensor]:
    """Of every shard: whether it has mass of both sides, and the logarithm of its ratio, by which log(q/p) moves."""
    both = student.exists & teacher.exists
    return both, (student.log - teacher.log).where(both, 0.0)


MERGES: dict[str, Callable[[RowMasses, RowMasses, Tensor, Tensor, Peak], RowSums]] = {
    "forward_kl": merge_forward_kl,
    "reverse_kl": merge_reverse_kl,
    "hellinger": merge_hellinger,
}
"""What makes `RowSums` of two numbers of the shards, (ranks, B, L) each, for the divergences of one sweep."""
PARTS = {"jeffreys": ("forward_kl", "reverse_kl")}
"""The divergences that are sums of others."""


class OneSweep(NamedTuple):
    """What one sweep finds of a shard, for a divergence or for each of its parts."""

    numbers: list[tuple[Tensor, Tensor]]  # what `MERGES` takes
    normalizers: Tensor  # (4, B, L)
    place: Tensor  # (B, L) int64 the student's peak or −1
    grads: list[Tensor]  # τ·∂D/∂zˢ there


def shard_divergence(
    shards: Shards, student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: Divergence,
    maxima: Tensor | None = None,
) -> Sums:  # fmt: skip
    """What `token_divergence` returns, of the whole rows; `peak` is −1 but on the rank that has a heavy one.

    `maxima` (2, ranks, B, L) are those of message 1, if there was one; else they are in this message.
    """
    dtype = reference.accumulation_dtype(student, teacher)
    merge = _two_sweeps if divergence.sweeps == 2 else _one_sweep
    return merge(shards, student, teacher, temperature.to(dtype), mask, divergence, maxima)


def _one_sweep(
    shards: Shards, student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: Divergence,
    maxima: Tensor | None,
) -> Sums:  # fmt: skip
    found = _one_sweep_of(divergence.name, student, teacher, temperature, mask)
    sent = [x for two in found.numbers for x in two]
    masses, gathered = _exchange(shards, found.normalizers, sent, temperature, maxima)
    peak = _own_peak(shards, student, teacher, temperature, found.normalizers, found.place, masses)
    merged = [
        MERGES[name](*masses, gathered[2 * i], gathered[2 * i + 1], peak._replace(shard_grad=grad.to(peak.q.dtype)))
        for i, (name, grad) in enumerate(zip(_parts(divergence.name), found.grads, strict=True))
    ]
    total = RowSums(*(torch.stack(parts).sum(0) for parts in zip(*merged, strict=True)))
    place = found.place.where(peak.q >= HEAVY, -1)
    return _results(total, masses, place, mask, temperature.dtype)


def _two_sweeps(
    shards: Shards, student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, divergence: Divergence,
    maxima: Tensor | None,
) -> Sums:  # fmt: skip
    dtype = temperature.dtype
    # Any divergence of one sweep finds the normalisers and the peak.
    _, normalizers, place, _ = _one_sweep_of("forward_kl", student, teacher, temperature, mask)
    logits = [_logit(x, place).to(dtype).where(place >= 0, -math.inf) for x in (student, teacher)]
    masses, (peaks_s, peaks_t) = _exchange(shards, normalizers, logits, temperature, maxima)
    of_rows = normalizers_of(*masses, dtype)
    # The peak of the row, and c of it, from the numbers that the second sweep will have.
    owner = torch.where(peaks_s == peaks_s.amax(0), _ranks(peaks_s), len(peaks_s)).amin(0)
    at = owner.clamp_max(len(peaks_s) - 1).unsqueeze(0)
    z_s, z_t = (peaks.gather(0, at).squeeze(0) for peaks in (peaks_s, peaks_t))
    tau, of = temperature.to(z_s.dtype), Normalizers.of(of_rows.to(z_s.dtype))
    log_q = (z_s - of.max_s) / tau - of.sum_s.log()
    heavy = (log_q >= math.log(HEAVY)) & (z_t != -math.inf)
    log_q = log_q.where(heavy, 0.0)
    log_p = ((z_t - of.max_t) / tau - of.sum_t.log()).where(heavy, 0.0)
    if any(divergence.parameters):
        # By the operator, whose roundings of the parameters are then the same in g of the peak and of other entries.
        one, other = (z.where(heavy, 0.0).to(dtype).unsqueeze(-1) for z in (z_s, z_t))
        zero, nowhere = torch.zeros_like(temperature), torch.full_like(place, -1)
        _, g = _token_terms(one, other, temperature, mask & heavy, of_rows, zero, nowhere, divergence)
    else:
        g = _peak_terms(GRADIENTS, divergence, log_q, log_p)
    c = saturated((g.to(log_q.dtype) / -log_q.exp()).where(heavy, 0.0), dtype)
    mine = heavy & (owner == shards.rank)
    place = place.where(mine, -1)
    f, rest = _token_terms(student, teacher, temperature, mask, of_rows, c, place, divergence)
    f = saturated(f.to(log_q.dtype) + _peak_terms(SUMMANDS, divergence, log_q, log_p).where(mine, 0.0), dtype)
    d, rest = shards.gather(torch.stack((f, rest))).to(z_s.dtype).unbind(1)
    rest = rest.sum(0)
    total = RowSums(d.sum(0), rest - c.to(rest.dtype), (-log_q.exp() * rest).where(mine, 0.0))
    return _results(total, masses, place, mask, dtype)


def _exchange(
    shards: Shards, normalizers: Tensor, numbers: list[Tensor], temperature: Tensor, maxima: Tensor | None
) -> tuple[tuple[RowMasses, RowMasses], list[Tensor]]:
    """Send normalisers and numbers (B, L) of this shard; the masses of both sides, and the numbers of all shards."""
    of = Normalizers.of(normalizers)
    sent = [of.sum_s, of.sum_t, *numbers] + ([of.max_s, of.max_t] if maxima is None else [])
    gathered = shards.gather(torch.stack(sent)).to(exact_dtype(temperature.device))
    sum_s, sum_t, *received = gathered.unbind(1)
    if maxima is None:
        *received, max_s, max_t = received
    else:
        max_s, max_t = maxima.to(gathered.dtype)
    tau = temperature.to(gathered.dtype)
    return (row_masses(max_s, sum_s, tau), row_masses(max_t, sum_t, tau)), received


def _own_peak(
    shards: Shards, student: Tensor, teacher: Tensor, temperature: Tensor, normalizers: Tensor, place: Tensor,
    masses: tuple[RowMasses, RowMasses],
) -> Peak:  # fmt: skip
    """The entry at `place` of this shard."""
    rank = shards.rank
    logs = []
    for logits, of, row in zip((student, teacher), (normalizers[:2], normalizers[2:]), masses, strict=True):
        z, z_max, z_sum, tau = (x.to(row.log.dtype) for x in (_logit(logits, place), *of, temperature))
        logs.append((z - z_max) / tau - z_sum.log() + row.log[rank])
    log_q, log_p = logs
    return Peak(rank, log_q.exp(), log_p.exp(), log_q - log_p, torch.zeros_like(log_q))


def _results(
    total: RowSums, masses: tuple[RowMasses, RowMasses], place: Tensor, mask: Tensor, dtype: torch.dtype
) -> Sums:
    """What `token_divergence` returns, from the sums of the rows; 0 for tokens outside the mask and for empty rows."""
    of_s, of_t = masses
    some = mask & (of_s.sum != 0) & (of_t.sum != 0)
    d, sum_g, peak_grad = (saturated(x.where(some, 0.0), dtype) for x in total)
    return d, sum_g, normalizers_of(of_s, of_t, dtype), place.where(some, -1), peak_grad


def _ranks(values: Tensor) -> Tensor:
    """The index of every shard, as (ranks, 1, 1)."""
    return torch.arange(len(values), device=values.device).view(-1, 1, 1)


def _logit(logits: Tensor, place: Tensor) -> Tensor:
    """(B, L) logits at an entry of the shard, of any entry where there is none."""
    if not logits.shape[-1]:
        return logits.new_zeros(place.shape)
    return logits.gather(-1, place.clamp_min(0).unsqueeze(-1)).squeeze(-1)


def _peak_terms(table: dict[str, reference.Summand], divergence: Divergence, log_q: Tensor, log_p: Tensor) -> Tensor:
    """f or g of one entry of every row."""
    terms: Tensor = table[divergence.name](log_p.exp(), log_q.exp(), log_p, log_q, *divergence.parameters)
    return terms


# The operators, which are not called for a shard without a column.


def _token_stats(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape[-1] and teacher.shape[-1]:
        found: tuple[Tensor, Tensor] = token_stats(student, teacher, mask)
        return found
    normalizers, (nothing, *_) = _nothing(student, teacher, mask)
    return nothing, normalizers


def _one_sweep_of(name: str, student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor) -> OneSweep:
    if not (student.shape[-1] and teacher.shape[-1]):
        normalizers, (nothing, _, _) = _nothing(student, teacher, mask)
        nowhere, parts = torch.full(mask.shape, -1, device=mask.device), _parts(name)
        return OneSweep([(nothing, nothing) for _ in parts], normalizers, nowhere, [nothing for _ in parts])
    if name == "hellinger":
        d, sum_g, normalizers, place, grad = token_divergence(student, teacher, temperature, mask, name, 0.0, 0.0)
        return OneSweep([(d, sum_g)], normalizers, place, [grad])
    forward, kept, reverse, lost, normalizers, place, *grads = token_kl(student, teacher, temperature, mask)
    of = {"forward_kl": ((forward, kept), grads[0]), "reverse_kl": ((reverse, lost), grads[1])}
    numbers, of_peak = zip(*(of[part] for part in _parts(name)), strict=True)
    return OneSweep(list(numbers), normalizers, place, list(of_peak))


def _parts(name: str) -> tuple[str, ...]:
    return PARTS.get(name, (name,))


def _token_terms(
    student: Tensor, teacher: Tensor, temperature: Tensor, mask: Tensor, normalizers: Tensor, constant: Tensor,
    peak: Tensor, divergence: Divergence,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if student.shape[-1] and teacher.shape[-1]:
        name, parameters = divergence.name, divergence.parameters
        terms: tuple[Tensor, Tensor] = token_terms(
            student, teacher, temperature, mask, normalizers, constant, peak, name, *parameters
        )
        return terms
    return _nothing(student, teacher, mask)[1][:2]


def _nothing(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Normalisers of empty rows, and zeros, for tokens without an entry."""
    dtype = reference.accumulation_dtype(student, teacher)
    normalizers = torch.zeros(4, *mask.shape, dtype=dtype, device=mask.device)
    normalizers[::2] = -math.inf
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return normalizers, (zeros, zeros.clone(), zeros.clone())
