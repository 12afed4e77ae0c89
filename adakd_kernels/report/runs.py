"""What a run left in its folder: log lines, evaluations and tokens, and what of it is missing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..trainer.checkpoints import last_checkpoint
from ..trainer.token_file import TOKEN_FILE, read_tokens

__all__ = ["Run", "read_runs", "series"]

STATE = "trainer_state.json"
KLS = ("forward_kl", "reverse_kl")
"""How the names of an evaluation's KLs end, behind `eval_` and the name of a set where there are several."""


@dataclass
class Run:
    """A run as far as its folder tells.

    Attributes:
        name: the folder's, or as many of its last parts as tell it from the other runs.
        folder: where it lies.
        training: the log lines of the training, each with `step`.
        held_out: likewise those of the evaluations.
        tokens: the lines of its file of tokens, as `TokenRecords` writes them.
        missing: sentences on what there is not, and how to get it.
    """

    name: str
    folder: Path
    training: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def sets(self) -> list[str]:
        """The evaluation sets as prefixes of their metrics: `eval_`, or `eval_NAME_` for each of several."""
        found = [re.fullmatch(r"(eval_(?:.*_)?)loss", key) for line in self.held_out for key in line]
        return list(dict.fromkeys(match[1] for match in found if match))


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, which are the `output_dir` of a trainer.

    Raises:
        ValueError: a folder that is not there, holds nothing of a run, or is named twice.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"run {path}: no such folder; give the output_dir of a training run")
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise ValueError(f"run {paths[index]} is named twice")
    return [_read(name, path) for name, path in zip(_names(resolved), paths, strict=True)]


def series(lines: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a quantity; of a step that was logged twice, the last value. NaN is kept, as a gap."""
    values = {int(line["step"]): float(line[name]) for line in lines if isinstance(line.get(name), (int, float))}
    return list(values), list(values.values())


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as make all of them different."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the paths are different")


def _read(name: str, folder: Path) -> Run:
    run = Run(name, folder)
    state, broken = _newest_state(folder)
    try:
        run.tokens = read_tokens(folder)
        without_tokens = "holds no record"
    except FileNotFoundError:
        without_tokens = "is missing"
    except (OSError, ValueError) as error:
        without_tokens = f"cannot be read ({error})"
    if state is None and not broken and without_tokens == "is missing":
        raise ValueError(
            f"run {folder} holds neither {STATE}, nor a checkpoint with one, nor {TOKEN_FILE}: give the output_dir of "
            "a training run that has saved a checkpoint"
        )
    lines = [line for line in (state or {}).get("log_history", ()) if isinstance(line.get("step"), int)]
    run.training = [line for line in lines if "loss" in line]
    run.held_out = [line for line in lines if any(key.startswith("eval_") for key in line)]
    if state is None:
        what = f"{STATE} cannot be read ({broken})" if broken else f"There is no {STATE}"
        run.missing.append(
            f"{what}, so there are no curves. The trainer writes it with each checkpoint (save_steps), and adakd train "
            "at the end of the run as well: resume the run, or train again with a lower save_steps."
        )
    else:
        run.missing += [text for has, text in CURVES if not has(run)]
    if not run.tokens:
        run.missing.append(
            f"{TOKEN_FILE} {without_tokens}, so there are no tokens to show. AdaKDTrainer and adakd train write it, "
            "with token_records above 0 and data that have a length: train again, or resume a run that has steps left. "
            "Methods whose student samples its completions write none."
        )
    return run


def _newest_state(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The state with most steps, of the run's end or of its last checkpoint, or else why one cannot be read.

    A run that ended, and was then resumed and stopped, has its newest state in a checkpoint.
    """
    checkpoint = last_checkpoint(folder)
    found, broken = [], ""
    for place in [folder, *([Path(checkpoint)] if checkpoint else [])]:
        try:
            state = json.loads((place / STATE).read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), {**state, "log_history": list(state["log_history"])}))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            broken = f"{place / STATE}: {error}"
    return (max(found, key=lambda each: each[0])[1] if found else None), broken


def _has(*names: str) -> Callable[[Run], bool]:
    return lambda run: all(any(name in line for line in run.training) for name in names)


def _has_kls(run: Run) -> bool:
    return any(key.endswith(KLS) for line in run.held_out for key in line)


CURVES: tuple[tuple[Callable[[Run], bool], str], ...] = (
    (
        lambda run: bool(run.training),
        "There are no log lines of the training: set logging_steps lower than the number of steps.",
    ),
    (
        lambda run: not run.training or _has("focus_ratio", "difficulty_p50", "temperature_p50")(run),
        "The log lines have no share, difficulties and temperatures: a trainer without AdaKD wrote them. Those of this "
        "package log them.",
    ),
    (
        lambda run: not run.training or _has("tokens_per_second")(run),
        "The log lines have no throughput: an older version wrote them. A run with this version logs them.",
    ),
    (
        lambda run: not run.training or _has("peak_memory_gib")(run),
        "The log lines have no memory: an older version wrote them, or the device does not count it.",
    ),
    (
        lambda run: bool(run.held_out),
        "There was no evaluation: give the run an eval_file. With eval_strategy steps and eval_steps there is a curve, "
        "and with eval_on_start it begins before the first step.",
    ),
    (
        lambda run: not run.held_out or _has_kls(run),
        "The evaluations have no KLs: AdaKDTrainer measures them, but not the trainer that wrote these.",
    ),
)


def first_and_last(lines: Iterable[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """The first and the last value of a quantity that is a number, or None."""
    values = [value for value in series(lines, name)[1] if math.isfinite(value)]
    return (values[0], values[-1]) if values else None
