"""Tables in Markdown, and how the measures are called in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["SHOWN", "Shown", "fixed", "markdown"]


class Shown(NamedTuple):
    """How a measure is shown: its title, digits behind the point, and whether it is better where it is higher."""

    title: str
    digits: int
    higher: bool | None

    def __str__(self) -> str:
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher]
        return f"{self.title}{arrow}"


SHOWN = {
    "forward_kl": Shown("forward KL (nats/token)", 3, False),
    "reverse_kl": Shown("reverse KL (nats/token)", 3, False),
    "cross_entropy": Shown("cross-entropy (nats/token)", 3, False),
    "agreement": Shown("agreement (0 to 1)", 3, True),
    "entropy": Shown("entropy (nats/token)", 3, None),
    "rouge_l": Shown("ROUGE-L (0 to 100)", 1, True),
}
"""By the name that it has in files."""


def fixed(value: float, digits: int, sign: str = "") -> str:
    """A number with so many digits behind the point, and no minus in front of zeros; with `sign` "+", a plus."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned to the left and whose others are aligned to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    padded.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
