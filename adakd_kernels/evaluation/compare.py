"""Two evaluations on the same prompts: paired differences, with bootstrap intervals over the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from .distances import DISTANCES
from .evaluate import EvaluationError
from .intervals import Estimate, estimate

__all__ = ["Difference", "compare"]

OF_THE_TEACHER = ("forward_kl", "reverse_kl", "agreement")


@dataclass(frozen=True)
class Difference:
    """A measure of two evaluations on one set.

    Attributes:
        set: its name.
        measure: one of `FOUND`.
        first, second: its mean over the prompts that both have.
        difference: second − first, with its interval.
        prompts: how many both have.
        seeds: which both have, of ROUGE-L.
    """

    set: str
    measure: str
    first: float
    second: float
    difference: Estimate
    prompts: int
    seeds: tuple[str, ...] = ()


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[Difference], list[str]]:
    """Paired differences of all that two evaluations have both measured.

    Args:
        first, second: what `evaluate` returned, or `read_results` reads.

    Returns:
        The differences, and what is to be known about them, such as measures that are left out.

    Raises:
        EvaluationError: no set is in both, or the sets have no prompt in common.
    """
    names = [name for name in first["sets"] if name in second["sets"]]
    if not names:
        own, other = (", ".join(results["sets"]) for results in (first, second))
        raise EvaluationError(f"no set is in both: {own} against {other}; name the sets alike, with --data NAME=PATH")
    notes = _settings_that_differ(first["settings"], second["settings"])
    teachers = [results["settings"].get("teacher_weights") for results in (first, second)]
    same_teacher = None not in teachers and teachers[0] == teachers[1]
    found: list[Difference] = []
    for name in names:
        rows = [{row["key"]: row for row in results["sets"][name]["per_prompt"]} for results in (first, second)]
        pairs = [(row, rows[1][key]) for key, row in rows[0].items() if key in rows[1]]
        if not pairs:
            raise EvaluationError(f"set {name!r} has no prompt in common: evaluate both on one file")
        if len(pairs) < max(map(len, rows)):
            notes.append(f"{name}: {len(pairs)} prompts are in both, of {len(rows[0])} and {len(rows[1])}")
        found += _rouge(name, pairs, notes)
        read = [(one, other) for one, other in pairs if one.get("tokens") and other.get("tokens")]
        if read and any(one["tokens"] != other["tokens"] for one, other in read):
            notes.append(f"{name}: the tokens of the references differ, so nothing per token is compared")
            continue
        for measure in DISTANCES if read else ():
            if same_teacher or measure not in OF_THE_TEACHER:
                weights = [one["tokens"] for one, _ in read]
                values = [[pair[side][measure] * pair[side]["tokens"] for pair in read] for side in (0, 1)]
                found.append(_difference(name, measure, values, weights))
    if not same_teacher and any(results["settings"]["distances"] for results in (first, second)):
        why = "one of them notes no weights of a teacher" if None in teachers else "the teachers differ"
        notes.append(f"{why}, so {', '.join(OF_THE_TEACHER)} are not compared")
    return found, notes


def _rouge(name: str, pairs: list[tuple[Any, Any]], notes: list[str]) -> list[Difference]:
    answered = [
        (one["rouge_l"], other["rouge_l"]) for one, other in pairs if one.get("rouge_l") and other.get("rouge_l")
    ]
    if not answered:
        return []
    seeds = tuple(seed for seed in answered[0][0] if seed in answered[0][1])
    used = [[list(scores) for scores in answered[0]], [list(seeds)] * 2][bool(seeds)]
    if not seeds:
        notes.append(f"{name}: ROUGE-L of other seeds: {' '.join(used[0])} against {' '.join(used[1])}")
    elif any(set(scores) != set(seeds) for scores in answered[0]):
        notes.append(f"{name}: ROUGE-L of the seeds that both have: {' '.join(seeds)}")
    values = [[mean(pair[side][seed] for seed in used[side]) for pair in answered] for side in (0, 1)]
    return [_difference(name, "rouge_l", values, None, seeds)]


def _difference(
    name: str, measure: str, values: list[list[float]], weights: list[float] | None, seeds: tuple[str, ...] = ()
) -> Difference:
    """Of the totals of each prompt."""
    total = sum(weights) if weights is not None else len(values[0])
    difference = estimate([b - a for a, b in zip(*values, strict=True)], weights)
    return Difference(name, measure, sum(values[0]) / total, sum(values[1]) / total, difference, len(values[0]), seeds)


def _settings_that_differ(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    own = ("model", "model_weights", "teacher", "teacher_weights", "distances", "batch_size")
    names = [name for name in {**first, **second} if name not in own and first.get(name) != second.get(name)]
    return [f"{name} differs: {first.get(name)!r} against {second.get(name)!r}" for name in names]
