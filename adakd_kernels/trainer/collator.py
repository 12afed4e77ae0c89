"""Batches of tokenised records: padding, labels, and the positions whose logits the loss reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .records import IGNORE_INDEX

__all__ = ["AdaKDDataCollator"]


@dataclass
class AdaKDDataCollator:
    """Pads records on the right and names the positions that predict a label.

    Attributes:
        pad_token_id: fills `input_ids`; the attention mask hides it, so any id does.
        pad_to_multiple_of: pads the length to a multiple of this number.
        logits_to_keep: adds `logits_to_keep`, so that the heads of student and teacher compute no other positions.
        per_record: every record names its own positions instead of those of all records, so that prompts of different
            length cost nothing. Recent transformers take this form; with others the trainer computes all positions.

    Example:
        >>> record = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
        >>> batch = AdaKDDataCollator()([record, {"input_ids": [5, 6], "labels": [-100, 6]}])
        >>> batch["labels"].tolist(), batch["logits_to_keep"].tolist()
        ([[-100, -100, 7, 8], [-100, 6, -100, -100]], [0, 1, 2])
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    logits_to_keep: bool = True
    per_record: bool = False

    def __call__(self, records: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Collate B records of `input_ids` and `labels` (−100 on the prompt), each of one length per record.

        Returns:
            input_ids, attention_mask, labels: (B, L) int64; labels are aligned with the inputs, as transformers has
            them, and −100 on padding and on the first token, which nothing predicts.
            logits_to_keep: (K,) int64, ascending, K ≥ 1: every position whose next token is a label in some record; or,
            `per_record`, (B, K): those of each record, filled up with the last position, which predicts nothing.

        Raises:
            ValueError: a record without one of the fields, or with fields of different length.
        """
        for record in records:
            if "input_ids" not in record or "labels" not in record:
                raise ValueError(f"a record must have input_ids and labels, got {sorted(record)}")
            if len(record["input_ids"]) != len(record["labels"]):
                raise ValueError(
                    f"input_ids and labels of a record must have one length, got {len(record['input_ids'])} and "
                    f"{len(record['labels'])}"
                )
        length = max(len(record["input_ids"]) for record in records)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        shape = (len(records), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
        }
        for row, record in enumerate(records):
            used = len(record["input_ids"])
            batch["input_ids"][row, :used] = torch.as_tensor(record["input_ids"])
            batch["attention_mask"][row, :used] = 1
            batch["labels"][row, :used] = torch.as_tensor(record["labels"])
        batch["labels"][:, 0] = IGNORE_INDEX
        if self.logits_to_keep:
            predicts = batch["labels"][:, 1:] != IGNORE_INDEX
            batch["logits_to_keep"] = (
                _positions(predicts, length) if self.per_record else _positions(predicts.any(0), length)
            )
        return batch


def _positions(predicts: Tensor, length: int) -> Tensor:
    """Where a (..., L − 1) mask is true, as (..., K) indices, filled up with the last position."""
    # One position at least, so that the graph of a batch without labels reaches every parameter too.
    longest = max(1, int(predicts.sum(-1).max()))
    index = torch.arange(length - 1).expand(predicts.shape).masked_fill(~predicts, length - 1)
    index = torch.nn.functional.pad(index, (0, 1), value=length - 1)
    return index.sort(-1).values[..., :longest]
