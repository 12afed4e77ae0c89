"""What the lines of results come to: tables of the arms and of paired differences, and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import correlation, mean, stdev
from typing import Any

from adakd_kernels.evaluation.distances import DISTANCES
from adakd_kernels.evaluation.intervals import Estimate, estimate
from adakd_kernels.evaluation.tables import SHOWN, Shown, fixed, markdown

from .arms import ARMS
from .experiment import START, TEACHER

Line = dict[str, Any]
TITLES = {TEACHER: "teacher", START: "student before", **{name: arm.title for name, arm in ARMS.items()}}
SAMPLED, GREEDY = "rouge_l", "rouge_l_greedy"
PLAIN = "reverse_kl"
COLUMNS = {
    SAMPLED: Shown("ROUGE-L sampled", 1, True),
    GREEDY: Shown("greedy", 1, True),
    **{name: SHOWN[name] for name in ("forward_kl", "reverse_kl", "cross_entropy", "entropy")},
}
"""The measures that are shown."""
SHORT = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "cross_entropy": "cross-entropy", "entropy": "entropy"}
HEADER = [SHORT.get(name, shown.title) for name, shown in COLUMNS.items()]


@dataclass(frozen=True)
class Difference:
    """An arm less the one that it is compared with, paired by seed and prompt.

    Attributes:
        found: the mean over the seeds that both have, with an interval over the prompts.
        seeds: the difference of each seed.
    """

    found: Estimate
    seeds: list[float]

    @property
    def decided(self) -> bool:
        """Whether the interval leaves 0 out and all seeds, two at least, agree in the sign."""
        one_sign = len({value > 0.0 for value in self.seeds}) == 1 and 0.0 not in self.seeds
        out = self.found.low is not None and self.found.high is not None and self.found.low * self.found.high > 0.0
        return len(self.seeds) > 1 and one_sign and out


def _totals(line: Line, name: str, measure: str) -> tuple[list[float], list[float]]:
    """Of each prompt its total, and what the sum of the totals is divided by."""
    prompts = line["sets"][name]
    if measure in DISTANCES:
        weights = [float(tokens) for tokens in prompts["tokens"]]
        return [value * weight for value, weight in zip(prompts[measure], weights, strict=True)], weights
    values = [mean(each) for each in prompts[measure]] if measure == SAMPLED else prompts[measure]
    return values, [1.0] * len(values)


def value(line: Line, name: str, measure: str) -> float:
    """The mean of a set."""
    totals, weights = _totals(line, name, measure)
    return sum(totals) / sum(weights)


def difference(first: Iterable[Line], second: Iterable[Line], name: str, measure: str) -> Difference | None:
    """`second` less `first`, or None where they have no seed in common."""
    of_first, of_second = ({line["seed"]: line for line in lines} for lines in (first, second))
    seeds = [seed for seed in of_first if seed in of_second]
    if not seeds:
        return None
    totals: list[list[float]] = []
    weights: list[float] = []
    for seed in seeds:
        pair = of_first[seed], of_second[seed]
        if any(pair[0][part] != pair[1][part] for part in ("plan", "inputs")):
            raise ValueError(f"seed {seed} has lines of another plan, teacher or data: give the same to all runs")
        before, weights = _totals(pair[0], name, measure)
        totals.append([b - a for a, b in zip(before, _totals(pair[1], name, measure)[0], strict=True)])
    found = estimate([mean(each) for each in zip(*totals, strict=True)], weights)
    return Difference(found, [sum(each) / sum(weights) for each in totals])


def by_arm(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The lines of each arm, in the order of `TITLES`."""
    found: dict[str, list[Line]] = {name: [] for name in TITLES}
    for line in lines:
        found[line["arm"]].append(line)
    return {name: of for name, of in found.items() if of}


def set_names(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line["sets"]))


def arms_table(lines: list[Line]) -> str:
    """Of each arm the means over its seeds, ± the standard deviation of ROUGE-L over them; a table for each set.

    The time of training is the processor's, which other programs do not lengthen.
    """
    header = ["", "seeds", "mean τ", "mean r", "training, s", *HEADER]
    blocks = []
    for name in set_names(lines):
        rows = []
        for arm, of in by_arm(lines).items():
            cells = [TITLES[arm], str(len(of)) if arm != TEACHER else ""]
            cells.append(f"{mean(line['mean_temperature'] for line in of):.2f}" if "shares" in of[0] else "")
            cells.append(f"{mean(mean(line['shares']) for line in of):.2f}" if "shares" in of[0] else "")
            cells.append(f"{mean(line['train_cpu_seconds'] for line in of):.0f}" if "shares" in of[0] else "")
            for measure, shown in COLUMNS.items():
                values = [value(line, name, measure) for line in of]
                spread = f" ± {stdev(values):.1f}" if measure == SAMPLED and len(values) > 1 else ""
                cells.append(fixed(mean(values), shown.digits) + spread)
            rows.append(cells)
        blocks.append(f"{name}:\n\n{markdown(header, rows)}")
    return "\n\n".join(blocks)


def differences_table(lines: list[Line]) -> str:
    """Of each arm the differences from those that it is compared with, below them each seed's; a table for each set."""
    arms = by_arm(lines)
    header = ["", "less", "seeds", *HEADER]
    pairs = [(arm, against) for arm in arms if arm in ARMS for against in ARMS[arm].against if against in arms]
    blocks = []
    for name in set_names(lines):
        rows = []
        for arm, against in pairs:
            found = {measure: difference(arms[against], arms[arm], name, measure) for measure in COLUMNS}
            seeds = found[SAMPLED]
            if seeds is None:
                continue
            row = [TITLES[arm], TITLES[against], str(len(seeds.seeds))]
            rows.append(row + [_cell(each, COLUMNS[measure]) for measure, each in found.items() if each is not None])
        blocks.append(f"{name}:\n\n{markdown(header, rows)}")
    return "\n\n".join(blocks)


def _cell(found: Difference, shown: Shown) -> str:
    mark = "**" if found.decided else ""
    middle, *ends = (fixed(number, shown.digits, "+") for number in found.found if number is not None)
    seeds = ", ".join(fixed(number, shown.digits, "+") for number in found.seeds)
    return f"{mark}{middle}{mark}" + (f" [{', '.join(ends)}]" if ends else "") + f"<br>{seeds}"


def draw(plt: Any, lines: list[Line], colours: dict[str, str]) -> Any:
    """Sampled ROUGE-L over the student's entropy, both less those of reverse KL with the same seed.

    A panel for each set, with the correlation over the arms; an arm is a mark, its seeds are small beside it.

    Args:
        plt: matplotlib's pyplot.
        lines: of results.
        colours: of `text`, `back` and `ours`, which are the arms with AdaKD.
    """
    names = set_names(lines)
    figure, panels = plt.subplots(
        1,
        len(names) + 1,
        figsize=(4.2 * len(names) + 2.8, 4.0),
        squeeze=False,
        width_ratios=[1.0] * len(names) + [0.7],
    )
    *axes, key = panels[0]
    plain = {line["seed"]: line for line in lines if line["arm"] == PLAIN}
    arms = [(arm, [line for line in of if line["seed"] in plain]) for arm, of in by_arm(lines).items() if arm in ARMS]
    arms = [(arm, of) for arm, of in arms if of and arm != PLAIN]
    for axis, name in zip(axes, names, strict=True):
        axis.axhline(0.0, color=colours["text"], linewidth=0.8)
        axis.axvline(0.0, color=colours["text"], linewidth=0.8)
        centres = []
        for number, (arm, of) in enumerate(arms, start=1):
            points = [
                tuple(value(line, name, m) - value(plain[line["seed"]], name, m) for m in ("entropy", SAMPLED))
                for line in of
            ]
            colour = colours["ours" if "adakd" in arm else "text"]
            centre = tuple(mean(part) for part in zip(*points, strict=True))
            centres.append(centre)
            axis.scatter(*zip(*points, strict=True), s=8, color=colour, alpha=0.5, linewidths=0)
            for x, y in points:
                axis.plot([centre[0], x], [centre[1], y], color=colour, alpha=0.25, linewidth=0.8)
            axis.text(*centre, str(number), **_mark(colour, colours["back"]))
        related = f", correlation {correlation(*zip(*centres, strict=True)):.2f}" if len(centres) > 2 else ""
        axis.set_title(name + related)
        axis.set_xlabel("entropy of the student (nats/token), less reverse KL's")
        axis.set_ylabel("ROUGE-L, sampled, less reverse KL's")
    key.axis("off")
    for number, (arm, _) in enumerate(arms, start=1):
        place = 1.0 - number / (len(arms) + 1)
        colour = colours["ours" if "adakd" in arm else "text"]
        key.text(0.0, place, str(number), **_mark(colour, colours["back"]), transform=key.transAxes)
        key.text(0.1, place, TITLES[arm], va="center", fontsize=8, transform=key.transAxes)
    return figure


def _mark(colour: str, back: str) -> dict[str, Any]:
    """A number in a disc."""
    disc = {"boxstyle": "circle,pad=0.25", "facecolor": colour, "edgecolor": "none"}
    return {"color": back, "fontsize": 8, "ha": "center", "va": "center", "bbox": disc}
