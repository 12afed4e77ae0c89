"""The command line: `adakd train`, `adakd eval`, `adakd compare`, `adakd report`, `adakd demo`, `adakd doctor`.

Exit code 0 if all went well; 1 if a check failed, or a loss or measure was not finite; 2 for what the user can put
right, a full disk and a network that does not answer; 130 after Ctrl-C. Each but 0 comes with one line on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from .commands import CommandError, is_disk_full

__all__ = ["main"]

USAGE = """\
usage: adakd COMMAND [OPTIONS]

commands:
  train    distil a teacher into a student: adakd train --config run.yaml
  eval     score a model's own answers, and its distance from its teacher: adakd eval --model runs/first --data a.jsonl
  compare  what differs between evaluations on the same prompts: adakd compare FOLDER FOLDER
  report   show on one page what happened in training runs: adakd report runs/first runs/second
  demo     distil a small language model on this machine and report what it learnt
  doctor   which implementation each operator takes here, and whether it computes what it should

options:
  --help, --version

'adakd COMMAND --help' lists the options of a command.
"""


def _train(argv: list[str]) -> int:
    from .commands.train import run

    return run(argv)


def _eval(argv: list[str]) -> int:
    from .commands.eval import run

    return run(argv)


def _compare(argv: list[str]) -> int:
    from .commands.compare import run

    return run(argv)


def _report(argv: list[str]) -> int:
    from .commands.report import run

    return run(argv)


def _demo(argv: list[str]) -> int:
    from .demo import main as demo_main

    return int(demo_main(argv))


def _doctor(argv: list[str]) -> int:
    from .commands.doctor import run

    return run(argv)


NO_TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1"}
"""What keeps the libraries of a command from reporting its use to their makers, unless the user has set it."""

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "report": _report,
    "demo": _demo,
    "doctor": _doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; `argv` is the command line without the program, by default this process's.

    Returns:
        The exit code.
    """
    for variable, value in NO_TELEMETRY.items():  # the libraries read them as they are imported, with the command
        os.environ.setdefault(variable, value)
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else ""
    if name in ("", "-h", "--help"):
        print(USAGE, end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if name == "--version":
        print(f"adakd-kernels {version('adakd-kernels')}")
        return 0
    try:
        if name not in COMMANDS:
            raise CommandError(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
        return _run(COMMANDS[name], args[1:])
    except CommandError as error:
        print(f"adakd{f' {name}' if name in COMMANDS else ''}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"adakd {name}: interrupted", file=sys.stderr)
        return 130


def _run(command: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return command(argv)
    except Exception as error:
        if isinstance(error, CommandError) or not is_disk_full(error):
            raise
        raise CommandError(f"no space left on the disk: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
