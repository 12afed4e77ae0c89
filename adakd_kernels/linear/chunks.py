"""Divergence and gradient of every token from the logits of one chunk of tokens at a time, in one phase or in two.

The temperatures depend on all difficulties, so in general a token passes twice: phase 1 computes its logits and keeps a
few numbers; phase 2 computes the logits of the selected tokens again, their divergence, and their gradient, which it
writes over the logits and folds into the gradients of the head. Where every valid token is selected at one temperature,
no token waits for the others, and one phase does both; so it does where selection and temperatures are given.

Per-token tensors are (1, n) over the n labelled tokens, the (B, L) of the ops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from ..adaptive import descending, power_of_two
from ..divergences import Divergence, ReverseKL
from ..functional import TokenChoice, choose_tokens, token_statistics
from ..vocab_parallel import VocabParallel
from .heads import Head, spans

CHUNK_BYTES = {"cpu": 112 * 2**20}
"""Bytes for the logits of one chunk, by device type; 1 GiB for others."""
TEACHER_PART = 2
"""The teacher's buffer has half as many rows as the student's: long student chunks make dW += dZᵀH cheaper. Where the
vocabulary is split it has as many, since each part of a chunk would take messages of its own."""


class Tokens(NamedTuple):
    """The labelled tokens."""

    positions: Tensor  # (n,) in the flattened batch
    labels: Tensor  # (1, n)


class Objective(NamedTuple):
    """The options of the loss, as `adakd_loss` takes them."""

    divergence: Divergence = ReverseKL()
    difficulty: str = "hellinger"
    focus_ratio: float | Tensor = 1.0
    temperature_scale: float = 0.5
    base_temperature: float = 1.0
    ce_weight: float = 0.0
    num_items: float | Tensor | None = None
    entropy: bool = False

    @property
    def selects_all_at_one_temperature(self) -> bool:
        """Whether no token has to wait for the others.

        Only for Python numbers: reading a tensor's value would synchronise with the device again.
        """
        ratio, scale = self.focus_ratio, self.temperature_scale
        return not isinstance(ratio, Tensor) and not isinstance(scale, Tensor) and ratio == 1.0 and scale == 0.0


class Statistics(NamedTuple):
    """What phase 1 keeps of the tokens: `TokenStatistics`, with cross-entropy and entropy if they are asked for."""

    difficulty: Tensor
    valid: Tensor
    normalizers_1: Tensor  # (4, 1, n), the others (1, n)
    cross_entropy: Tensor | None
    entropy: Tensor | None
    maxima: Tensor | None = None  # (2, ranks, 1, n) of all shards, where the vocabulary is split


class Measured(NamedTuple):
    """What a divergence and its gradient read of the statistics: of the cross-entropy, if the loss has one."""

    normalizers_1: Tensor | None = None
    maxima: Tensor | None = None  # where the vocabulary is split


class Weighted(NamedTuple):
    """How the tokens enter the gradient: temperature, selected, and the weights of divergence and cross-entropy."""

    temperature: Tensor
    selected: Tensor
    weight: Tensor
    ce_weight: Tensor | None


class Pair(NamedTuple):
    """Logits of some tokens."""

    raw: Tensor  # (rows, V) raw logits of the student, which its gradient replaces
    student: Tensor  # (1, rows, V); the memory of `raw` where the student has no soft-cap
    teacher: Tensor  # (1, rows, V)


class TokenResults(NamedTuple):
    """What the phases leave of the labelled tokens. The gradients are in the student's head."""

    choice: TokenChoice
    cross_entropy: Tensor | None
    divergence: Tensor  # 0 for tokens that are not selected
    gradient_scale: Tensor  # 0-d; gradients of the loss are this times those of the head
    entropy: Tensor | None


def rows_of(values: Any, part: Tensor | slice) -> Any:
    """Statistics or weights, of the tokens at `part` of the n labelled ones."""
    return type(values)(*(None if x is None else x[..., part] for x in values))


class Chunks:
    """The labelled tokens, and buffers for the logits of one chunk of them that every chunk uses again.

    A chunk is as many tokens as the student's buffer has rows, a part of it as many as the teacher's has.

    Args:
        student, teacher: the heads.
        tokens: the labelled tokens.
        objective: the loss.
        chunk_tokens: rows of a chunk; None for what fits in `CHUNK_BYTES`.
        kept: number of tokens whose logits have a place of their own (`KeptLogits`).
        shards: where the heads are this rank's columns of the vocabulary. All ranks have to have chunks alike, since
            they exchange numbers of each: their size follows from shards of one size.
    """

    def __init__(
        self, student: Head, teacher: Head, tokens: Tokens, objective: Objective, chunk_tokens: int | None,
        kept: int = 0, shards: VocabParallel | None = None,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.tokens, self.objective = student, teacher, tokens, objective
        self.shards = shards
        self.common = None if shards is None else shards.common(student.vocab, teacher.vocab, "weight")
        self.n = tokens.positions.numel()
        capped = student.softcap is not None
        bytes_s, bytes_t = row_bytes(student, teacher, shards)
        part_bytes = bytes_t + (bytes_s if capped else 0)
        budget = CHUNK_BYTES.get(tokens.positions.device.type, 2**30)
        parts = TEACHER_PART if shards is None else 1
        self.chunk = chunk_tokens or _chunk_rule(budget, bytes_s + part_bytes / parts)
        self.part = -(-self.chunk // parts)  # rounded up
        self.raw_s = student.empty_rows(min(self.chunk, self.n - kept))
        self.z_t = teacher.empty_rows(min(self.part, self.n - kept))
        # The chain rule of a soft-cap needs tanh(x/cap) beside the gradient over the logits.
        self.z_s = student.empty_rows(min(self.part, self.n) if capped else 0)
        self.dtype = reference.accumulation_dtype(self.raw_s, self.z_t)
        self.differentiates = student.differentiates

    def choose(self, statistics: Statistics) -> TokenChoice:
        """(3)-(6) over these tokens."""
        of = self.objective
        return choose_tokens(
            statistics.difficulty,
            statistics.valid,
            of.focus_ratio,
            of.temperature_scale,
            of.base_temperature,
            of.num_items,
        )

    def weighted(self, choice: TokenChoice, cross_entropy: Tensor | None) -> Weighted:
        """The weights of the tokens' gradients, scaled up by `power_of_two`."""
        weights = ops.loss_weights(
            None, power_of_two(choice.n), choice.temperature, choice.selected, choice.k,
            *(cross_entropy, choice.valid, choice.n), self.objective.ce_weight,
        )  # fmt: skip
        weight, *of_ce = weights.unbind()
        return Weighted(choice.temperature, choice.selected, weight, of_ce[0] if of_ce else None)

    def empty_statistics(self) -> Statistics:
        """Memory for the statistics of all labelled tokens."""
        ce = self.empty_values(self.dtype) if self.objective.ce_weight else None
        entropy = self.empty_values(self.dtype) if self.objective.entropy else None
        normalizers_1 = torch.empty(4, 1, self.n, dtype=self.dtype, device=self.tokens.positions.device)
        return Statistics(self.empty_values(self.dtype), self.empty_values(torch.bool), normalizers_1, ce, entropy)

    def empty_values(self, dtype: torch.dtype) -> Tensor:
        """Memory for a value of every labelled token."""
        return torch.empty(1, self.n, dtype=dtype, device=self.tokens.positions.device)

    def pair(self, raw: Tensor, teacher: Tensor) -> Pair:
        """The logits of some tokens from raw ones of the student and those of the teacher, both (rows, V)."""
        student = self.student.capped(raw, self.z_s[: len(raw)])
        return Pair(raw, student.unsqueeze(0), teacher[:, : self.common].unsqueeze(0))

    def parts(self, *, fold: bool = False) -> Iterator[tuple[slice, Pair]]:
        """Of each part in turn: which of the n tokens it has, and their logits.

        With `fold`, what the caller leaves in `raw`, the gradient over x, goes to the gradients of the student's head.
        """
        positions = self.tokens.positions
        for a, b in spans(0, self.n, self.chunk):
            raw = self.raw_s[: b - a]
            self.student.raw_logits(positions[a:b], raw, graph=fold)
            for i, j in spans(a, b, self.part):
                teacher = self.teacher_logits(positions[i:j], self.z_t[: j - i])
                yield slice(i, j), self.pair(raw[i - a : j - a], teacher)
            if fold:
                self.student.fold(positions[a:b], raw)

    def teacher_logits(self, index: Tensor, out: Tensor) -> Tensor:
        """The teacher's logits of the tokens at `index` of the batch, (rows, V), in `out`."""
        self.teacher.raw_logits(index, out)
        return self.teacher.capped(out, out)

    def measure(self, pair: Pair, part: slice, statistics: Statistics) -> Statistics:
        """Statistics of the tokens of a part, and a copy of them in those of all tokens."""
        labels = self.tokens.labels[:, part]
        if self.shards is not None:
            of_part = self.merged(self.shards, [self.shard_numbers(self.shards, pair, part)], labels)
            self._store(of_part, part, statistics)
            return of_part
        labelled = torch.ones_like(labels, dtype=torch.bool)
        measured = token_statistics(pair.student, pair.teacher, labelled, labels, self.objective.difficulty)
        ce = None
        if self.objective.ce_weight:
            ce = ops.token_cross_entropy(pair.student, pair.teacher, labels, measured.valid, measured.normalizers_1)
        entropy = token_entropy(pair.student, measured.valid) if self.objective.entropy else None
        of_part = Statistics(*measured[:3], ce, entropy)
        self._store(of_part, part, statistics)
        return of_part

    def _store(self, of_part: Statistics, part: slice, statistics: Statistics) -> None:
        """Copy the statistics of a part to those of all tokens."""
        for whole, values in zip(statistics, of_part, strict=True):
            if whole is not None and values is not None:
                whole[..., part] = values

    def shard_numbers(self, shards: VocabParallel, pair: Pair, part: slice) -> Tensor:
        """(k, 1, rows) what this rank tells the others of the tokens of a part."""
        labels, measure = self.tokens.labels[:, part], self.objective.difficulty
        labelled = torch.ones_like(labels, dtype=torch.bool)
        return ops.shard_statistics(shards, pair.student, pair.teacher, labelled, labels, measure)

    def merged(self, shards: VocabParallel, numbers: Sequence[Tensor], labels: Tensor) -> Statistics:
        """The statistics of the tokens with these labels, from `shard_numbers` of their parts: one message."""
        gathered, labelled = shards.gather(torch.cat(tuple(numbers), dim=-1)), torch.ones_like(labels, dtype=torch.bool)
        found = ops.merge_statistics(shards, gathered, labelled, labels, self.objective.difficulty)
        ce = found.cross_entropy if self.objective.ce_weight else None
        return Statistics(found.difficulty, found.valid, found.normalizers_1, ce, None, found.maxima)

    def local(self, labels: Tensor) -> Tensor:
        """Labels as indices of the columns that are here."""
        return labels if self.shards is None else self.shards.local(labels)

    def sums(self, pair: Pair, temperature: Tensor, mask: Tensor, maxima: Tensor | None = None) -> tuple[Tensor, ...]:
        """D of some tokens (1, rows), and what `gradient` needs of them."""
        of = self.objective.divergence
        if self.shards is not None:
            return ops.shard_divergence(self.shards, pair.student, pair.teacher, temperature, mask, of, maxima)
        sums: tuple[Tensor, ...] = ops.token_divergence(
            pair.student, pair.teacher, temperature, mask, of.name, *of.parameters
        )
        return sums

    def gradient(
        self, pair: Pair, temperature: Tensor, weight: Tensor, saved: Sequence[Tensor],
        ce_args: tuple[Tensor | None, ...] = (None, None, None),
    ) -> None:  # fmt: skip
        """Let the gradient over x of some tokens, of which D has this weight, replace `pair.raw`."""
        of = self.objective.divergence
        if not pair.teacher.shape[-1]:  # a shard without a common entry
            pair.raw.zero_()
            return
        ops.token_divergence_backward_(
            pair.student, pair.teacher, temperature, weight, *saved, *ce_args, of.name, *of.parameters
        )
        if self.student.softcap is not None:
            # `student` holds dL/dz now, `raw` tanh(x/cap): dL/dx = dL/dz·(1 − tanh²).
            torch.ops.aten.tanh_backward(pair.student[0], pair.raw, grad_input=pair.raw)

    def divergence(self, pair: Pair, labels: Tensor, statistics: Measured, weighted: Weighted) -> Tensor:
        """D of some tokens (1, rows). A gradient that is asked for (of the loss over x) replaces `pair.raw`."""
        d, *saved = self.sums(pair, weighted.temperature, weighted.selected, statistics.maxima)
        if not self.differentiates:
            return d
        ce_args: tuple[Tensor | None, ...] = (None, None, None)
        if weighted.ce_weight is not None:
            ce_args = (self.local(labels), weighted.ce_weight, statistics.normalizers_1)
        self.gradient(pair, weighted.temperature, weighted.weight, saved, ce_args)
        return d


def row_bytes(student: Head, teacher: Head, shards: VocabParallel | None) -> tuple[int, int]:
    """Bytes of the logits of one token, of both models; with `shards` those of an even share, equal on all ranks."""
    if shards is None:
        return student.row_bytes, teacher.row_bytes
    share = -(-shards.vocab_size // shards.ranks)
    return share * student.dtype.itemsize, share * teacher.dtype.itemsize


def _chunk_rule(budget: int, token_bytes: float) -> int:
    """Rows of the student's logits that fit in the budget: a multiple of 64, 64 at least."""
    rows = int(budget / token_bytes)
    return max(64, rows // 64 * 64)


class KeptLogits:
    """Logits that phase 2 need not compute again: those of the hardest tokens so far; where it takes all, of the first.

    Args:
        student, teacher: the heads.
        n: number of labelled tokens.
        needed: number of tokens that phase 2 takes.
        keep_bytes: memory for the logits.
        shards: as in `Chunks`. Which tokens are the hardest is then known after all of them only, so that nothing is
            kept where phase 2 does not take all.
    """

    def __init__(
        self, student: Head, teacher: Head, n: int, needed: int, keep_bytes: int, shards: VocabParallel | None = None
    ) -> None:
        keeps = not student.needs_graph and (shards is None or needed == n)
        self.rows = min(needed, keep_bytes // sum(row_bytes(student, teacher, shards))) if keeps else 0
        self.replaces = self.rows > 0 and needed < n
        # The last row takes what is not kept, so that the number of tokens that enter need not be read from the device.
        memory = self.rows + int(self.replaces)
        self.raw_s, self.z_t = student.empty_rows(memory), teacher.empty_rows(memory)
        self.tokens = torch.arange(memory, device=self.raw_s.device)  # which of the n tokens each row is of

    def replace(self, start: int, stop: int, pair: Pair, statistics: Statistics) -> None:
        """Let those of the tokens from `start` to `stop` that are among the hardest so far replace easier ones."""
        order = descending(statistics.difficulty[:, :stop], statistics.valid[:, :stop]).indices
        hardest = torch.zeros_like(order, dtype=torch.bool)
        hardest[order[: self.rows]] = True
        # Rows whose tokens are no longer among the hardest stand first; the tokens that enter take them in order.
        free = hardest[self.tokens[:-1]].to(torch.uint8).argsort(stable=True)
        enters = hardest[start:stop]
        row = free[(enters.cumsum(0) - 1).clamp(0, self.rows - 1)].where(enters, self.rows)
        self.raw_s.index_copy_(0, row, pair.raw)
        self.z_t.index_copy_(0, row, pair.teacher[0])
        self.tokens.index_copy_(0, row, torch.arange(start, stop, device=row.device))


def one_phase(chunks: Chunks, choice: TokenChoice | None = None) -> TokenResults:
    """Divergence and gradient of every token while its logits are there, and the statistics that are still unknown.

    Without a `choice` of these tokens, all of them are selected at one temperature. The weight of a token's gradient
    depends on the number of valid tokens, which is known only when the rows of all labelled tokens are. Until then all
    of them are taken for valid; `gradient_scale` corrects the gradients afterwards.
    """
    labels = chunks.tokens.labels
    statistics = chunks.empty_statistics()
    divergence = chunks.empty_values(chunks.dtype)
    assumed = choice
    if assumed is None:
        ones = torch.ones_like(labels, dtype=chunks.dtype)
        assumed = choose_tokens(ones, ones.bool(), 1.0, 0.0, 1.0, chunks.objective.num_items)
    for part, pair in chunks.parts(fold=chunks.differentiates):
        of_part = None
        if choice is None or chunks.objective.ce_weight:
            of_part = chunks.measure(pair, part, statistics)
        if choice is None and of_part is not None:
            own = chunks.choose(of_part)._replace(n=assumed.n, k=assumed.k)
        else:
            own = assumed.each(itemgetter((slice(None), part)))
        weighted = chunks.weighted(own, None if of_part is None else of_part.cross_entropy)
        read = Measured() if of_part is None else Measured(of_part.normalizers_1, of_part.maxima)
        divergence[:, part] = chunks.divergence(pair, labels[:, part], read, weighted)
    known = chunks.choose(statistics) if choice is None else choice
    gradient_scale = chunks.student.scale / power_of_two(assumed.n) * (assumed.k / known.k)
    return TokenResults(known, statistics.cross_entropy, divergence, gradient_scale, statistics.entropy)


def two_phases(chunks: Chunks, kept: KeptLogits, needed: int) -> TokenResults:
    """Statistics of every labelled token, selection over all of them, and then divergence and gradient.

    `needed` is the number of tokens that phase 2 takes: the hardest ones, or all.
    """
    statistics = phase_1(chunks, kept)
    choice = chunks.choose(statistics)
    divergence = _phase_2(chunks, kept, needed, statistics, chunks.weighted(choice, statistics.cross_entropy))
    gradient_scale = chunks.student.scale / power_of_two(choice.n)
    return TokenResults(choice, statistics.cross_entropy, divergence, gradient_scale, statistics.entropy)


def phase_1(chunks: Chunks, kept: KeptLogits) -> Statistics:
    """The statistics of every labelled token. The first logits go to where they are kept, while there is room."""
    positions, statistics = chunks.tokens.positions, chunks.empty_statistics()
    numbers: list[Tensor] = []  # of all parts, in the order of the tokens
    for a, b in spans(0, kept.rows, chunks.chunk) + spans(kept.rows, chunks.n, chunks.chunk):
        keeps = a < kept.rows
        raw = kept.raw_s[a:b] if keeps else chunks.raw_s[: b - a]
        chunks.student.raw_logits(positions[a:b], raw)
        for i, j in spans(a, b, chunks.part):
            out = kept.z_t[i:j] if keeps else chunks.z_t[: j - i]
            pair = chunks.pair(raw[i - a : j - a], chunks.teacher_logits(positions[i:j], out))
            if chunks.shards is not None:
                numbers.append(chunks.shard_numbers(chunks.shards, pair, slice(i, j)))
                continue
            chunks.measure(pair, slice(i, j), statistics)
            if kept.replaces and not keeps:
                kept.replace(i, j, pair, statistics)
    if chunks.shards is not None and numbers:
        return chunks.merged(chunks.shards, numbers, chunks.tokens.labels)
    return statistics


def _phase_2(chunks: Chunks, kept: KeptLogits, needed: int, statistics: Statistics, weighted: Weighted) -> Tensor:
    """D of the selected tokens, 0 elsewhere; the gradients of the student's head if any is asked for."""
    (positions, labels), student = chunks.tokens, chunks.student
    result = torch.zeros_like(statistics.difficulty)
    read = Measured(None if weighted.ce_weight is None else statistics.normalizers_1, statistics.maxima)
    for of, raw, kept_teacher in _chunks_of_phase_2(chunks, kept, needed, statistics):
        for i, j in spans(0, of.numel(), chunks.part):
            part = of[i:j]
            if kept_teacher is None:
                teacher = chunks.teacher_logits(positions[part], chunks.z_t[: j - i])
            else:
                teacher = kept_teacher[i:j]
            pair = chunks.pair(raw[i:j], teacher)
            d = chunks.divergence(pair, labels[:, part], rows_of(read, part), rows_of(weighted, part))
            result.index_copy_(1, part, d)
        if chunks.differentiates:
            student.fold(positions[of], raw)
    return result


def _chunks_of_phase_2(
    chunks: Chunks, kept: KeptLogits, needed: int, statistics: Statistics
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Of each chunk: which of the n tokens it has, the student's raw logits, and the teacher's if they are kept."""
    for a, b in spans(0, kept.rows, chunks.chunk):
        yield kept.tokens[a:b], kept.raw_s[a:b], kept.z_t[a:b]
    if needed < chunks.n:
        # The kept tokens are the first ones of this order.
        rest = descending(statistics.difficulty, statistics.valid).indices[kept.rows : needed]
    else:
        rest = torch.arange(kept.rows, chunks.n, device=statistics.difficulty.device)
    for a, b in spans(0, rest.numel(), chunks.chunk):
        of, raw = rest[a:b], chunks.raw_s[: b - a]
        chunks.student.raw_logits(chunks.tokens.positions[of], raw, graph=chunks.differentiates)
        yield of, raw, None


def token_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """H(q) in nats of tokens (1, rows) from their logits (1, rows, V), 0 outside the mask.

    H(q) = log V - KL(q‖u) with the uniform u, so the kernels of the reverse KL give it, without a tensor of the size of
    the logits.
    """
    vocab = logits.shape[-1]
    uniform = logits.new_zeros(1, 1, vocab).expand_as(logits)
    ones = torch.ones(mask.shape, dtype=reference.accumulation_dtype(logits), device=mask.device)
    divergence: Tensor
    divergence, *_ = ops.token_divergence(logits, uniform, ones, mask, ReverseKL.name, *ReverseKL().parameters)
    return (math.log(vocab) - divergence) * mask
