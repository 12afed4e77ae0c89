"""The subcommands of `adakd`, one module each, imported when called."""

from __future__ import annotations

__all__ = ["CommandError"]


class CommandError(Exception):
    """What the user can put right: printed as one line on stderr, with exit code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())
