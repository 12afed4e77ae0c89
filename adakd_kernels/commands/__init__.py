"""The subcommands of `adakd`, one module each, imported when called."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

__all__ = ["CommandError", "CommandParser", "did_you_mean", "is_disk_full"]


class CommandError(Exception):
    """Ends a command with one line on stderr, by default with exit code 2: what the user can put right."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class CommandParser(argparse.ArgumentParser):
    """Raises a `CommandError` for options that it does not understand, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        raise CommandError(message + did_you_mean(unknown[0], self._option_string_actions) if unknown else message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name that is closest to a misspelt one, or nothing if none is close."""
    close = get_close_matches(name.partition("=")[0], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk or a quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors and `torch.save` raise errors of their own, without the number of the system's error.
        if any(text in str(error) for text in ("No space left", "quota exceeded", "iostream error")):
            return True
        error = error.__cause__ or error.__context__
    return False
