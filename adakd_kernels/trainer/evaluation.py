"""What an evaluation measures besides the loss, and how its numbers are made the same for every way to split the data.

The loss takes its medians over each batch, so its value depends on the batch size, and on the options of the run. The
measures here do not: they are sums over tokens at temperature 1, divided at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adaptive import exact_dtype
from ..divergences import ReverseKL
from ..functional import token_divergence, token_statistics
from ..linear.chunks import CHUNK_BYTES
from ..linear.heads import HeadInput, make_heads, spans
from ..vocab_parallel import VocabParallel
from .heads import HeadOptions
from .records import IGNORE_INDEX

__all__ = ["MEASURES", "HeldOutSums", "logits_in_chunks", "token_measures", "without_repeats"]

MEASURES = ("forward_kl", "reverse_kl", "cross_entropy", "agreement")
"""Means over the valid tokens. The first three are better where they are lower, in nats per token."""


class HeldOutSums:
    """Sums over the valid tokens of one evaluation, on the device: of `MEASURES`, and of the loss.

    With teacher p and student q, both over the common entries at temperature 1, forward KL = Σ p (log p − log q),
    reverse KL = Σ q (log q − log p), cross-entropy = −log q of the label, and agreement = 1 where both have the same
    most likely entry, else 0.

    Args:
        device: where the sums stay until `means`.
    """

    def __init__(self, device: torch.device) -> None:
        self.measures = torch.zeros(len(MEASURES) + 1, dtype=exact_dtype(device), device=device)  # the last: tokens
        self.loss = torch.zeros(2, dtype=exact_dtype(device), device=device)  # Σ loss·items, Σ items

    def add_loss(self, loss: Tensor, items: float | Tensor) -> None:
        """Add the loss of a batch, the mean over so many `items`."""
        items = torch.as_tensor(items, dtype=self.loss.dtype, device=self.loss.device)
        self.loss += torch.stack((loss.detach().to(self.loss) * items, items))

    @torch.no_grad()
    def add_logits(
        self, student: Tensor, teacher: Tensor, targets: Tensor, vocab_parallel: VocabParallel | None = None
    ) -> None:
        """Add the tokens of a batch: logits (B, K, Vˢ) and (B, K, Vᵗ), and the token that each predicts, (B, K).

        With `vocab_parallel`, the logits are this rank's columns, and every rank adds the same numbers.
        """
        if vocab_parallel is not None:
            self._add(*_measures_of_parts(student, teacher, targets, vocab_parallel))
            return
        self._add(*token_measures(student, teacher, targets))

    def _add(self, *per_token: Tensor) -> None:
        """Add `MEASURES` of each token, and whether it is valid."""
        self.measures += torch.stack([values.sum(dtype=self.measures.dtype) for values in per_token]).to(
            self.measures.device
        )

    @torch.no_grad()
    def add_hidden(
        self,
        student_hidden: Tensor,  # (B, K, Hˢ)
        student_head: Any,  # with `weight` (Vˢ, Hˢ) and `bias` (Vˢ,) or None
        teacher_hidden: Tensor,  # (B, K, Hᵗ)
        teacher_head: Any,  # likewise
        options: tuple[HeadOptions, HeadOptions],  # what follows each head
        targets: Tensor,  # (B, K)
        vocab_parallel: VocabParallel | None = None,  # the heads are this rank's rows
    ) -> None:
        """Add the tokens of a batch from what the heads get: one pass of the heads, the logits of a chunk at a time."""
        sides = (student_hidden, student_head, options[0]), (teacher_hidden, teacher_head, options[1])
        targets = targets.flatten()
        for index, student, teacher in logits_in_chunks(*sides, targets, vocab_parallel):
            self.add_logits(student, teacher, targets[index].unsqueeze(0), vocab_parallel)

    def means(self, accelerator: Any) -> dict[str, float]:
        """Loss and measures of all ranks together; NaN where no token is valid. Waits for the device and the ranks."""
        *measures, tokens, loss, items = accelerator.reduce(torch.cat((self.measures, self.loss)))
        values = torch.stack([loss / items, *(total / tokens for total in measures)]).tolist()
        return dict(zip(("loss", *MEASURES), values, strict=True))


def token_measures(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """`MEASURES` of each token, (B, K) each and 0 where it is not valid, and whether it is.

    Args:
        student: logits (B, K, Vˢ).
        teacher: logits (B, K, Vᵗ).
        targets: (B, K), the token that each position predicts.
    """
    forward_kl, valid, normalizers_1, *_ = token_statistics(
        student, teacher, targets != IGNORE_INDEX, None, "forward_kl"
    )
    temperature = torch.ones_like(forward_kl)
    reverse_kl, *_ = ops.token_divergence(student, teacher, temperature, valid, ReverseKL.name, *ReverseKL().parameters)
    cross_entropy = ops.token_cross_entropy(student, teacher, targets, valid, normalizers_1)
    vocab = min(student.shape[-1], teacher.shape[-1])
    agreement = (student[..., :vocab].argmax(-1) == teacher[..., :vocab].argmax(-1)) & valid
    return forward_kl, reverse_kl, cross_entropy, agreement, valid


def logits_in_chunks(
    student: tuple[Tensor, Any, HeadOptions],  # hidden states (B, K, Hˢ), head, what follows it
    teacher: tuple[Tensor, Any, HeadOptions],  # likewise, (B, K, Hᵗ)
    targets: Tensor,  # (B·K,), the token that each position predicts
    vocab_parallel: VocabParallel | None = None,  # the heads are this rank's rows
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of all tokens with a label, some at a time: their indices (n,), and the logits of both models (1, n, V).

    The logits are of the common entries, and are overwritten by the next ones.
    """
    heads = make_heads(
        *(
            HeadInput(hidden, head.weight, head.bias, after.scale, after.softcap)
            for hidden, head, after in (student, teacher)
        ),
        shards=vocab_parallel,
    )
    positions = (targets != IGNORE_INDEX).nonzero().flatten()
    budget = CHUNK_BYTES.get(targets.device.type, 2**30)
    rows = max(64, budget // max(1, sum(head.row_bytes for head in heads)))
    if vocab_parallel is not None:  # as many messages on every rank, whatever its number of columns
        rows = int(vocab_parallel.gather(torch.tensor([[[rows]]], device=targets.device)).min())
    buffers = [head.empty_rows(min(rows, len(positions))) for head in heads]
    with torch.autocast(targets.device.type, enabled=False):  # the heads have taken autocast's type
        for a, b in spans(0, len(positions), rows):
            index = positions[a:b]
            for head, logits in zip(heads, buffers, strict=True):
                head.raw_logits(head.rows(index), logits[: b - a])
                head.capped(logits[: b - a], logits[: b - a])
            student_logits, teacher_logits = (logits[: b - a].unsqueeze(0) for logits in buffers)
            yield index, student_logits, teacher_logits


def _measures_of_parts(
    student: Tensor, teacher: Tensor, targets: Tensor, vocab_parallel: VocabParallel
) -> tuple[Tensor, ...]:
    """`MEASURES` of each token, and whether it is valid, from columns of the vocabulary; equal on all ranks."""
    found = token_statistics(student, teacher, targets != IGNORE_INDEX, targets, "forward_kl", vocab_parallel)
    reverse_kl = token_divergence(
        student, teacher, 1.0, ReverseKL.name, mask=found.valid, vocab_parallel=vocab_parallel
    )
    common = vocab_parallel.common(student.shape[-1], teacher.shape[-1], "logits")
    tops = []
    for logits in (student[..., :common], teacher[..., :common]):
        none = logits.new_full((*logits.shape[:-1], 1), -torch.inf)  # behind the columns, of which there may be none
        value, index = torch.cat((logits, none), dim=-1).max(-1)
        values, indices = (vocab_parallel.gather(x.unsqueeze(0))[:, 0] for x in (value, index + vocab_parallel.first))
        tops.append(indices.gather(0, values.argmax(0, keepdim=True)))
    agreement = (tops[0] == tops[1]).squeeze(0) & found.valid
    assert found.cross_entropy is not None
    return found.difficulty, reverse_kl, found.cross_entropy, agreement, found.valid


def without_repeats(labels: Tensor, loader: Any, rank: int, ranks: int) -> Tensor:
    """The labels (B, L) of a batch, −100 in the records that accelerate repeats to give all ranks one batch size.

    They stand behind the others in the last batch, over the ranks in order. They keep their labels where the loader
    does not know how many they are (an iterable data set with `dispatch_batches=False`), or where the collator has put
    all records into one row.
    """
    remainder = getattr(loader, "remainder", -1)  # records of the last batch of all ranks; 0 where it is full
    if ranks == 1 or remainder <= 0 or not getattr(loader, "end_of_dataloader", False):
        return labels
    labels = labels.clone()
    labels[max(0, remainder - rank * len(labels)) :] = IGNORE_INDEX
    return labels
