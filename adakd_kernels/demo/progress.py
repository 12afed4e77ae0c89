"""What the user sees while the demo works: the heading and time of each stage, and bars with the time that is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 15.0
"""How often a bar is written where it cannot be redrawn, as in a log file."""


def bar(total: int, label: str, unit: str, *, done: int = 0) -> Any:
    """A tqdm bar over `total` units, of which `done` were there before."""
    interval = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    return tqdm(total=total, desc=label, unit=unit, initial=done, mininterval=interval, dynamic_ncols=True)


@contextlib.contextmanager
def stage(name: str, title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print `title`, run the body, and note under `name` in `seconds` how long it took."""
    print(f"\n[{title}]", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    print(f"{seconds[name]:.0f} s", flush=True)
