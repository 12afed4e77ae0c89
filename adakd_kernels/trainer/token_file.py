"""The file of a run with some records' tokens before and after training; `TokenRecords` writes it, a report reads it.

JSON lines, one for each record and measurement: first those of the beginning, then those of the last measurement. Needs
nothing but Python, so that a report can be made where transformers is not installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["TOKEN_FILE", "read_tokens", "write_tokens"]

TOKEN_FILE = "_tokens.jsonl"
"""In `output_dir`. What begins with an underscore is left out where `Trainer` pushes to the hub: this holds data."""
FIELDS = {
    "step": int, "source": str, "record": str, "measure": str, "focus_ratio": float, "of": int, "left_out": int,
    "tokens": list,
}  # fmt: skip
"""What each line has, at the least."""
NUMBERS = {"difficulty", "temperature", "rank", "selected"}
"""What each token with a label has beside its `text`; one without a label has its text alone."""


def read_tokens(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of the file in a run's folder, as `TokenRecords` describes them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that is none of such a file.
    """
    lines = []
    # Of bytes: a text's splitlines() also ends a line at U+2028 and others that JSON leaves as they are.
    for number, text in enumerate((Path(folder) / TOKEN_FILE).read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            whole = all(isinstance(line[name], kind) for name, kind in FIELDS.items())
            whole &= all(isinstance(token["text"], str) for token in line["tokens"])
            whole &= all(token.keys() >= NUMBERS for token in line["tokens"] if "rank" in token)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"line {number} is no record of tokens: {error!r}") from None
        if not whole:
            raise ValueError(f"line {number} is no record of tokens")
        lines.append(line)
    return lines


def write_tokens(folder: str | Path, lines: Sequence[dict[str, Any]]) -> None:
    """Put these lines in the place of those in the file; who is killed meanwhile leaves the former ones."""
    path = Path(folder) / TOKEN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, path)
