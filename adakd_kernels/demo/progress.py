"""What the user sees while the demo works: the heading and time of each stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def stage(name: str, title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print `title`, run the body, and note under `name` in `seconds` how long it took."""
    print(f"\n[{title}]", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    print(f"{seconds[name]:.0f} s", flush=True)
