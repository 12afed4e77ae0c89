"""Batches of tokenised records: padding, labels, and the positions whose logits the loss reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .records import IGNORE_INDEX

__all__ = ["ID", "AdaKDDataCollator", "CheckedCollator", "join_records", "record_ids"]


ID = "id"
"""Field that names a record in messages. A batch has it as (B, W) bytes, so that it travels as every tensor does."""


@dataclass
class AdaKDDataCollator:
    """Pads records on the right, keeps their other fields, and names the positions that predict a label.

    Records with `position_ids` that start anew are packed. Their batch has no attention mask, because transformers
    reads the borders from `position_ids` only without one; nothing attends to padding on the right in any case.

    Attributes:
        pad_token_id: fills `input_ids`; the attention mask hides it, so any id does.
        pad_to_multiple_of: pads the length to a multiple of this number.
        logits_to_keep: adds `logits_to_keep`, so that the heads of student and teacher compute no other positions.
        padding_free: puts all records of a batch into one row without padding, as one packed record (`join_records`).
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
    padding_free: bool = False

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate B records of `input_ids` and `labels` (−100 on the prompt), each of one length per record.

        Every other field is kept: numbers, one for each token (padded with 0) or one for the record. A record may leave
        out `attention_mask` (all ones) and `position_ids` (0, 1, …).

        Returns:
            input_ids, attention_mask, labels: (B, L) int64, B = 1 where `padding_free`. Labels are aligned with the
            inputs, as transformers has them, and −100 where no token stands in front in the same text: on padding, and
            on the first token of the record, of a packed text, and after a token that the mask hides. No attention_mask
            for packed records.
            Other fields: (B, L), or (B,) for one number a record; `id` as (B, W) uint8, read by `record_ids`.
            logits_to_keep: (K,) int64, ascending, K ≥ 1: every position whose next token is a label in some record; or,
            `per_record`, (B, K): those of each record, filled up with the last position, which predicts nothing.

        Raises:
            ValueError: a record without one of the fields, a field of another length than `input_ids` or of something
                else than numbers, or packed records with a mask that hides more than their end.
        """
        for row, record in enumerate(records):
            if "input_ids" not in record or "labels" not in record:
                raise ValueError(f"a record must have input_ids and labels, got {sorted(record)}")
            if len(record["input_ids"]) != len(record["labels"]):
                raise ValueError(
                    f"input_ids and labels of a record must have one length, got {len(record['input_ids'])} and "
                    f"{len(record['labels'])} in {record_name(record, row)}"
                )
        if self.padding_free:
            records = [join_records(records)]
        length = max(len(record["input_ids"]) for record in records)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        batch = {
            name: _padded(name, records, length, fill)
            for name, fill in (("input_ids", self.pad_token_id), ("attention_mask", 0), ("labels", IGNORE_INDEX))
        }
        given = {name: None for record in records for name, value in record.items() if value is not None}
        for name in given:
            if name not in batch and name != ID:
                batch[name] = _padded(name, records, length, 0)
        if ID in given:
            batch[ID] = _encoded([str(record.get(ID, row)) for row, record in enumerate(records)])
        _leave_out_what_nothing_predicts(batch)
        if self.logits_to_keep:
            predicts = batch["labels"][:, 1:] != IGNORE_INDEX
            batch["logits_to_keep"] = (
                _positions(predicts, length) if self.per_record else _positions(predicts.any(0), length)
            )
        return batch


@dataclass
class CheckedCollator:
    """Another collator, and a check that both models have an embedding for every token and position of its batches.

    On the CPU, where the batch is made: on a GPU an id beyond the embedding would end the process.

    Attributes:
        collate: makes the batches.
        vocabularies, positions: of each role, how many ids and how many tokens a record may have; None: no limit.
        decode: the tokenizer's, for messages.
    """

    collate: Callable[[Any], Any]
    vocabularies: dict[str, int | None]
    positions: dict[str, int | None]
    decode: Callable[[list[int]], str] | None = None

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of `collate`.

        Raises:
            ValueError: an id or a label beyond a vocabulary, or a record longer than a model takes.
        """
        batch = self.collate(records)
        for name in ("input_ids", "labels"):
            if isinstance(batch.get(name), Tensor):
                for role, size in self.vocabularies.items():
                    self._check_ids(name, batch, role, size)
        for role, limit in self.positions.items():
            if limit is not None and isinstance(batch.get("input_ids"), Tensor):
                _check_length(batch, role, limit)
        return batch

    def _check_ids(self, name: str, batch: Mapping[str, Tensor], role: str, size: int | None) -> None:
        ids = batch[name]
        wrong = ids < 0 if size is None else (ids < 0) | (ids >= size)
        if name == "labels":
            wrong &= ids != IGNORE_INDEX
        if not wrong.any():
            return
        row, position = wrong.nonzero()[0].tolist()
        token = int(ids[row, position])
        text = f" ({self.decode([token])!r})" if self.decode is not None and token >= 0 else ""
        raise ValueError(
            f"{name}[{position}] of {record_ids(batch.get(ID), len(ids))[row]} is {token}{text}, which is none of the "
            f"{size} ids of the {role}: student and teacher need the tokenizer that made the records"
        )


def join_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of several, packed: their tokens in a row, with `position_ids` that start anew in each.

    Tokens that an attention mask hides are left out. Nothing predicts the first token of a record, so it has no label.

    Returns:
        `input_ids`, `labels`, `position_ids` and the other fields that have an entry for each token; `id` has those of
        all records.

    Raises:
        ValueError: a field without one entry for each token, or positions of a record that do not start at 0.
    """
    names = {name: None for record in records for name, value in record.items() if value is not None}
    names = {name: None for name in (*names, "position_ids") if name not in ("attention_mask", ID)}
    joined: dict[str, list[Any]] = {name: [] for name in names}
    for row, record in enumerate(records):
        used = len(record["input_ids"])
        mask: Any = record.get("attention_mask")
        hidden = mask is not None and not all(mask)
        for name in names:
            values: Any = record.get(name)
            if values is None and name == "position_ids":
                values = range(used)
            if not hasattr(values, "__len__") or isinstance(values, str) or len(values) != used:
                raise ValueError(
                    f"field {name!r} of {record_name(record, row)} must have one entry for each of its {used} tokens, "
                    "to stand in one row with other records"
                )
            own = list(values.tolist() if hasattr(values, "tolist") else values)
            if hidden:
                own = [value for value, shown in zip(own, mask, strict=True) if shown]
            if name == "labels":
                own[:1] = [IGNORE_INDEX] * len(own[:1])
            if name == "position_ids" and own[:1] not in ([], [0]):
                raise ValueError(
                    f"the positions of {record_name(record, row)} start at {own[0]}: records in one row need "
                    "position_ids that start at 0 behind what attention_mask hides"
                )
            joined[name] += own
    ids = [str(record.get(ID, row)) for row, record in enumerate(records)]
    return {**joined, **({ID: ", ".join(ids)} if any(ID in record for record in records) else {})}


def _check_length(batch: Mapping[str, Tensor], role: str, limit: int) -> None:
    """Refuse a batch with more positions than a model takes."""
    positions = batch.get("position_ids")
    longest = batch["input_ids"].shape[1] if positions is None else int(positions.max()) + 1
    if longest > limit:
        raise ValueError(
            f"a record of the batch takes {longest} tokens with its padding, but the {role} takes {limit} "
            "(max_position_embeddings): shorten the records"
        )


def record_name(record: Mapping[str, Any], row: int) -> str:
    """How a message calls a record: by its `id`, or by its index in the batch."""
    return f"record {record[ID]!r}" if record.get(ID) is not None else f"record {row} of the batch"


def record_ids(batch_ids: Tensor | None, rows: int) -> list[str]:
    """How a message calls the records of a batch whose `id` is (B, W) bytes, or that has none."""
    if batch_ids is None:
        return [record_name({}, row) for row in range(rows)]
    texts = [bytes(row).rstrip(b"\0").decode() for row in batch_ids.tolist()]
    return [record_name({ID: text}, row) for row, text in enumerate(texts)]


def _encoded(texts: list[str]) -> Tensor:
    """Texts as (B, W) UTF-8 bytes, filled up with 0."""
    rows = [torch.tensor(list(text.encode("utf-8", "replace")), dtype=torch.uint8) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _padded(name: str, records: Sequence[Mapping[str, Any]], length: int, fill: int) -> Tensor:
    """A field of all records, (B, L), or (B,) where each has one number."""
    values = []
    for row, record in enumerate(records):
        value, used = record.get(name), len(record["input_ids"])
        if value is None and name == "attention_mask":
            value = torch.ones(used, dtype=torch.long)
        elif value is None and name == "position_ids":
            value = torch.arange(used)
        elif value is None:
            raise ValueError(f"{record_name(record, row)} has no field {name!r}, which other records of the batch have")
        try:
            values.append(torch.as_tensor(value))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"field {name!r} of {record_name(record, row)} is no list of numbers, and no model reads it: leave it "
                "out of the records, or set remove_unused_columns=True ('id' is kept for messages)"
            ) from None
        if values[-1].shape not in ((), (used,)) or values[-1].dim() != values[0].dim():
            raise ValueError(
                f"field {name!r} of {record_name(record, row)} must have one entry for each of its {used} tokens, got "
                f"shape {tuple(values[-1].shape)}"
            )
    if values[0].dim() == 0:
        return torch.stack(values)
    whole = not any(value.is_floating_point() and value.numel() for value in values)  # an empty list becomes a float
    out = torch.full((len(values), length), fill, dtype=torch.long if whole else values[0].dtype)
    for row, value in enumerate(values):
        out[row, : len(value)] = value
    return out


def _leave_out_what_nothing_predicts(batch: dict[str, Tensor]) -> None:
    """Take the label of every token in front of which no token of its text is visible, and the mask of packed texts."""
    visible, labels = batch["attention_mask"] != 0, batch["labels"]
    predicted = visible[:, 1:] & visible[:, :-1]  # (B, L − 1)
    if "position_ids" in batch:
        continues = batch["position_ids"].diff(dim=1) == 1
        if (predicted & ~continues).any():
            if (visible[:, 1:] & ~visible[:, :-1]).any():
                raise ValueError(
                    "packed records (position_ids that start anew) cannot have an attention_mask that hides more than "
                    "their end: leave attention_mask out of the records"
                )
            del batch["attention_mask"]
        predicted = predicted & continues
    labels[:, 0] = IGNORE_INDEX
    labels[:, 1:].masked_fill_(~predicted, IGNORE_INDEX)


def _positions(predicts: Tensor, length: int) -> Tensor:
    """Where a (..., L − 1) mask is true, as (..., K) indices, filled up with the last position."""
    # One position at least, so that the graph of a batch without labels reaches every parameter too.
    longest = max(1, int(predicts.sum(-1).max()))
    index = torch.arange(length - 1).expand(predicts.shape).masked_fill(~predicts, length - 1)
    index = torch.nn.functional.pad(index, (0, 1), value=length - 1)
    return index.sort(-1).values[..., :longest]
