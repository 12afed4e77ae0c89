"""Packing: several records in a row of at most `max_length` tokens, and the check that a model keeps them apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from .collator import ID, join_records, record_name
from .heads import evaluation_mode, input_device
from .loading import StreamOf, progress_bars
from .models import class_name
from .records import DataError
from .sources import cached_map

__all__ = ["check_borders", "pack_records"]

TOGETHER = 1000
"""Records among which those that fit together are looked for."""


def pack_records(args: Any, data: Any) -> Any:
    """Put records into rows of at most `max_length` tokens, with `position_ids` that start anew in each record.

    Each record goes, the longest first, where it leaves the least room (best fit decreasing), among the 1000 that stand
    together.

    Args:
        args: an `AdaKDConfig`, for `max_length`. A field that has no entry for each token is left out where
            `remove_unused_columns` is set, and refused elsewhere.
        data: tokenised records: a `datasets.Dataset` or `IterableDataset`, a list, or a data set or stream of torch.

    Raises:
        DataError: a record longer than a row; of a stream, when it is read.
        ValueError: a field that is refused.
    """
    pack = _Pack(args.max_length, not args.remove_unused_columns)
    if isinstance(data, datasets.Dataset):
        with args.main_process_first(desc="packing"), progress_bars(not args.disable_tqdm):
            packed = cached_map(data.with_format("numpy"), pack, [pack], "packing", desc="Packing")
        return packed.with_format(None)
    if isinstance(data, datasets.IterableDataset):
        columns = data.column_names or list(next(iter(data), {}))
        return data.map(pack, batched=True, batch_size=TOGETHER, remove_columns=columns)
    if isinstance(data, torch.utils.data.IterableDataset):
        return StreamOf(data, lambda rows, numbers: pack.rows(rows), TOGETHER)
    rows = [data[index] for index in range(len(data))]
    return [row for start in range(0, len(rows), TOGETHER) for row in pack.rows(rows[start : start + TOGETHER])]


@dataclass
class _Pack:
    """Records to packed rows, as a function for `map`."""

    max_length: int
    keep_all: bool

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """A batch of columns."""
        rows = self.rows([dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)])
        return {name: [_stored(row[name]) for row in rows] for name in rows[0]}

    def rows(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The packed rows of some records."""
        if not self.keep_all and records:
            kept = [name for name, value in records[0].items() if name == ID or _for_each_token(value, records[0])]
            records = [{name: record[name] for name in kept if name in record} for record in records]
        lengths = [len(record["input_ids"]) for record in records]
        for row, (record, length) in enumerate(zip(records, lengths, strict=True)):
            if length > self.max_length:
                raise DataError(
                    f"{record_name(record, row)} has {length} tokens, but packing makes rows of "
                    f"max_length={self.max_length}: raise it, or shorten the record"
                )
        bins: list[list[int]] = []
        room: list[tuple[int, int]] = []  # tokens that are left in a row, and which row; ascending
        for index in sorted(range(len(records)), key=lambda index: -lengths[index]):
            place = bisect_left(room, (lengths[index], 0))
            left, row = room.pop(place) if place < len(room) else (self.max_length, len(bins))
            if row == len(bins):
                bins.append([])
            bins[row].append(index)
            insort(room, (left - lengths[index], row))
        return [join_records([records[index] for index in sorted(row)]) for row in bins]


def _stored(value: Any) -> Any:
    """A field as a table takes it: whole numbers in 4 bytes, as ids are stored."""
    array = np.asarray(value)
    return array.astype(np.int32) if array.dtype == np.int64 else value


def _for_each_token(value: Any, record: Mapping[str, Any]) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str) and len(value) == len(record["input_ids"])


def check_borders(role: str, model: nn.Module) -> None:
    """Refuse a model in which a text sees the one before it in its row, as in one with a recurrent state.

    Raises:
        ValueError: two runs on a row of two texts show it.
    """
    device = input_device(model)
    logits = []
    try:
        for first in (1, 2):  # 0 is often the padding, whose embedding is 0
            inputs = {
                "input_ids": torch.tensor([[first, 3, 4, 3]], device=device),
                "position_ids": torch.tensor([[0, 1, 0, 1]], device=device),
            }
            with evaluation_mode(model):
                out = model(**inputs, use_cache=False, return_dict=True).logits
            dtype = out.dtype
            logits.append(out[:, 2:].double())
    except Exception:
        return  # it takes no positions, or cannot run here yet; the first batch will show
    change = (logits[0] - logits[1]).abs().max()
    if change > 4 * torch.finfo(dtype).eps * logits[0].abs().max():
        raise ValueError(
            f"the {role} {class_name(model)} does not keep the texts of one row apart: set packing and "
            "padding_free to False"
        )
