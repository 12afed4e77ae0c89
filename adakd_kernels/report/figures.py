"""The curves of a report: what is drawn, and how matplotlib draws it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .runs import Run, series

__all__ = ["THEMES", "Curve", "Panel", "draw", "panels"]

SIZE = (4.0, 2.8)
"""Inches."""
DPI = 240
"""Twice what a page shows, so that it is sharp on dense screens and in print."""
DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")


@dataclass(frozen=True)
class Theme:
    """Colours of a picture: of its ground, its text and grid, and of the runs in turn."""

    ground: str
    ink: str
    grid: str
    runs: tuple[str, ...]


# The runs' colours are those of Okabe and Ito, which people with any colour vision tell apart; on dark ground without
# the darkest. Marks and colours are in turn, one more mark than colours, so that 42 runs look unlike.
THEMES = {
    "light": Theme("#ffffff", "#24292f", "#d8dee4", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#000000")),
    "dark": Theme("#1c2128", "#d8dee6", "#3d444d", ("#56b4e9", "#e69f00", "#2fc79a", "#e295c2", "#f0e442", "#ffffff")),
}
MARKS = ("o", "s", "^", "D", "v", "P", "X")
QUANTILES = "Line: median. Band: from the 10\N{NO-BREAK SPACE}% to the 90\N{NO-BREAK SPACE}% quantile."
FEW = 8
"""Marks on a curve, about: enough to tell the runs apart, and to see a curve of one point."""


@dataclass
class Curve:
    """A quantity of a run over the steps.

    Attributes:
        run: index of the run.
        name: of the quantity, for the legend and the table.
        steps, values: one for each point.
        dash: index of `DASHES`.
        low, high: the edges of a band, or None.
    """

    run: int
    name: str
    steps: list[int]
    values: list[float]
    dash: int = 0
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass
class Panel:
    """A picture.

    Attributes:
        name: of its file.
        title, unit: the heading, and what the vertical axis measures.
        what: how it is read.
        curves: of all runs that have the quantity.
        bottom, top: limits of the vertical axis, where they are fixed.
    """

    name: str
    title: str
    unit: str
    what: str
    curves: list[Curve] = field(default_factory=list)
    bottom: float | None = None
    top: float | None = None


def panels(runs: Sequence[Run]) -> list[Panel]:
    """The pictures for which at least one run has numbers."""
    found = [
        Panel(
            "loss",
            "Training loss",
            "nats per token",
            "Mean over the selected tokens, each at its own temperature and times its square. It compares steps of a "
            "run, and not runs with other options. The share follows the average: it changes where the average leaves "
            "the reference by more than epsilon.",
        ),
        Panel(
            "share",
            "Share of selected tokens",
            "share r",
            "The part of the valid tokens, the hardest of them, over which the loss is taken.",
            bottom=0.0,
            top=1.05,
        ),
        Panel(
            "difficulty",
            "Difficulty of the valid tokens",
            "difficulty",
            QUANTILES,
            bottom=0.0,
        ),
        Panel(
            "temperature",
            "Temperature of the selected tokens",
            "temperature τ",
            f"{QUANTILES} Hard tokens have low temperatures.",
        ),
        Panel(
            "throughput",
            "Throughput",
            "tokens per second",
            "Valid tokens of all processes, without the time of evaluations and checkpoints.",
            bottom=0.0,
        ),
        Panel(
            "memory",
            "Peak memory",
            "GiB",
            "What the process that has had most has had at most so far: of the device, in tensors; on a CPU, in all.",
            bottom=0.0,
        ),
    ]
    by_name = {panel.name: panel for panel in found}
    for index, run in enumerate(runs):
        for panel, names in (
            ("loss", {"loss": "loss", "loss_ema": "average", "loss_reference": "reference"}),
            ("share", {"focus_ratio": "share"}),
            ("throughput", {"tokens_per_second": "tokens per second"}),
            ("memory", {"peak_memory_gib": "GiB"}),
        ):
            for dash, (key, name) in enumerate(names.items()):
                lines = [line for line in run.training if key != "loss_reference" or line.get(key)]  # 0: not set yet
                _add(by_name[panel], Curve(index, name, *series(lines, key), dash))
        for name in ("difficulty", "temperature"):
            low, middle, high = (series(run.training, f"{name}_{p}") for p in ("p10", "p50", "p90"))
            if low[0] == middle[0] == high[0]:
                _add(by_name[name], Curve(index, "median", *middle, low=low[1], high=high[1]))
    found[4:4] = _held_out(runs)
    return [panel for panel in found if panel.curves]


def _held_out(runs: Sequence[Run]) -> list[Panel]:
    """A picture of the KLs for each evaluation set."""
    found = []
    for number, prefix in enumerate(dict.fromkeys(prefix for run in runs for prefix in run.sets)):
        name = prefix.removeprefix("eval_").removesuffix("_")
        panel = Panel(
            f"held_out_{number}" if number else "held_out",
            f"KL divergences on held-out records{f': {name}' if name else ''}",
            "nats per token",
            "Means over all tokens with a label at temperature 1: they compare runs with any options.",
            bottom=0.0,
        )
        for index, run in enumerate(runs):
            for dash, key in enumerate(("forward_kl", "reverse_kl")):
                _add(panel, Curve(index, key.replace("_kl", " KL"), *series(run.held_out, prefix + key), dash))
        found.append(panel)
    return found


def _add(panel: Panel, curve: Curve) -> None:
    if any(map(math.isfinite, curve.values)):
        panel.curves.append(curve)


def draw(panel: Panel, names: Sequence[str], theme: Theme) -> bytes:
    """The picture as PNG; `names` are those of all runs."""
    with _style(theme):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for curve in panel.curves:
            color = theme.runs[curve.run % len(theme.runs)]
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.22, linewidth=0)
            axes.plot(
                curve.steps,
                curve.values,
                color=color,
                linestyle=DASHES[curve.dash],
                linewidth=1.5,
                marker=MARKS[curve.run % len(MARKS)] if len(names) > 1 or len(curve.steps) <= FEW else "",
                markersize=4.0,
                markevery=max(1, len(curve.steps) // FEW),
            )
        axes.set(xlabel="step", ylabel=panel.unit, ylim=(panel.bottom, panel.top))
        axes.margins(x=0.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        handles = _legend(panel, names, theme)
        if len(handles) > 1:
            figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _legend(panel: Panel, names: Sequence[str], theme: Theme) -> list[Any]:
    """A line for each quantity and, of several runs, a patch of colour with the mark for each."""
    handles: list[Any] = []
    runs = dict.fromkeys(curve.run for curve in panel.curves)
    if len(names) > 1:
        for run in runs:
            color = theme.runs[run % len(theme.runs)]
            # A label with an underscore in front is left out, and dollars would be taken for mathematics.
            name = names[run].replace("$", r"\$")
            name = f" {name}" if name.startswith("_") else name
            handles.append(
                Line2D([], [], color=color, marker=MARKS[run % len(MARKS)], markersize=4.0, linestyle="-", label=name)
            )
    quantities = {curve.name: curve.dash for curve in panel.curves}
    color = theme.ink if len(names) > 1 else theme.runs[0]
    if len(quantities) > 1:
        handles += [
            Line2D([], [], color=color, linestyle=DASHES[dash], label=name) for name, dash in quantities.items()
        ]
    if any(curve.low is not None for curve in panel.curves):
        if len(quantities) == 1:
            handles.append(Line2D([], [], color=color, label="median"))
        handles.append(Patch(color=color, alpha=0.22, linewidth=0, label="10 % to 90 %"))
    return handles


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    """matplotlib's own settings with a theme's colours, whatever the user's are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "figure.facecolor": theme.ground,
                "axes.facecolor": theme.ground,
                "grid.color": theme.grid,
                "grid.linewidth": 0.6,
                "font.size": 9,
                "legend.fontsize": 8,
                **{
                    name: theme.ink
                    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
                },
            }
        )
        yield
