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
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from ..adaptive import descending
from ..divergences import Divergence, ReverseKL
from ..functional import TokenChoice, choose_tokens, distances
from ..reference import Normalizers
from ..vocab_parallel import VocabParallel
from .heads import Head, spans

CHUNK_BYTES = {"cpu": 112 * 2**20}
"""Bytes for the logits of one chunk, by device type; 1 GiB for others."""
TEACHER_PART = 2
"""The teacher's buffer has half as many rows as the student's: long student chunks make dW += dZᵀH cheaper. Where the
vocabulary is split it has as many, since each part of a chunk would take messages of its own."""


class Tokens(NamedTuple):
    """The labelled tokens."""

    positions: Tensor  # (n,) in the flattened batch, ascending
    labels: Tensor | None  # (1, n); None where nothing reads them
    batch: int  # tokens of the whole batch


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
    power: float = 1.0  # by which the gradients are scaled up until the backward

    @property
    def selects_all_at_one_temperature(self) -> bool:
        """Whether no token has to wait for the others.

        Only for Python numbers: reading a tensor's value would synchronise with the device again.
        """
        ratio, scale = self.focus_ratio, self.temperature_scale
        return not isinstance(ratio, Tensor) and not isinstance(scale, Tensor) and ratio == 1.0 and scale == 0.0


class Statistics(NamedTuple):
    """What phase 1 keeps of the labelled tokens, or of a part of them."""

    difficulty: Tensor  # (1, n)
    normalizers_1: Tensor  # (4, 1, n)
    label_logits: Tensor | None  # (1, n) logits of the student at the labels, if they are asked for
    entropy: Tensor | None  # (1, n), if it is asked for
    cross_entropy: Tensor | None = None  # (1, n), where it is known already
    maxima: Tensor | None = None  # (2, ranks, 1, n) of all shards, where the vocabulary is split


class Choice(NamedTuple):
    """What the statistics say of the tokens: how those of the whole batch enter the loss, and more of the labelled."""

    tokens: TokenChoice  # (1, batch)
    valid: Tensor  # (1, n)
    cross_entropy: Tensor | None  # (1, n)


class Taken(NamedTuple):
    """Tokens of which divergence and gradient are computed, in this order, or a part of them."""

    positions: Tensor  # (m,) in the flattened batch
    labels: Tensor | None  # (1, m), as all that follows but the normalisers and the maxima; of the cross-entropy
    temperature: Tensor
    selected: Tensor
    weight: Tensor  # of the divergence in the gradient
    ce_weight: Tensor | None = None  # of the cross-entropy
    normalizers_1: Tensor | None = None  # (4, 1, m), if the loss has a cross-entropy
    maxima: Tensor | None = None  # (2, ranks, 1, m), where the vocabulary is split

    def part(self, rows: slice) -> Taken:
        """Those at some of the places."""
        return Taken(*(None if x is None else x[..., rows] for x in self))  # type: ignore[arg-type]


class Pair(NamedTuple):
    """Logits of some tokens."""

    raw: Tensor  # (rows, V) raw logits of the student, which its gradient replaces
    student: Tensor  # (1, rows, V); the memory of `raw` where the student has no soft-cap
    teacher: Tensor  # (1, rows, V)


class TokenResults(NamedTuple):
    """What the phases leave of the tokens. The gradients are in the student's head."""

    choice: TokenChoice  # (1, batch)
    positions: Tensor  # (m,) of the tokens of which there is a divergence
    divergence: Tensor  # (1, m), 0 for tokens that are not selected, as the two that follow
    temperature: Tensor
    cross_entropy: Tensor | None
    gradient_scale: float | Tensor  # gradients of the loss are this times those of the head
    entropy: Tensor | None = None  # (1, n) of the labelled tokens


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
        self.n = len(tokens.positions)
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

    def choose(self, found: Statistics) -> Choice:
        """(3)-(6) over these tokens, by the statistics of all labelled ones."""
        of, (positions, labels, batch) = self.objective, self.tokens
        labels = None if found.label_logits is None else labels
        difficulty, valid, of_labelled, cross_entropy = ops.spread_statistics(
            found.difficulty, found.normalizers_1, positions, batch, found.label_logits, labels, self.vocab
        )
        choice = choose_tokens(
            difficulty, valid, of.focus_ratio, of.temperature_scale, of.base_temperature, of.num_items
        )
        return Choice(choice, of_labelled, found.cross_entropy if labels is None else cross_entropy)

    @property
    def power(self) -> Tensor:
        """The power of two of the objective, 0-d, in memory of its own."""
        return torch.full((), self.objective.power, dtype=self.dtype, device=self.tokens.positions.device)

    def weights(
        self, power: Tensor, choice: TokenChoice, temperature: Tensor, selected: Tensor, valid: Tensor | None,
        cross_entropy: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The weights of the gradients of some tokens (1, rows), times the `power` of two."""
        if not self.objective.ce_weight:
            valid = cross_entropy = None
        weight, *of_ce = ops.loss_weights(
            None, power, temperature, selected, choice.k, cross_entropy, valid, choice.n, self.objective.ce_weight
        ).unbind()
        return weight, of_ce[0] if of_ce else None

    def ones(self, dtype: torch.dtype) -> Tensor:
        """A 1 for every labelled token, (1, n)."""
        return torch.ones(1, self.n, dtype=dtype, device=self.tokens.positions.device)

    def no_statistics(self) -> Statistics:
        """Those of no token."""
        none = self.ones(self.dtype)[:, :0]
        ce, entropy = (none if asked else None for asked in (self.objective.ce_weight, self.objective.entropy))
        return Statistics(none, none.expand(4, 1, 0), None, entropy, ce)

    def pair(self, raw: Tensor, teacher: Tensor) -> Pair:
        """The logits of some tokens from raw ones of the student and those of the teacher, both (rows, V)."""
        student = self.student.capped(raw, self.z_s[: len(raw)])
        return Pair(raw, student.unsqueeze(0), teacher[:, : self.common].unsqueeze(0))

    def parts(self, *, fold: bool = False) -> Iterator[tuple[slice, Pair]]:
        """Of each part in turn: which of the n tokens it has, and their logits.

        With `fold`, what the caller leaves in `raw`, the gradient over x, goes to the gradients of the student's head.
        """
        positions = self.tokens.positions
        if fold:
            self.student.expect(positions)
        for a, b in spans(0, self.n, self.chunk):
            raw = self.raw_s[: b - a]
            hidden = self.student_logits(positions[a:b], raw, graph=fold)
            yield from ((slice(a + i, a + j), pair) for i, j, pair in self.pairs(positions[a:b], raw))
            if fold:
                self.student.fold(hidden, raw)

    def pairs(self, index: Tensor, raw: Tensor, z_t: Tensor | None = None) -> Iterator[tuple[int, int, Pair]]:
        """Of each part of a chunk: its place in the chunk, and the logits; the teacher's in `z_t` if that is given."""
        hidden = self.teacher.rows(index)
        for i, j in spans(0, len(index), self.part):
            out = self.z_t[: j - i] if z_t is None else z_t[i:j]
            self.teacher.raw_logits(hidden[i:j], out)
            yield i, j, self.pair(raw[i:j], self.teacher.capped(out, out))

    def kept_pairs(self, raw: Tensor, z_t: Tensor) -> Iterator[tuple[int, int, Pair]]:
        """`pairs` of logits that are there already."""
        for i, j in spans(0, len(raw), self.part):
            yield i, j, self.pair(raw[i:j], z_t[i:j])

    def student_logits(self, index: Tensor, out: Tensor, *, graph: bool = False) -> Tensor:
        """The hidden states of the tokens at `index` of the batch, and their raw logits in `out`."""
        hidden = self.student.rows(index)
        self.student.raw_logits(hidden, out, graph=graph)
        return hidden

    @property
    def vocab(self) -> int:
        """Entries of the common vocabulary."""
        return min(self.student.vocab, self.teacher.vocab)

    def measure(self, pair: Pair, labelled: Tensor) -> Statistics:
        """Statistics of some tokens (1, rows) but for what follows from their labels."""
        difficulty, normalizers_1 = distances(pair.student, pair.teacher, labelled, self.objective.difficulty)
        entropy = token_entropy(pair.student) if self.objective.entropy else None
        return Statistics(difficulty, normalizers_1, None, entropy)

    def measured(self, pair: Pair, part: slice, labelled: Tensor) -> tuple[Statistics, Tensor]:
        """All statistics of a part, and which of its tokens are valid."""
        if self.shards is not None and self.tokens.labels is not None:
            labels = self.tokens.labels[:, part]
            found = self.merged(self.shards, [self.shard_numbers(self.shards, pair, labels)], labels)
            return found, valid_rows(found.normalizers_1)
        found = self.measure(pair, labelled)
        valid = valid_rows(found.normalizers_1)
        if self.objective.ce_weight or self.objective.difficulty == "cross_entropy":
            found = self.with_cross_entropy(found, pair, part, valid)
        return found, valid

    def with_cross_entropy(self, found: Statistics, pair: Pair, part: slice, valid: Tensor) -> Statistics:
        """The statistics of a part with its cross-entropy, as the difficulty where it is that."""
        assert self.tokens.labels is not None
        labels = self.tokens.labels[:, part]
        ce = ops.token_cross_entropy(pair.student, pair.teacher, labels, valid, found.normalizers_1)
        difficulty = ce if self.objective.difficulty == "cross_entropy" else found.difficulty
        return found._replace(difficulty=difficulty, cross_entropy=ce)

    def shard_numbers(self, shards: VocabParallel, pair: Pair, labels: Tensor) -> Tensor:
        """(k, 1, rows) what this rank tells the others of some tokens."""
        labelled = torch.ones_like(labels, dtype=torch.bool)
        return ops.shard_statistics(shards, pair.student, pair.teacher, labelled, labels, self.objective.difficulty)

    def merged(self, shards: VocabParallel, numbers: Sequence[Tensor], labels: Tensor) -> Statistics:
        """The statistics of the tokens with these labels, from `shard_numbers` of their parts: one message."""
        gathered, labelled = shards.gather(torch.cat(tuple(numbers), dim=-1)), torch.ones_like(labels, dtype=torch.bool)
        found = ops.merge_statistics(shards, gathered, labelled, labels, self.objective.difficulty)
        ce = found.cross_entropy if self.objective.ce_weight else None
        return Statistics(found.difficulty, found.normalizers_1, None, None, ce, found.maxima)

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
        self.of_raw(pair)

    def divergence(self, pair: Pair, of: Taken) -> Tensor:
        """D of some tokens (1, rows). A gradient that is asked for (of the loss over x) replaces `pair.raw`."""
        ce_args: tuple[Tensor | None, ...] = (None, None, None)
        if of.ce_weight is not None and of.labels is not None:
            ce_args = (self.local(of.labels), of.ce_weight, of.normalizers_1)
        if not self.differentiates or self.shards is not None:
            d, *saved = self.sums(pair, of.temperature, of.selected, of.maxima)
            if self.differentiates:
                self.gradient(pair, of.temperature, of.weight, saved, ce_args)
            return d
        div = self.objective.divergence
        results: tuple[Tensor, ...] = ops.token_divergence_with_gradient_(
            pair.student, pair.teacher, of.temperature, of.selected, div.name, *div.parameters, of.weight, *ce_args
        )
        self.of_raw(pair)
        return results[0]

    def of_raw(self, pair: Pair) -> None:
        """The gradient over x in `pair.raw`, where that over z is in `pair.student`."""
        if self.student.softcap is not None:
            # `raw` holds tanh(x/cap): dL/dx = dL/dz·(1 − tanh²).
            torch.ops.aten.tanh_backward(pair.student[0], pair.raw, grad_input=pair.raw)


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
        if self.replaces:
            self.tokens = torch.arange(memory, device=self.raw_s.device)  # which of the n tokens each row is of

    def replace(self, start: int, stop: int, pair: Pair, found: Statistics) -> None:
        """Let those of the tokens from `start` to `stop` that are among the hardest so far replace easier ones."""
        order = descending(found.difficulty, valid_rows(found.normalizers_1)).indices
        hardest = torch.zeros_like(order, dtype=torch.bool)
        hardest[order[: self.rows]] = True
        # Rows whose tokens are no longer among the hardest stand first; the tokens that enter take them in order.
        free = hardest[self.tokens[:-1]].view(torch.uint8).argsort(stable=True)
        enters = hardest[start:stop]
        row = free[(enters.cumsum(0) - 1).clamp(0, self.rows - 1)].where(enters, self.rows)
        self.raw_s.index_copy_(0, row, pair.raw)
        self.z_t.index_copy_(0, row, pair.teacher[0])
        self.tokens.index_copy_(0, row, torch.arange(start, stop, device=row.device))


def one_phase(chunks: Chunks, choice: TokenChoice | None = None) -> TokenResults:
    """Divergence and gradient of every token while its logits are there, and the statistics that are still unknown.

    Without a `choice` of the tokens of the batch, all of them are selected at one temperature. The weight of a token's
    gradient depends on the number of valid tokens, which is known only when the rows of all labelled tokens are. Until
    then all of them are taken for valid; `gradient_scale` corrects the gradients afterwards.
    """
    (positions, labels, _), of = chunks.tokens, chunks.objective
    labelled, assumed, valid = chunks.ones(torch.bool), choice, None
    if assumed is None:
        assumed = choose_tokens(chunks.ones(chunks.dtype), labelled, 1.0, 0.0, of.base_temperature, of.num_items)
        temperature, selected = assumed.temperature, labelled
    else:
        temperature, selected = (x.index_select(1, positions) for x in (assumed.temperature, assumed.selected))
        valid = assumed.valid.index_select(1, positions) if of.ce_weight else None
    power, found, of_parts = chunks.power, [], []
    for part, pair in chunks.parts(fold=chunks.differentiates):
        taken = Taken(positions, labels, temperature, selected, temperature).part(part)
        ce, in_ce = None, None if valid is None else valid[:, part]
        if choice is None or of.ce_weight:
            measured, rows = chunks.measured(pair, part, labelled[:, part])
            ce = measured.cross_entropy
            found.append(measured)
            taken = taken._replace(normalizers_1=measured.normalizers_1, maxima=measured.maxima)
            if choice is None:
                taken, in_ce = taken._replace(selected=rows), rows
        weight, ce_weight = chunks.weights(power, assumed, taken.temperature, taken.selected, in_ce, ce)
        of_parts.append(chunks.divergence(pair, taken._replace(weight=weight, ce_weight=ce_weight)))
    statistics = joined(found) if found else chunks.no_statistics()
    divergence = torch.cat(of_parts, dim=-1) if of_parts else torch.zeros_like(temperature)
    known, entropy = choice, statistics.entropy
    gradient_scale: float | Tensor = chunks.student.scale / of.power
    if known is None:
        every = chunks.choose(statistics)
        known = every.tokens
        gradient_scale = assumed.k / known.k * gradient_scale
        entropy = None if entropy is None else entropy.where(every.valid, 0.0)
    ce = statistics.cross_entropy if of.ce_weight else None
    return TokenResults(known, positions, divergence, temperature, ce, gradient_scale, entropy)


def two_phases(chunks: Chunks, kept: KeptLogits, needed: int) -> TokenResults:
    """Statistics of every labelled token, selection over all of them, and then divergence and gradient.

    `needed` is the number of tokens that phase 2 takes: the hardest ones, or all.
    """
    statistics, of = phase_1(chunks, kept), chunks.objective
    found = chunks.choose(statistics)
    taken = _taken(chunks, kept, needed, statistics, found)
    divergence, entropy = _phase_2(chunks, kept, taken), statistics.entropy
    if entropy is not None:
        entropy = entropy.where(found.valid, 0.0)
    ce = found.cross_entropy if of.ce_weight else None
    gradient_scale = chunks.student.scale / of.power
    return TokenResults(found.tokens, taken.positions, divergence, taken.temperature, ce, gradient_scale, entropy)


def phase_1(chunks: Chunks, kept: KeptLogits) -> Statistics:
    """The statistics of every labelled token. The first logits go to where they are kept, while there is room."""
    (positions, labels, _), of = chunks.tokens, chunks.objective
    by_label = of.difficulty == "cross_entropy"
    reads = chunks.shards is None and of.ce_weight > 0 and not by_label
    labelled, found = chunks.ones(torch.bool), []
    at = logits = None
    if reads and labels is not None:
        at = labels.clamp(0, chunks.vocab - 1).view(-1, 1)  # those outside the vocabulary are told apart later
        logits = torch.empty(chunks.n, 1, dtype=chunks.raw_s.dtype, device=at.device)
    numbers = []  # of all parts, in the order of the tokens
    for a, b in spans(0, kept.rows, chunks.chunk) + spans(kept.rows, chunks.n, chunks.chunk):
        keeps = a < kept.rows
        raw = kept.raw_s[a:b] if keeps else chunks.raw_s[: b - a]
        chunks.student_logits(positions[a:b], raw)
        if at is not None and logits is not None:
            torch.gather(raw, 1, at[a:b], out=logits[a:b])
        for i, j, pair in chunks.pairs(positions[a:b], raw, kept.z_t[a:b] if keeps else None):
            part = slice(a + i, a + j)
            if chunks.shards is not None and labels is not None:
                numbers.append(chunks.shard_numbers(chunks.shards, pair, labels[:, part]))
                continue
            measured = chunks.measure(pair, labelled[:, part])
            if by_label:
                measured = chunks.with_cross_entropy(measured, pair, part, valid_rows(measured.normalizers_1))
            found.append(measured)
            if kept.replaces and not keeps:
                found = [joined(found)]
                kept.replace(part.start, part.stop, pair, found[0])
    if chunks.shards is not None and numbers and labels is not None:
        return chunks.merged(chunks.shards, numbers, labels)
    statistics = joined(found) if found else chunks.no_statistics()
    if logits is not None:
        statistics = statistics._replace(label_logits=chunks.student.capped(logits, logits).view(1, -1))
    return statistics


def _taken(chunks: Chunks, kept: KeptLogits, needed: int, statistics: Statistics, found: Choice) -> Taken:
    """The tokens of phase 2, the kept ones first, with the weights of their gradients."""
    (positions, labels, _), of, choice = chunks.tokens, chunks.objective, found.tokens
    order = selected = None
    if needed < chunks.n and (kept.rows or chunks.shards is not None):
        order = descending(statistics.difficulty, found.valid).indices[kept.rows : needed]
        # The kept tokens are the first ones of this order.
        order = torch.cat((kept.tokens[: kept.rows], order)) if kept.rows else order
        positions = positions[order]
    elif needed < chunks.n:
        # Those that are not selected follow where rows that are not valid leave fewer than `needed`.
        first = choice.selected[0].view(torch.uint8).sort(descending=True, stable=True)
        positions, selected = first.indices[:needed], first.values[:needed].view(torch.bool).unsqueeze(0)
    if selected is None:
        selected = choice.selected.index_select(1, positions)
    temperature = choice.temperature.index_select(1, positions)
    weight, ce_weight = chunks.weights(chunks.power, choice, temperature, selected, found.valid, found.cross_entropy)
    maxima = statistics.maxima
    if maxima is not None and order is not None:
        maxima = maxima[..., order]
    if not of.ce_weight:
        return Taken(positions, None, temperature, selected, weight, maxima=maxima)
    return Taken(positions, labels, temperature, selected, weight, ce_weight, statistics.normalizers_1, maxima)


def _phase_2(chunks: Chunks, kept: KeptLogits, taken: Taken) -> Tensor:
    """D of the tokens (1, m); the gradients of the student's head if any is asked for."""
    student, positions, of_parts = chunks.student, taken.positions, []
    folds, m = chunks.differentiates, len(taken.positions)
    if folds:
        student.expect(positions)
    for a, b in spans(0, kept.rows, chunks.chunk) + spans(kept.rows, m, chunks.chunk):
        keeps = a < kept.rows
        raw = kept.raw_s[a:b] if keeps else chunks.raw_s[: b - a]
        if keeps:
            hidden = student.rows(positions[a:b]) if folds else None
            pairs = chunks.kept_pairs(raw, kept.z_t[a:b])
        else:
            hidden = chunks.student_logits(positions[a:b], raw, graph=folds)
            pairs = chunks.pairs(positions[a:b], raw)
        for i, j, pair in pairs:
            of_parts.append(chunks.divergence(pair, taken.part(slice(a + i, a + j))))
        if folds and hidden is not None:
            student.fold(hidden, raw)
    if not of_parts:
        return torch.zeros_like(taken.temperature)
    return of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts, dim=-1)


def joined(parts: list[Statistics]) -> Statistics:
    """The statistics of all tokens from those of their parts."""
    if len(parts) == 1:
        return parts[0]
    each = zip(*parts, strict=True)
    return Statistics(*(None if x[0] is None else torch.cat(x, dim=-1) for x in each))  # type: ignore[arg-type]


def valid_rows(normalizers_1: Tensor) -> Tensor:
    """(1, rows) whether both rows of a token have a finite entry: the sum of a row of nothing but −inf is 0."""
    of = Normalizers.of(normalizers_1)
    return of.sum_s.logical_and(of.sum_t)


def token_entropy(logits: Tensor) -> Tensor:
    """H(q) in nats of tokens (1, rows) from their logits (1, rows, V).

    H(q) = log V - KL(q‖u) with the uniform u, so the kernels of the reverse KL give it, without a tensor of the size of
    the logits.
    """
    vocab = logits.shape[-1]
    uniform = logits.new_zeros(1, 1, vocab).expand_as(logits)
    ones = torch.ones(logits.shape[:2], dtype=reference.accumulation_dtype(logits), device=logits.device)
    divergence: Tensor
    divergence, *_ = ops.token_divergence(logits, uniform, ones, ones.bool(), ReverseKL.name, *ReverseKL().parameters)
    return math.log(vocab) - divergence


def host_power_of_two(items: float) -> float:
    """A power of two near `items`, by which the gradients are scaled up until the backward.

    In fp16 the gradient of a mean over thousands of tokens would be 0 (below 6e-8); a power of two rounds nothing.
    """
    return 2.0 ** min(max(math.frexp(items)[1], -100), 100) if math.isfinite(items) else 1.0
