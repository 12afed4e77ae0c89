"""What a student is evaluated on: prompts to answer, and references to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..trainer.loading import load_references
from ..trainer.records import IGNORE_INDEX

__all__ = ["Prompt", "Sequence_", "fingerprint", "load_prompts", "set_names"]

Sequence_ = tuple[list[int], list[int]]
"""Token ids, and as many labels, −100 where a token is only read."""


@dataclass(frozen=True)
class Prompt:
    """A record of a set.

    Attributes:
        id: its own, or its file and line.
        key: 16 hex digits of what the record says, and the number of its copy in the set; pairs two evaluations.
        prompt_ids: the tokens before the answer, as in training; none where a record has no prompt.
        references: the texts of its answers.
        sequences: the prompt with each of the answers.
    """

    id: str
    key: str
    prompt_ids: list[int]
    references: list[str]
    sequences: list[Sequence_]


def load_prompts(path: str | Path, tokenizer: Any, max_records: int | None = None) -> list[Prompt]:
    """The records of a file, in any shape that can be trained on and with one reference or several.

    Args:
        path: JSON lines, JSON, Parquet, CSV, or a folder that `save_to_disk` made.
        tokenizer: of the models.
        max_records: take the first ones only.

    Raises:
        DataError: what cannot be read or used; the message names file, line and field.
    """
    copies: Counter[str] = Counter()
    prompts = []
    for row in load_references(str(path), tokenizer)[:max_records]:
        copies[row["key"]] += 1
        key = f"{row['key']}-{copies[row['key']]}"
        starts, references, sequences = [], [], []
        for number, (ids, labels) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            start, end = _answer(labels)
            starts.append(start)
            references.append(tokenizer.decode(ids[start:end], skip_special_tokens=True).strip())
            # The earlier answers of a conversation stand in each of its sequences, and are read once.
            sequences.append((ids, labels if number == 0 else [IGNORE_INDEX] * start + labels[start:]))
        prompts.append(Prompt(row["id"], key, row["input_ids"][0][: min(starts)], references, sequences))
    return prompts


def _answer(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last run of labelled tokens begins and ends."""
    end = max(index for index, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return start, end


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """16 hex digits of the token ids of a set."""
    content = repr([(prompt.key, prompt.prompt_ids, prompt.sequences) for prompt in prompts])
    return sha256(content.encode()).hexdigest()[:16]


def set_names(paths: Sequence[str]) -> dict[str, str]:
    """The paths of the sets by name: the one given with it as NAME=PATH, or else its own.

    That is the file's name without its ending, with the names of folders before it where several files have one name.

    Raises:
        ValueError: two sets of one name.
    """
    given = [path.partition("=") if "=" in path and not Path(path).exists() else ("", "=", path) for path in paths]
    parts = [Path(path).resolve().with_suffix("").parts[1:] for _, _, path in given]
    names: list[str] = []
    for (name, _, path), own in zip(given, parts, strict=True):
        depth = 1
        while depth < len(own) and any(other[-depth:] == own[-depth:] for other in parts if other != own):
            depth += 1
        name = name or "-".join(own[-depth:])
        if name in names:
            raise ValueError(f"two sets are called {name}: give one of them another name, as NAME={path}")
        if not name or "/" in name:
            raise ValueError(f"a set cannot be called {name!r}, which is no name of a file: give NAME=PATH")
        names.append(name)
    return dict(zip(names, (path for _, _, path in given), strict=True))
