"""How far a student is from its teacher on tokens that both read: sums over the labelled tokens of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear.chunks import token_entropy
from ..trainer.evaluation import MEASURES, logits_in_chunks, token_measures
from ..trainer.heads import (
    HeadOptions,
    NoPlainHeadError,
    hidden_states,
    input_device,
    output_head,
    own_positions,
    plain_head,
    with_virtual_tokens,
)
from ..trainer.records import IGNORE_INDEX
from .prompts import Sequence_

__all__ = ["DISTANCES", "head_options", "labelled_states", "measures_of_states", "pad_batch", "sequence_sums"]

DISTANCES = (*MEASURES, "entropy")
"""Of each token: `MEASURES`, and H(q) = −Σ q log q of the student in nats, all at temperature 1."""


@torch.inference_mode()
def sequence_sums(
    student: Any,
    teacher: Any,
    sequences: Sequence[Sequence_],
    *,
    batch_size: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> Tensor:
    """Sums over the labelled tokens of each sequence: of `DISTANCES`, and at last of the tokens. (N, 6) fp64.

    Sequences of similar length share a batch. Where both models have a plain output layer, the logits of some tokens
    exist at a time; elsewhere those of one sequence.

    Args:
        student, teacher: causal language models of transformers with one tokenizer, in evaluation mode.
        sequences: token ids and labels.
        batch_size: sequences in one forward pass.
        progress: called with how many sequences have been read more.
    """
    try:
        options = head_options(student, teacher)
    except NoPlainHeadError:
        options, batch_size = None, 1
    sums = torch.zeros(len(sequences), len(DISTANCES) + 1, dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda index: (len(sequences[index][0]), index))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, attention, targets = pad_batch([sequences[index] for index in batch])
        owner = torch.tensor(batch).unsqueeze(1).expand_as(targets)[targets != IGNORE_INDEX]
        if len(owner):
            if options is None:
                values = _measures_of_logits(student, teacher, ids, attention, targets)
            else:
                states = [labelled_states(model, ids, attention, targets)[0] for model in (student, teacher)]
                values = measures_of_states(
                    (states[0], output_head(student), options[0]),
                    (states[1], output_head(teacher), options[1]),
                    targets[targets != IGNORE_INDEX],
                )
            sums.index_add_(0, owner, values)
        progress(len(batch))
    return sums


def head_options(student: Any, teacher: Any) -> tuple[HeadOptions, HeadOptions]:
    """What follows the heads of both models.

    Raises:
        NoPlainHeadError: one of them has no plain output layer.
    """
    return plain_head(student), plain_head(teacher)


@torch.inference_mode()
def labelled_states(model: Any, ids: Tensor, attention: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the labelled tokens of a batch (N, H), and these tokens (N,), on their device."""
    device = input_device(model)
    inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device)}
    hidden = own_positions(hidden_states(model, with_virtual_tokens(model, inputs)), ids.shape[1])
    targets = targets.to(hidden.device)
    labelled = targets != IGNORE_INDEX
    return hidden[labelled], targets[labelled]


@torch.inference_mode()
def measures_of_states(
    student: tuple[Tensor, Any, HeadOptions], teacher: tuple[Tensor, Any, HeadOptions], targets: Tensor
) -> Tensor:
    """`DISTANCES` of tokens, and 1 for each that is valid: (N, 6) fp64 on the CPU.

    Args:
        student: hidden states (N, Hˢ), the head, and what follows it.
        teacher: likewise, (N, Hᵗ).
        targets: (N,), the tokens that the states predict.
    """
    device = student[0].device
    targets = targets.to(device)
    values = torch.zeros(len(targets), len(DISTANCES) + 1, dtype=torch.float64)
    here = (teacher[0].to(device), *teacher[1:])
    for index, student_logits, teacher_logits in logits_in_chunks(student, here, targets):
        values[index.cpu()] = _token_values(student_logits, teacher_logits, targets[index].unsqueeze(0))
    return values


def _measures_of_logits(student: Any, teacher: Any, ids: Tensor, attention: Tensor, targets: Tensor) -> Tensor:
    """The same from the logits of one sequence."""
    rows = []
    for model in (student, teacher):
        device = input_device(model)
        inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device)}
        logits = model(**with_virtual_tokens(model, inputs), use_cache=False, return_dict=True).logits
        rows.append(own_positions(logits, ids.shape[1])[targets.to(logits.device) != IGNORE_INDEX].unsqueeze(0))
    labels = targets[targets != IGNORE_INDEX].unsqueeze(0).to(rows[0].device)
    common = min(logits.shape[-1] for logits in rows)
    return _token_values(rows[0][..., :common], rows[1][..., :common].to(rows[0].device), labels)


def _token_values(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    *measures, valid = token_measures(student, teacher, targets)
    values = (*measures, token_entropy(student) * valid, valid)
    return torch.stack([each.squeeze(0).to("cpu", torch.float64) for each in values], dim=-1)


def pad_batch(sequences: Sequence[Sequence_]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences padded on the right to one length L.

    Returns:
        `(B, L)` token ids, `(B, L)` attention mask and `(B, L)` targets: the labelled token that a position predicts,
        −100 elsewhere. Padding is masked, so its id (0) means nothing.
    """
    length = max(len(ids) for ids, _ in sequences)
    padded = torch.zeros(len(sequences), length, dtype=torch.long)
    attention = torch.zeros_like(padded)
    targets = torch.full_like(padded, IGNORE_INDEX)
    for row, (ids, labels) in enumerate(sequences):
        padded[row, : len(ids)] = torch.tensor(ids)
        attention[row, : len(ids)] = 1
        targets[row, : len(ids) - 1] = torch.tensor(labels[1:])
    return padded, attention, targets
