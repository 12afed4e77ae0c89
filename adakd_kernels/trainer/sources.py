"""The files that people have, as tables of `datasets`: read once, and from its cache afterwards.

JSON and CSV become tables of texts in JSON, which are parsed a record at a time: no type is guessed, and the line of a
record is known.
"""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
from pyarrow.lib import ArrowException

from .records import DataError

__all__ = ["TEXTS", "cached_map", "cached_texts", "csv_rows", "fingerprint_of", "json_array", "json_lines", "numbered",
           "read_table", "saved_table"]  # fmt: skip

TEXTS = datasets.Features(number=datasets.Value("int64"), json=datasets.Value("large_string"))
"""Of records that are not parsed yet: their line or index, and their text."""


def saved_table(path: Path) -> datasets.Dataset:
    """The data set that `save_to_disk` wrote, or the only split of several."""
    found: Any = read_table(str(path), datasets.load_from_disk, str(path))
    if not isinstance(found, datasets.DatasetDict):
        return found
    if len(found) > 1:
        raise DataError(
            f"{path}: holds the splits {', '.join(found)}: give the folder of one, {path / next(iter(found))}"
        )
    return next(iter(found.values()))


def read_table(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a function of `datasets` reads; a `DataError` inside its own errors comes out."""
    try:
        return function(*args, **options)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, DataError):
                raise cause from None
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise cause from None
            last, cause = cause, cause.__cause__ or cause.__context__
        raise DataError(f"{name}: cannot be read: {type(last).__name__}: {last}") from error


def cached_map(source: Any, function: Any, key: list[Any], name: str, **options: Any) -> Any:
    """`Dataset.map` of whole batches, whose result is read from the cache of `datasets` the next time.

    In a folder of its own: the cache of a data set in memory would be memory, and that of a folder the folder itself.

    Args:
        source: a `datasets.Dataset`.
        function: from batch, and indices, to batch.
        key: what the result depends on besides the source and the code.
        name: what messages call the data.
        **options: others of `Dataset.map`.
    """
    fingerprint = fingerprint_of([source._fingerprint, type(function).__name__, *key])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "adakd"
    folder.mkdir(parents=True, exist_ok=True)
    num_proc = options.pop("num_proc", None) or 1
    try:
        return source.map(
            function,
            batched=True,
            remove_columns=source.column_names,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            num_proc=min(num_proc, len(source)) if num_proc > 1 else None,
            **options,
        )
    except ArrowException as error:
        raise DataError(f"{name}: cannot be tokenised: its records differ in the type of a field: {error}") from error


def cached_texts(rows: Callable[..., Any], arguments: dict[str, Any], state: list[Any], name: str) -> Any:
    """The texts that a generator gives, from the cache of `datasets` while `state`, which makes them, is the same."""
    fingerprint = fingerprint_of([rows.__name__, *state])
    return read_table(
        name,
        datasets.Dataset.from_generator,
        _one_at_least,
        features=TEXTS,
        gen_kwargs={"rows": rows, "name": name, **arguments},
        fingerprint=fingerprint,
    )


def _one_at_least(rows: Callable[..., Any], name: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """What `rows` gives; `datasets` has a message of its own for nothing."""
    row = None
    for row in rows(**arguments):
        yield row
    if row is None:
        raise DataError(f"{name}: nothing to train on: it has no records")


def fingerprint_of(parts: list[Any]) -> str:
    """A fingerprint of values, and of the code that makes records of them."""
    modules = ("records", "sources", "loading", "packing", "collator")
    code = [Path(__file__).with_name(f"{module}.py").read_bytes() for module in modules]
    return sha256(repr([*parts, *code]).encode()).hexdigest()[:32]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; blank ones are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
            if text.strip():
                yield {"number": number, "json": text}


def json_array(path: Path) -> Iterator[dict[str, Any]]:
    """The elements of a JSON file that is one array."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        yield {"number": number, "json": json.dumps(row)}


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file with a header, by the line on which they begin; all fields are texts."""
    csv.field_size_limit(2**31 - 1)
    number = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            fields = reader.fieldnames or ()  # reads the header
            number = reader.line_num + 1
            for row in reader:
                if None in row:
                    raise DataError(f"{path}:{number}: has more fields than the header, {len(fields)}")
                yield {"number": number, "json": json.dumps(row)}
                number = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number}: not CSV: {error}") from None


def numbered(texts: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Texts in JSON with their indices."""
    for number, text in enumerate(texts):
        yield {"number": number, "json": text}
