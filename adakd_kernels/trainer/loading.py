"""From what people have, files and data sets, to records of token ids: read, tokenised once, cached and counted."""

from __future__ import annotations

import glob
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import Tensor

from .records import IGNORE_INDEX, DataError, each_reference, split_record, tokenize_record
from .sources import (
    TEXTS,
    cached_map,
    cached_texts,
    csv_rows,
    json_array,
    json_lines,
    numbered,
    read_table,
    saved_table,
)

__all__ = [
    "LONG_RECORDS",
    "LoadedRecords",
    "StreamOf",
    "load_for",
    "load_prompts_for",
    "load_records",
    "load_references",
    "progress_bars",
]

LONG_RECORDS = ("truncate", "drop", "refuse")
FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")),
    labels=datasets.List(datasets.Value("int32")),
    id=datasets.Value("string"),
    truncated=datasets.Value("bool"),
)
"""Of tokenised records; `truncated` leaves them when it has been counted."""
PROMPTS = datasets.Features(
    prompt=datasets.Value("large_string"),
    completion=datasets.Value("large_string"),
    conversation=datasets.Value("bool"),
)
"""Of prompts and completions: both as JSON, and whether they are messages."""
REFERENCES = datasets.Features(
    input_ids=datasets.List(datasets.List(datasets.Value("int32"))),
    labels=datasets.List(datasets.List(datasets.Value("int32"))),
    id=datasets.Value("string"),
    key=datasets.Value("string"),
)
"""Of tokenised records with an entry for each reference; `key` is made of what the record says."""
STREAM_BATCH = 100
"""Records of a stream that are tokenised together."""
WORKERS = 256
"""Processes that read one stream, each with counts of its own."""

logger = logging.getLogger(__name__)


@dataclass
class LoadedRecords:
    """Tokenised records, and what was left out.

    Attributes:
        records: of each record `input_ids` and `labels`, −100 where nothing is to be learnt, and `id`: its own, or its
            file and line. A `datasets.Dataset`, a stream that is tokenised as it is read, or what was tokenised before.
        name: what messages call the data.
    """

    records: Any
    name: str
    counts: Tensor = field(default_factory=lambda: torch.zeros(1, 3, dtype=torch.long))  # read, truncated, dropped

    @property
    def read(self) -> int:
        """How many records were read; of a stream, so far, by this process and its workers."""
        return int(self.counts[:, 0].sum())

    @property
    def truncated(self) -> int:
        """How many records lost their end."""
        return int(self.counts[:, 1].sum())

    @property
    def dropped(self) -> int:
        """How many records were left out, because nothing to be learnt is within `max_length`, or as too long."""
        return int(self.counts[:, 2].sum())

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.read - self.dropped} records"]
        parts += [f"{self.truncated} of them cut at max_length"] if self.truncated else []
        parts += [f"{self.dropped} more left out: nothing to learn within max_length"] if self.dropped else []
        return "; ".join(parts)


def load_records(
    data: Any,
    tokenizer: Any,
    max_length: int = 1024,
    *,
    long_records: str = "truncate",
    num_proc: int | None = None,
    name: str = "data",
) -> LoadedRecords:
    """Tokenise records, from a file or a data set, to `input_ids` and `labels`.

    The shapes of a record are those of `adakd_kernels.trainer.records`. Records that have `input_ids` already go
    through as they are. What was tokenised once is read from the cache of `datasets` the next time, while file,
    tokenizer and options are the same.

    Args:
        data: a path (JSON lines, JSON, Parquet, CSV, or a folder that `save_to_disk` made), a `datasets.Dataset`, a
            list of records, a data set of torch, or a stream: a `datasets.IterableDataset`, or one of torch, which is
            tokenised as it is read.
        tokenizer: of both models; may be None where the records are tokenised.
        max_length: tokens of a record at most.
        long_records: what happens to a record that is longer. "truncate" cuts its end off, and leaves out a record that
            has nothing left to learn; "drop" leaves it out; "refuse" raises an error.
        num_proc: processes that tokenise; None: this one. A stream is tokenised where it is read.
        name: what messages call data without a path.

    Raises:
        DataError: data that cannot be read or holds no record, a record that cannot be trained on, or one that is
            too long and refused; the message names file, line or row, and field.
        TypeError: `data` is something else, or several splits.
    """
    if long_records not in LONG_RECORDS:
        raise ValueError(f"long_records must be one of {', '.join(LONG_RECORDS)}, got {long_records!r}")
    make = _Tokenize(tokenizer, max_length, long_records)
    if isinstance(data, (str, Path)):
        return _from_file(Path(data), make, num_proc)
    if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise TypeError(f"{name} must be one data set, got the splits {', '.join(data)}: choose one, {name}[...]")
    if isinstance(data, datasets.Dataset):
        return _from_table(data, make.at(f"{name}[", "]"), name, num_proc)
    if isinstance(data, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
        return _from_stream(data, make.at(f"{name}, row ", first=1), name)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, (Mapping, bytes)):
        raise TypeError(
            f"{name} must be a path, a datasets.Dataset, a list of records or another data set, got "
            f"{type(data).__name__}"
        )
    _check_not_empty(data, name)
    if not isinstance(data[0], Mapping) or "input_ids" in data[0] or tokenizer is None:
        return LoadedRecords(data, name, torch.tensor([[len(data), 0, 0]]))
    texts = tuple(json.dumps(data[index], default=_plain_value) for index in range(len(data)))
    source = cached_texts(numbered, {"texts": texts}, [*texts], name)
    return _from_texts(source, make.at(f"{name}[", "]"), name, num_proc)


def load_for(args: Any, data: Any, tokenizer: Any, name: str) -> LoadedRecords:
    """`load_records` with the options of an `AdaKDConfig`; on several ranks one goes first, the others read its cache.

    Raises:
        DataError, TypeError: see `load_records`.
    """
    with args.main_process_first(desc=f"tokenizing {name}"), progress_bars(not args.disable_tqdm):
        return load_records(
            data,
            getattr(tokenizer, "tokenizer", tokenizer),
            args.max_length,
            long_records=args.long_records,
            num_proc=args.dataset_num_proc,
            name=name,
        )


def load_prompts_for(args: Any, path: str, tokenizer: Any, name: str) -> LoadedRecords:
    """Prompts and completions of a file for a student that samples; cached, and on several ranks as `load_for`.

    Returns:
        With `records` of `prompt` and `completion`, two texts or two lists of messages each.

    Raises:
        DataError: see `load_records` and `split_record`; or texts and messages in one file.
    """
    with args.main_process_first(desc=f"reading {name}"), progress_bars(not args.disable_tqdm):
        loaded = _from_file(Path(path), _Split(tokenizer, 0, "truncate"), args.dataset_num_proc)
    rows = loaded.records
    if "conversation" not in rows.column_names:
        raise DataError(
            f"{path}: holds token ids, but the prompts of a student that samples are texts or messages: give the "
            "records before they were tokenised"
        )
    kinds = rows.with_format("numpy")["conversation"][:]
    if kinds.any() and not kinds.all():
        raise DataError(f"{path}: has prompts that are texts beside prompts that are messages: give one kind")
    loaded.records = _Prompts(rows)
    return loaded


def load_references(path: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The records of a file to evaluate on, each tokenised with each of its references (`each_reference`); cached.

    Returns:
        Of each record `input_ids` and `labels`, lists with an entry for each reference, `id`, and `key`, 16 hex digits
        of what the record says. Records that were tokenised before have one entry.

    Raises:
        DataError: see `load_records`, and a record of which nothing has a label.
    """
    rows = _from_file(Path(path), _References(tokenizer, 0, "truncate"), None).records.with_format(None)
    if "key" in rows.column_names:
        return list(rows)
    if "labels" not in rows.column_names:
        raise DataError(f"{path}: has 'input_ids' but no 'labels', which say where the answer is")
    records = []
    for index, row in enumerate(rows, 1):
        one = {name: [list(row[name])] for name in ("input_ids", "labels")}
        if all(label == IGNORE_INDEX for label in row["labels"]):
            raise DataError(f"{path}, row {index}: no token has a label")
        own = row.get("id")
        records.append({**one, "id": f"{path}, row {index}" if own is None else str(own), "key": _key(one)})
    return records


def _key(record: Mapping[str, Any]) -> str:
    said = {name: value for name, value in record.items() if name != "id"}
    return sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


class _Prompts(torch.utils.data.Dataset[Any]):
    """Prompts and completions as they were before they became JSON."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: json.loads(self.rows[index][name]) for name in ("prompt", "completion")}


@contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """Whether `datasets` shows how far it is."""
    before = datasets.utils.are_progress_bars_disabled()
    if not wanted:
        datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.utils.enable_progress_bars()


@dataclass
class _Tokenize:
    """Rows to tokenised records, in this process or another.

    Attributes:
        before, after, first: around and at the least the number of a row, in what messages call it.
        counts: where a stream counts, (WORKERS, 3) in memory that processes share.
    """

    tokenizer: Any
    max_length: int
    long_records: str
    before: str = ""
    after: str = ""
    first: int = 0
    counts: Tensor | None = None
    features: ClassVar[datasets.Features] = FEATURES

    def at(self, before: str, after: str = "", first: int = 0) -> _Tokenize:
        """The same, for rows of that name."""
        return replace(self, before=before, after=after, first=first)

    def where(self, number: int) -> str:
        return f"{self.before}{number + self.first}{self.after}"

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of `Dataset.map`: columns of rows, or of their texts."""
        if batch.keys() == TEXTS.keys():
            rows = [_parsed(text, self.where(n)) for n, text in zip(batch["number"], batch["json"], strict=True)]
            indices = batch["number"]
        else:
            # A table fills up with None what other rows have.
            rows = [_without_none(dict(zip(batch, row, strict=True))) for row in zip(*batch.values(), strict=True)]
        return _columns(self.rows(rows, indices), list(self.features))

    def rows(self, rows: Sequence[Mapping[str, Any]], numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The tokenised records of some rows, without those that are dropped."""
        found = [self._record(row, self.where(number)) for row, number in zip(rows, numbers, strict=True)]
        kept = [record for record in found if record is not None]
        if self.counts is not None:
            worker = torch.utils.data.get_worker_info()
            counts = (len(found), sum(record["truncated"] for record in kept), len(found) - len(kept))
            self.counts[worker.id % WORKERS if worker else 0] += torch.tensor(counts)
        return kept

    def _record(self, row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        if "input_ids" in row:
            raise DataError(f"{where}: has 'input_ids', which the first record has not: tokenise all records or none")
        try:
            ids, labels = tokenize_record(self.tokenizer, row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        limit, too_long = self.max_length, len(ids) > self.max_length
        if too_long and self.long_records == "refuse":
            raise DataError(
                f"{where}: has {len(ids)} tokens, more than max_length={limit}: raise it, or set long_records to "
                "'truncate' or 'drop'"
            )
        # Nothing predicts the first token.
        nothing_left = all(label == IGNORE_INDEX for label in labels[1:limit])
        if nothing_left or (too_long and self.long_records == "drop"):
            return None
        own = row.get("id")
        return {
            "input_ids": np.asarray(ids[:limit], dtype=np.int32),
            "labels": np.asarray(labels[:limit], dtype=np.int32),
            "id": where if own is None else str(own),
            "truncated": too_long,
        }


class _Split(_Tokenize):
    """Rows to prompts and completions, likewise."""

    features = PROMPTS

    def _record(self, row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        try:
            prompt, completion = split_record(self.tokenizer, row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        texts = {"prompt": json.dumps(prompt), "completion": json.dumps(completion)}
        return {**texts, "conversation": isinstance(prompt, list)}


class _References(_Tokenize):
    """Rows to records with an entry for each reference, likewise."""

    features = REFERENCES

    def _record(self, row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        try:
            pairs = [tokenize_record(self.tokenizer, record) for record in each_reference(row)]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        own = row.get("id")
        return {
            "input_ids": [ids for ids, _ in pairs],
            "labels": [labels for _, labels in pairs],
            "id": where if own is None else str(own),
            "key": _key(row),
        }


@dataclass
class _Check:
    """Tokenised rows of a JSON file, checked and otherwise as they are."""

    where: Callable[[int], str]
    names: list[str]  # fields of the first record

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of `Dataset.map`, of texts."""
        records = []
        for number, text in zip(batch["number"], batch["json"], strict=True):
            where = self.where(number)
            record = _parsed(text, where)
            for name in ("input_ids", "labels"):
                values = record.get(name)
                if not isinstance(values, list) or not values or not all(type(value) is int for value in values):
                    raise DataError(f"{where}: field {name!r} must be a list of whole numbers, got {values!r:.60}")
            if len(record["labels"]) != len(record["input_ids"]):
                raise DataError(
                    f"{where}: 'input_ids' and 'labels' must have one length, got {len(record['input_ids'])} and "
                    f"{len(record['labels'])}"
                )
            for name in record.keys() - set(self.names):
                raise DataError(f"{where}: field {name!r} is not in the first record: give it to all or none")
            own = record.get("id")
            records.append({**record, "id": where if own is None else str(own)})
        return _columns(records, [*self.names, *(["id"] if "id" not in self.names else [])])


def _columns(records: list[dict[str, Any]], names: list[str]) -> dict[str, list[Any]]:
    return {name: [record.get(name) for record in records] for name in names}


class StreamOf(torch.utils.data.IterableDataset[Any]):
    """A stream of torch whose rows go through a function, `size` of them at a time; else it is the stream itself."""

    def __init__(self, source: Any, function: Callable[[list[Any], list[int]], list[Any]], size: int = 1) -> None:
        self.source, self.function, self.size = source, function, size

    def __iter__(self) -> Iterator[Any]:
        rows: list[Any] = []
        number = -1
        for number, row in enumerate(self.source):
            rows.append(row)
            if len(rows) == self.size:
                yield from self.function(rows, list(range(number + 1 - len(rows), number + 1)))
                rows = []
        if rows:
            yield from self.function(rows, list(range(number + 1 - len(rows), number + 1)))

    def __getattr__(self, name: str) -> Any:
        if name == "source" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.source, name)  # such as set_epoch


def _from_file(path: Path, make: _Tokenize, num_proc: int | None) -> LoadedRecords:
    name = str(path)
    try:
        if path.is_dir():
            return _from_table(saved_table(path), make.at(f"{name}, row ", first=1), name, num_proc)
        with path.open("rb") as file:
            begins_with = next((line.strip()[:1] for line in file if line.strip()), b"")
        state = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    if path.suffix.lower() == ".parquet":
        # Escaped, because `datasets` takes a path for a pattern.
        table = read_table(name, datasets.load_dataset, "parquet", data_files=glob.escape(name), split="train")
        return _from_table(table, make.at(f"{name}, row ", first=1), name, num_proc)
    # All other files become texts in JSON, parsed a record at a time: no type is guessed, and the line is known.
    if path.suffix.lower() == ".csv":
        return _from_texts(cached_texts(csv_rows, {"path": path}, state, name), make.at(f"{name}:"), name, num_proc)
    if begins_with == b"[":
        source = cached_texts(json_array, {"path": path}, state, name)
        return _from_texts(source, make.at(f"{name}, row "), name, num_proc)
    return _from_texts(cached_texts(json_lines, {"path": path}, state, name), make.at(f"{name}:"), name, num_proc)


def _from_table(source: Any, make: _Tokenize, name: str, num_proc: int | None) -> LoadedRecords:
    """Records of a `datasets.Dataset`."""
    _check_not_empty(source, name)
    if "input_ids" in source.column_names:
        return LoadedRecords(source, name, torch.tensor([[len(source), 0, 0]]))
    return _tokenized(source.with_format(None), make, make.features, name, num_proc)


def _from_texts(source: Any, make: _Tokenize, name: str, num_proc: int | None) -> LoadedRecords:
    """Records of texts in JSON; the first one says whether they are tokenised."""
    try:
        first = _parsed(source[0]["json"], "")
    except DataError:
        first = {}
    if "input_ids" in first:
        return _tokenized(source, _Check(make.where, list(first)), None, name, num_proc)
    return _tokenized(source, make, make.features, name, num_proc)


def _from_stream(source: Any, make: _Tokenize, name: str) -> LoadedRecords:
    """Records of a stream, tokenised as they are read."""
    columns = getattr(source, "column_names", None)
    if columns is None:
        if make.tokenizer is None or isinstance(source, StreamOf):
            return LoadedRecords(source, name)
        columns = list(next(iter(source), {}))
    if "input_ids" in columns:
        return LoadedRecords(source, name)
    _check_tokenizer(make, name)
    make.counts = torch.zeros(WORKERS, 3, dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call]
    if isinstance(source, datasets.IterableDataset):
        # The processes that read the stream add to the same counts, in memory that they share.
        options = {"batched": True, "batch_size": STREAM_BATCH, "with_indices": True, "remove_columns": columns}
        records = source.map(make, features=FEATURES, **options).remove_columns("truncated")
    else:
        records = StreamOf(source, make.rows)
    return LoadedRecords(records, name, make.counts)


def _check_not_empty(data: Any, name: str) -> None:
    if not len(data):
        raise DataError(f"{name}: nothing to train on: it has no records")


def _check_tokenizer(make: _Tokenize, name: str) -> None:
    if make.tokenizer is None:
        raise DataError(f"{name} has no 'input_ids': give the tokenizer as processing_class, or tokenised records")


def _tokenized(source: Any, function: Any, features: Any, name: str, num_proc: int | None) -> LoadedRecords:
    """All rows of a table through a function, counted."""
    key: list[Any] = [name]
    if isinstance(function, _Tokenize):
        _check_tokenizer(function, name)
        key += [_state(function.tokenizer), function.max_length, function.long_records, function.before]
    records = cached_map(
        source, function, key, name, with_indices=True, features=features, num_proc=num_proc, desc=f"Tokenizing {name}"
    )
    read, kept, truncated = len(source), len(records), 0
    if not kept:
        raise DataError(
            f"{name}: nothing to train on: none of its {read} records has anything to learn within "
            f"max_length={function.max_length}; raise it"
        )
    if "truncated" in records.column_names:
        truncated = int(np.sum(records.with_format("numpy")["truncated"][:]))
        records = records.remove_columns("truncated")
    return LoadedRecords(records, name, torch.tensor([[read, truncated, read - kept]]))


def _state(tokenizer: Any) -> str:
    """What the ids depend on; not padding and truncation, which a tokenizer changes as it is used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is None:
            return str(Hasher.hash(tokenizer))
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
        return repr([state, tokenizer.chat_template, tokenizer.special_tokens_map])
    except Exception:  # it cannot be pickled, so nothing is read from the cache
        return uuid.uuid4().hex


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


def _plain_value(value: Any) -> Any:
    """Of an array or a tensor, what JSON can hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _without_none(value: Any) -> Any:
    """A value of a table without the fields that are None: those that other rows have, and this one has not."""
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
