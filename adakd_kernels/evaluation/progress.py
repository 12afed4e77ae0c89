"""Bars with the time that is left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

__all__ = ["bar"]

SECONDS_BETWEEN_LINES = 15.0
"""How often a bar is written where it cannot be redrawn, as in a log file."""


def bar(total: int, label: str, unit: str, *, done: int = 0) -> Any:
    """A tqdm bar over `total` units, of which `done` were there before."""
    interval = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    return tqdm(total=total, desc=label, unit=unit, initial=done, mininterval=interval, dynamic_ncols=True)
