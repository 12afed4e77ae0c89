"""The page of a report, and the files beside it."""

from __future__ import annotations

import base64
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .figures import THEMES, Panel, draw, panels
from .runs import Run, first_and_last, read_runs

__all__ = ["write_report"]

ROWS = 40
"""Steps in the table under a picture at most."""
SHADES = {
    "light": ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#0c2c84"),
    "dark": ("#39215f", "#414487", "#355f8d", "#2a788e", "#21918c", "#44bf70", "#9bd93c", "#fde725"),
}
"""Colours of the classes of difficulty, from easy to hard: ColorBrewer's YlGnBu and matplotlib's viridis. Easy tokens
are near the ground in each theme. The lightness goes one way, so that any colour vision sees the order."""


JOINERS = "\u200c\u200d"
"""They say how the characters on both sides are joined, as in Persian words and in emoji of several persons."""
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Categories of characters without width."""


@dataclass(frozen=True)
class Scale:
    """How a measure of difficulty is divided into the classes of `SHADES`: evenly by its square root, up to `most`."""

    measure: str
    most: float

    def shade(self, difficulty: float | None) -> int:
        """The class of a difficulty; one that is not finite is among the hardest."""
        classes = len(SHADES["light"])
        if difficulty is None:
            return classes - 1
        return min(classes - 1, int(classes * math.sqrt(max(0.0, difficulty) / self.most)))

    @property
    def edges(self) -> list[tuple[float, float]]:
        """From where to where each class goes."""
        bounds = [self.most * (edge / len(SHADES["light"])) ** 2 for edge in range(len(SHADES["light"]) + 1)]
        return list(pairwise(bounds))


def write_report(folders: Sequence[str | Path], output_dir: str | Path) -> list[Run]:
    """Write `report.html` and a PNG for each kind of curve into `output_dir`; files of these names are replaced.

    Args:
        folders: the `output_dir` of each run.
        output_dir: made if it is not there.

    Returns:
        The runs; their `missing` is what the page says that it cannot show.

    Raises:
        ValueError: a folder that holds no run.
        OSError: the files cannot be written.
    """
    runs = read_runs(folders)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    names = [run.name for run in runs]
    pictures = []
    for panel in panels(runs):
        drawn = {name: draw(panel, names, theme) for name, theme in THEMES.items()}
        (output / f"{panel.name}.png").write_bytes(drawn["light"])
        urls = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in drawn.items()}
        pictures.append({"panel": panel, "urls": urls, "table": _table(panel, names)})
    scales = _scales(runs)
    page = _environment().from_string(_asset("page.html")).render(
        runs=runs,
        pictures=pictures,
        summary=_summary(runs),
        records=_records(runs),
        scales=list(scales.values()),
        shade=lambda line, token: scales[line["measure"]].shade(token["difficulty"]),
        shades=SHADES,
        ink=_ink,
        style=_asset("page.css"),
        script=_asset("page.js"),
    )  # fmt: skip
    (output / "report.html").write_text(page, encoding="utf-8", errors="replace")
    return runs


def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    """Everything that a run gives is escaped, wherever it stands in the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["plain"] = _plain
    environment.filters["visible"] = _visible
    environment.filters["rough"] = lambda value: f"{value:.2g}"
    return environment


def _number(value: Any) -> str:
    """Four digits of a number; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else "NaN" if math.isnan(value) else f"{value:.4g}"


def _plain(text: str) -> str:
    """A text with the code points of what draws nothing, or turns round what comes after it, in their place.

    Those are the characters of category C (control, format, not assigned), and the separators of lines and paragraphs.
    Line breaks, tabs, and joiners between other characters stay.
    """
    kept = "\n\t" + (JOINERS if text.strip(JOINERS) else "")
    return "".join(
        f"[U+{ord(character):04X}]"
        if character not in kept and unicodedata.category(character) in UNSEEN
        else character
        for character in text.replace("\r\n", "\n")
    )


def _visible(text: str) -> str:
    """A token's text with something to see, and to point at: also of a line break, or of a part of a character."""
    if text and all(unicodedata.category(character).startswith("M") for character in text):
        text = f"◌{text}"  # a mark has no width of its own
    return _plain(text).replace("\n", "↵\n") or "▯"


def _ink(ground: str) -> str:
    """Black or white, what is better read on a colour."""
    red, green, blue = (int(ground[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # The contrast of white is 1.05 / (L + 0.05), that of black (L + 0.05) / 0.05.
    return "#ffffff" if (luminance + 0.05) ** 2 < 1.05 * 0.05 else "#000000"


def _table(panel: Panel, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of a picture: titles of columns, and rows of evenly spaced steps, the last one among them."""
    columns: list[tuple[str, dict[int, float]]] = []
    for curve in panel.curves:
        run = f"{names[curve.run]}: " if len(names) > 1 else ""
        parts = {curve.name: curve.values}
        if curve.low is not None and curve.high is not None:
            parts = {"10 %": curve.low, "median": curve.values, "90 %": curve.high}
        columns += [(run + name, dict(zip(curve.steps, values, strict=True))) for name, values in parts.items()]
    steps = sorted({step for _, values in columns for step in values})
    every = -(-len(steps) // ROWS) or 1
    return {
        "titles": ["step", *(title for title, _ in columns)],
        "rows": [[step, *(values.get(step) for _, values in columns)] for step in steps[::-1][::every][::-1]],
    }


def _summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of a table with a column for each run: what changed from the first to the last value."""
    kinds = [("training", "loss", "training loss"), ("training", "focus_ratio", "share of selected tokens")]
    kinds += [("training", f"{name}_p50", f"{name}, median") for name in ("difficulty", "temperature")]
    for prefix in dict.fromkeys(prefix for run in runs for prefix in run.sets):
        of = prefix.removeprefix("eval_").removesuffix("_")
        for key, title in (
            ("forward_kl", "forward KL"),
            ("reverse_kl", "reverse KL"),
            ("cross_entropy", "cross-entropy"),
            ("agreement", "agreement"),
        ):
            kinds.append(("held_out", prefix + key, f"held out{f' ({of})' if of else ''}: {title}"))
    rows = [("steps", [_number(max((line["step"] for line in run.training), default=None)) for run in runs])]
    for lines, key, title in kinds:
        ends = [first_and_last(getattr(run, lines), key) for run in runs]
        counts = [sum(key in line for line in getattr(run, lines)) for run in runs]
        cells = [
            "–" if end is None else _number(end[1]) if count == 1 else f"{_number(end[0])} → {_number(end[1])}"
            for end, count in zip(ends, counts, strict=True)
        ]
        rows.append((title, cells))
    for key, title in (("tokens_per_second", "tokens per second, median"), ("peak_memory_gib", "peak memory (GiB)")):
        values = [sorted(line[key] for line in run.training if key in line) for run in runs]
        chosen = [(each[len(each) // 2] if "median" in title else each[-1]) if each else None for each in values]
        rows.append((title, [_number(value) for value in chosen]))
    return [(title, cells) for title, cells in rows if set(cells) != {"–"}]


def _scales(runs: Sequence[Run]) -> dict[str, Scale]:
    """A scale for each measure of difficulty: up to 1 where that is the largest, else up to the largest shown."""
    largest: dict[str, float] = {}
    for run in runs:
        for line in run.tokens:
            shown = [token["difficulty"] for token in line["tokens"] if token.get("difficulty") is not None]
            largest[line["measure"]] = max([largest.get(line["measure"], 0.0), *shown])
    return {name: Scale(name, 1.0 if name == "hellinger" else most or 1.0) for name, most in largest.items()}


def _records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The records, each with what the runs measured of it: equal texts of several runs stand side by side.

    Of equal texts in one run, the first stands beside the first of another run, and so on.
    """
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        last = max((line["step"] for line in run.tokens), default=0)
        copies: Counter[tuple[Any, ...]] = Counter()
        for line in run.tokens:
            texts = tuple((token["text"], "rank" in token) for token in line["tokens"])
            copies[line["step"], texts] += 1
            record = records.setdefault(
                (copies[line["step"], texts], texts), {"name": line["record"], "source": line["source"], "shown": []}
            )
            labelled = [token for token in line["tokens"] if "rank" in token]
            record["shown"].append(
                {
                    "run": run.name,
                    "line": line,
                    "when": "before training" if line["step"] == 0 else "latest" if line["step"] == last else "",
                    "labelled": len(labelled),
                    "selected": sum(token["selected"] for token in labelled),
                }
            )
    return list(records.values())
