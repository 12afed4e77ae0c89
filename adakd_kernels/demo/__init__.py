"""The demo: distil SmolLM2-135M-Instruct into itself with fewer layers, with and without AdaKD, and report."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands import CommandError, CommandParser

if TYPE_CHECKING:
    from .config import DemoConfig

__all__ = ["main"]

NEEDED = ("transformers", "accelerate", "datasets", "tqdm", "matplotlib", "rouge_score")


def main(argv: Sequence[str]) -> int:
    """`adakd demo`: run the demo with the options in `argv`.

    Returns:
        0.

    Raises:
        CommandError: an unknown option, a missing package or a missing file; the message is one line with the cure.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"the demo needs {', '.join(missing)}: pip install 'adakd-kernels[demo]'")
    config = parse(argv)
    from .memory import keep_freed_memory
    from .pipeline import run_demo

    keep_freed_memory()
    run_demo(config)
    return 0


def parse(argv: Sequence[str]) -> DemoConfig:
    """The configuration that the options in `argv` ask for.

    Raises:
        CommandError: an unknown option, or a value of the wrong type.
    """
    from .config import DemoConfig

    parser = CommandParser(
        prog="adakd demo",
        description="Distil a small language model on this machine, with and without AdaKD, and report what it learnt.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--tiny", metavar="DIR", type=Path, help="run on a tiny random model, everything in DIR: a check in seconds"
    )
    for option in fields(DemoConfig):
        default: Any = option.default if option.default is not MISSING else None
        kind = next((kind for kind in (int, float, Path) if kind.__name__ in str(option.type)), str)
        shown = option.metadata["help"] + (f" (default: {default})" if default is not None else "")
        parser.add_argument("--" + option.name.replace("_", "-"), type=kind, metavar=kind.__name__.upper(), help=shown)
    given = vars(parser.parse_args(argv))
    tiny: Path | None = given.pop("tiny", None)
    if tiny is None:
        return DemoConfig(**given)
    from .tiny import tiny_config

    return tiny_config(tiny, **given)
