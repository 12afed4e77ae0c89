"""Which checkpoint a run resumes from."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["last_checkpoint"]


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end, or None.

    `Trainer` writes trainer_state.json last. A folder where this file is missing or cut off belongs to a run that was
    killed while it saved.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    for folder in sorted((path for path in steps if steps[path].isdigit()), key=lambda path: -int(steps[path])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None
