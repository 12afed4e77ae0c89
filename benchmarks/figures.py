"""`make figures`: the pictures and tables of README and docs from the lines in `results/`.

A picture is an SVG for light pages and one for dark pages, in `docs/pictures/`. A table stands between two markers on
its page. Each carries a digest of the lines it was made from; `stale` lists those whose data has changed since, and a
test fails while there are any. `--results FOLDER` draws the lines of another folder, such as those of a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from instruments.devices import ROOT

from .frame import Record
from .quality import summary
from .workloads import Workload

RESULTS = Path(__file__).parent / "results"
PICTURES = ROOT / "docs" / "pictures"
THEMES = {
    "light": {"text": "#1f2328", "grid": "#d1d9e0", "back": "#ffffff", "ours": "#0072b2"},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "back": "#0d1117", "ours": "#56b4e9"},
}
# Okabe and Ito's colours, which colour-blind people tell apart, each with a marker of its own.
STYLE = {
    "eager": ("#999999", "s"), "eager in chunks": ("#e69f00", "D"), "torch.compile in chunks": ("#009e73", "^"),
    "liger-kernel fused": ("#cc79a7", "P"), "liger-kernel chunked": ("#cc79a7", "v"), "liger-kernel": ("#cc79a7", "P"),
    "trl": ("#d55e00", "X"), "orda-kernel": ("#b59f00", "*"),
    "ours": ("ours", "o"), "ours in place": ("ours", "."), "ours hidden": ("ours", "o"),
    "ours hidden, half kept": ("ours", "."),
}  # fmt: skip


def lines_of(benchmark: str, results: Path = RESULTS) -> list[Record]:
    path = results / f"{benchmark}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(benchmark: str, results: Path = RESULTS) -> str:
    """Of the data that a picture or table is made from."""
    path = results / f"{benchmark}.jsonl"
    return hashlib.sha256(path.read_bytes() if path.exists() else b"").hexdigest()[:16]


def workload(record: Record) -> Workload:
    return Workload(**{key: value for key, value in record["workload"].items() if key != "vocab"})


def measured(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Those with a time, of workloads with these values."""
    return [r for r in records if "ms" in r and all(r["workload"][key] == value for key, value in wanted.items())]


def by_provider(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["provider"], []).append(record)
    return found


def colour(provider: str, theme: dict[str, str]) -> dict[str, Any]:
    """A user's formula, which has no style here, is drawn in the colour of the text."""
    name, marker = STYLE.get(provider, ("text", "h"))
    line = {"ours in place": "--", "ours hidden, half kept": "--"}.get(provider, "-")
    front = {"zorder": 3} if provider.startswith("ours") else {}
    return {"color": theme.get(name, name), "marker": marker, "linestyle": line, "label": provider, **front}


def curves(ax: Any, records: list[Record], x: str, y: Callable[[Record], float], theme: dict[str, str]) -> None:
    """One line a provider, the 20th to 80th percentile as a shade behind it where it is a time."""
    for provider, of in by_provider(records).items():
        of = sorted(of, key=lambda r: r["workload"][x])
        at = [r["workload"][x] for r in of]
        ax.plot(at, [y(r) for r in of], **colour(provider, theme))
        if y is milliseconds:
            low, high = ([times(r)[key] for r in of] for key in ("p20", "p80"))
            ax.fill_between(at, low, high, color=colour(provider, theme)["color"], alpha=0.2, linewidth=0)


def times(record: Record) -> dict[str, float]:
    """Of the clock; with one thread of a CPU that of the process, which other programs do not lengthen."""
    threads = record["workload"]["threads"] or record.get("threads")
    found: dict[str, float] = record["cpu_ms" if threads == 1 and "cpu_ms" in record else "ms"]
    return found


def milliseconds(record: Record) -> float:
    return times(record)["median"]


def megabytes(record: Record) -> float:
    """A logarithmic axis has no 0: what takes less than 0.1 MB is drawn there."""
    return max(record["peak_bytes"] / 1e6, 0.1)


def floor(ax: Any, records: list[Record], x: str, theme: dict[str, str]) -> None:
    points = sorted({(r["workload"][x], r["floor_ms"]) for r in records})
    ax.plot(*zip(*points, strict=True), color=theme["text"], linestyle=":", label="floor: (2r + 3)·U at copy speed")


def axes(ax: Any, title: str, x: str, y: str, log: str = "xy") -> None:
    ax.set(title=title, xlabel=x, ylabel=y)
    if "x" in log:
        ax.set_xscale("log", base=2)
    if "y" in log:
        ax.set_yscale("log")


def vocabulary_axis(ax: Any, records: list[Record]) -> None:
    names = {r["workload"]["vocab"]: named(workload(r)) for r in records}
    ax.set_xticks(sorted(names), [names[v] for v in sorted(names)], rotation=60, ha="right", rotation_mode="anchor")
    ax.minorticks_off()


def named(w: Workload) -> str:
    return f"{w.model} {w.vocab:,}" if w.model != str(w.vocab) else f"{w.vocab:,}"


def where(records: list[Record]) -> str:
    """What the numbers were measured on: all days and commits of the lines."""
    r = records[0]
    threads = ""
    if "threads" in r:
        threads = (
            f", {r['threads']} threads"
            if r["threads"] > 1
            else f", 1 thread{', time of the process' * ('cpu_ms' in r)}"
        )
    at = f"{r['machine']}{threads}"
    dates, commits = (sorted({line[key] for line in records}) for key in ("date", "commit"))
    plural = "s" if len(commits) > 1 else ""
    return f"{at}, torch {r['versions']['torch']}, {', '.join(dates)}, commit{plural} {', '.join(commits)}"


def draw_peers(plt: Any, records: list[Record], theme: dict[str, str]) -> Any:
    """The whole method from logits against vocabularies; below it Jensen-Shannon from hidden states."""
    figure, ((time, memory), (hidden_time, hidden_memory)) = plt.subplots(2, 2, figsize=(10, 7.6))
    logits = measured(records, route="logits", loss="adakd")
    logits = measured(logits, dtype=logits[-1]["workload"]["dtype"])
    w = workload(logits[0])
    what = f"AdaKD from logits, {w.tokens} tokens, {w.dtype}"
    curves(time, logits, "vocab", milliseconds, theme)
    floor(time, logits, "vocab", theme)
    axes(time, what, "", "milliseconds")
    with_memory = [r for r in logits if "peak_bytes" in r]
    curves(memory, with_memory, "vocab", megabytes, theme)
    axes(memory, "memory beside the logits", "", "MB, 0.1 or more")
    for ax in (time, memory):
        vocabulary_axis(ax, logits)
    hidden = measured(records, route="hidden", loss="mean", divergence="jensen_shannon")
    hidden = [r for r in hidden if r["workload"]["vocab"] == hidden[-1]["workload"]["vocab"]]
    w = workload(hidden[0])
    what = f"Jensen–Shannon from hidden states, {w.tokens} × {w.vocab:,}, {w.dtype}"
    bars(hidden_time, hidden, milliseconds, theme, spread=True)
    axes(hidden_time, what, "milliseconds", "", log="")
    bars(hidden_memory, [r for r in hidden if "peak_bytes" in r], megabytes, theme)
    axes(hidden_memory, "memory beside the inputs", "MB, gradients included", "", log="")
    return figure


def bars(
    ax: Any, records: list[Record], x: Callable[[Record], float], theme: dict[str, str], spread: bool = False
) -> None:
    records = sorted(records, key=x, reverse=True)
    colours = [colour(r["provider"], theme)["color"] for r in records]
    errors = None
    if spread:
        found = [times(r) for r in records]
        errors = [[t["median"] - t["p20"] for t in found], [t["p80"] - t["median"] for t in found]]
    ax.barh([r["provider"] for r in records], [x(r) for r in records], color=colours, xerr=errors, ecolor=theme["text"])


def draw_accuracy(plt: Any, records: list[Record], theme: dict[str, str]) -> Any:
    """Error against distance, a column for each type."""
    dtypes = list(dict.fromkeys(r["workload"]["dtype"] for r in records))
    figure, rows = plt.subplots(2, len(dtypes), figsize=(3.6 * len(dtypes), 6.4), sharex=True, squeeze=False)
    for row, what in zip(rows, ("loss", "gradient"), strict=True):
        for ax, dtype in zip(row, dtypes, strict=True):
            for provider, of in by_provider(r for r in records if r["workload"]["dtype"] == dtype).items():
                points = [p for r in of for p in r["points"] if p[what] > 0]
                if points:
                    at = [p["divergence"] for p in points]
                    ax.plot(at, [p[what] for p in points], **colour(provider, theme), markersize=4)
            axes(ax, f"{what}, {dtype}", "reverse KL of a token" if what == "gradient" else "", "", log="y")
            ax.set_xscale("log")
            ax.set_ylim(1e-9, 1e5)
        row[0].set_ylabel("relative error against fp64")
    return figure


def sweep(records: list[Record], x: str) -> list[Record]:
    """The lines that differ from one another in `x` alone: the largest such group."""
    groups: dict[str, list[Record]] = {}
    for record in measured(records):
        key = {name: value for name, value in record["workload"].items() if name != x}
        if x == "vocab":
            key.pop("model")
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(record)
    return max(groups.values(), key=lambda of: len({r["workload"][x] for r in of}))


def draw_scaling(plt: Any, records: list[Record], theme: dict[str, str]) -> Any:
    figure, ((tokens_time, tokens_memory), (vocab_time, threads_time)) = plt.subplots(2, 2, figsize=(10, 7.6))
    records = [r for r in records if "ms" in r]
    of = sweep(records, "tokens")
    w = workload(of[0])
    curves(tokens_time, of, "tokens", milliseconds, theme)
    floor(tokens_time, of, "tokens", theme)
    axes(tokens_time, f"time, {named(w)}, {w.dtype}, r = {w.share:g}", "tokens", "milliseconds")
    curves(tokens_memory, [r for r in of if "peak_bytes" in r], "tokens", megabytes, theme)
    axes(tokens_memory, "memory beside the logits", "tokens", "MB, 0.1 or more")
    of = sweep(records, "vocab")
    w = workload(of[0])
    curves(vocab_time, of, "vocab", milliseconds, theme)
    floor(vocab_time, of, "vocab", theme)
    axes(vocab_time, f"time, {w.tokens} tokens", "", "milliseconds")
    vocabulary_axis(vocab_time, of)
    of = [r for r in records if r["workload"]["threads"]]
    if len({r["workload"]["threads"] for r in of}) > 1:
        w = workload(of[0])
        curves(threads_time, of, "threads", milliseconds, theme)
        floor(threads_time, of, "threads", theme)
        axes(threads_time, f"time, {w.tokens} × {w.vocab:,}", "threads", "milliseconds")
        threads_time.set_xticks(*[sorted({r["workload"]["threads"] for r in of})] * 2)
        threads_time.minorticks_off()
    else:  # there is nothing to compare; a GPU has none
        threads_time.set_axis_off()
    return figure


def draw_share(plt: Any, records: list[Record], theme: dict[str, str]) -> Any:
    """What selecting fewer tokens saves: ours and its floor, both linear in r."""
    figure, ax = plt.subplots(figsize=(6, 4))
    of = [r for r in sweep(records, "share") if r["provider"] in ("ours", "ours in place")]
    w = workload(of[0])
    curves(ax, of, "share", milliseconds, theme)
    floor(ax, of, "share", theme)
    axes(ax, f"cost of the share, {w.tokens} × {w.vocab:,}, {w.dtype}", "r, share of selected tokens", "ms", log="")
    ax.set_ylim(bottom=0)
    return figure


DRAW: dict[str, tuple[str, Callable[[Any, list[Record], dict[str, str]], Any]]] = {
    "peers": ("peers", draw_peers),
    "accuracy": ("accuracy", draw_accuracy),
    "scaling": ("scaling", draw_scaling),
    "share": ("scaling", draw_share),
    "quality": ("quality", summary.draw),
}
"""A picture's name -> the benchmark it is drawn from, and how."""


def legend(figure: Any) -> None:
    """One for all panels, above them."""
    found: dict[str, Any] = {}
    for ax in figure.axes:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    columns = max(2, int(figure.get_figwidth() / 2.4))
    if found:
        figure.legend(found.values(), found.keys(), loc="upper center", ncols=columns, fontsize=8)
    lines = -(-len(found) // columns)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1 - (0.1 + 0.2 * lines) / figure.get_figheight()))


def draw(results: Path = RESULTS, folder: Path = PICTURES, suffix: str = "svg") -> list[Path]:
    """Every picture that there are lines for, in both themes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (benchmark, function) in DRAW.items():
        if not (records := lines_of(benchmark, results)):
            continue
        for theme, of in THEMES.items():
            settings: dict[Any, Any] = {
                "text.color": of["text"], "axes.labelcolor": of["text"], "xtick.color": of["text"],
                "ytick.color": of["text"], "axes.edgecolor": of["grid"], "grid.color": of["grid"], "axes.grid": True,
                "figure.facecolor": of["back"], "axes.facecolor": of["back"], "legend.facecolor": of["back"],
                "legend.edgecolor": of["grid"], "axes.titlesize": 10, "font.size": 9, "axes.axisbelow": True,
                "svg.hashsalt": name,
            }  # fmt: skip
            with plt.rc_context(settings):
                figure = function(plt, records, of)
                figure.text(0.5, 0.0, where(records), ha="center", va="bottom", fontsize=7)
                legend(figure)
                path = folder / f"{name}-{theme}.{suffix}"
                about = {"Description": f"data {digest(benchmark, results)}"}
                figure.savefig(path, metadata={**about, "Date": None} if suffix == "svg" else about, dpi=110)
                plt.close(figure)
            written.append(path)
    return written


def first_table(records: list[Record]) -> list[str]:
    """The whole method from logits: milliseconds of ours in new memory, which is the default, and of the others."""
    of = measured(records, route="logits", loss="adakd")
    names = ("ours in place", "eager", "eager in chunks", "torch.compile in chunks")
    rows = [f"| vocabulary | type | ours (p20–p80) | {' | '.join(names)} |", "|---|---|" + "--:|" * (1 + len(names))]
    for w in dict.fromkeys(workload(r) for r in of):
        found = {r["provider"]: times(r) for r in of if workload(r) == w}
        cells = ["{median:.1f} ({p20:.1f}–{p80:.1f})".format(**found["ours"]) if "ours" in found else "–"]
        cells += [f"{found[name]['median']:.1f}" if name in found else "–" for name in names]
        rows.append(f"| {named(w)} | {w.dtype} | {' | '.join(cells)} |")
    w = workload(of[0])
    return [*rows, "", f"{w.tokens} tokens, reverse KL, r = {w.share:g}, forward and backward. {where(of)}."]


def peers_table(records: list[Record]) -> list[str]:
    """Every line of the benchmark, those without a time with their reason."""
    rows = ["| provider | ms (p20–p80) | ms of the process | MB | error against fp64 |", "|---|--:|--:|--:|--:|"]
    for w in dict.fromkeys(workload(r) for r in records):
        rows.append(f"| **{w}** | | | | |")
        for r in records:
            if workload(r) != w:
                continue
            if "failed" in r:
                rows.append(f"| {r['provider']} | {r['failed'].replace('|', ' ')} | | | |")
                continue
            time = "{median:.1f} ({p20:.1f}–{p80:.1f})".format(**r["ms"])
            threads = f"{r['cpu_ms']['median']:.1f}" if "cpu_ms" in r else ""
            memory = f"{r['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in r else ""
            rows.append(f"| {r['provider']} | {time} | {threads} | {memory} | {r['error']:.1e} |")
    return [*rows, "", f"{where(records)}."]


def operators_table(records: list[Record]) -> list[str]:
    """Milliseconds of each operator, a column for each pair of types and divergence."""
    of: dict[str, dict[str, float]] = {}
    for r in records:
        w = r["workload"]
        types = w["dtype"] if w["dtype"] == w["teacher_dtype"] else f"{w['dtype']} and {w['teacher_dtype']}"
        of.setdefault(f"{types}, {w['divergence']}", {})[r["operator"]] = milliseconds(r)
    rows = ["| operator | " + " | ".join(of) + " |", "|---|" + "--:|" * len(of)]
    for operator in dict.fromkeys(r["operator"] for r in records):
        rows.append(f"| `{operator}` | " + " | ".join(f"{column[operator]:.1f}" for column in of.values()) + " |")
    w = records[0]["workload"]
    return [*rows, "", f"{w['tokens']} × {w['vocab']:,}, milliseconds, medians of 7. {where(records)}."]


TABLES: dict[tuple[str, str], tuple[str, Callable[[list[Record]], list[str]]]] = {
    ("README.md", "first"): ("peers", first_table),
    ("docs/benchmarks.md", "peers"): ("peers", peers_table),
    ("docs/benchmarks.md", "operators"): ("operators", operators_table),
    ("docs/quality.md", "arms"): ("quality", lambda records: summary.arms_table(records).splitlines()),
    ("docs/quality.md", "differences"): ("quality", lambda records: summary.differences_table(records).splitlines()),
}
"""A page and a table's name -> the benchmark it is made from, and how."""


def marked(page: str, name: str) -> re.Match[str]:
    found = re.search(rf"<!-- figures: {name} (\w*) -->\n(.*?)<!-- end -->", page, re.DOTALL)
    if found is None:
        raise LookupError(f"no '<!-- figures: {name} -->' with an '<!-- end -->' after it")
    return found


def write_tables(root: Path = ROOT, results: Path = RESULTS) -> None:
    for (page, name), (benchmark, table) in TABLES.items():
        text = (root / page).read_text()
        found = marked(text, name)
        lines = "\n".join(table(lines_of(benchmark, results)))
        new = f"<!-- figures: {name} {digest(benchmark, results)} -->\n{lines}\n<!-- end -->"
        (root / page).write_text(text[: found.start()] + new + text[found.end() :])


def stale(root: Path = ROOT, results: Path = RESULTS) -> list[str]:
    """Pictures and tables that are not of the data of now, or are not what it gives."""
    found = []
    for name, (benchmark, _) in DRAW.items():
        for theme in THEMES:
            path = root / "docs" / "pictures" / f"{name}-{theme}.svg"
            if not path.exists() or f"data {digest(benchmark, results)}<" not in path.read_text():
                found.append(path.name)
    for (page, name), (benchmark, table) in TABLES.items():
        at, text = marked((root / page).read_text(), name).groups()
        if at != digest(benchmark, results) or text != "\n".join(table(lines_of(benchmark, results))) + "\n":
            found.append(f"{page}: {name}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description="Pictures and tables of the docs."
    )
    parser.add_argument(
        "--results", type=Path, help="draw the lines of this folder into it, and leave README and docs as they are"
    )
    results = parser.parse_args(argv).results
    for path in draw() if results is None else draw(results, results):
        print(path)
    if results is None:
        write_tables()
    return 0


if __name__ == "__main__":
    sys.exit(main())
