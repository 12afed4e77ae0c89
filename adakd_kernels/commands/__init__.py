"""The subcommands of `adakd`, one module each, imported when called."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["CommandError", "CommandParser"]


class CommandError(Exception):
    """What the user can put right: printed as one line on stderr, with exit code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class CommandParser(argparse.ArgumentParser):
    """Raises a `CommandError` for options that it does not understand, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)
