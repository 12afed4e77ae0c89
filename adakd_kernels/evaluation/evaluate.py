"""An evaluation in a folder: it is written as it goes, so that one that was stopped goes on, and more can be added.

`results.json` holds the settings from the start on. Of each set it has the numbers of every prompt, and at the end the
means over them. While answers are sampled, they are in a file of their own, which is removed at the end of its set and
seed.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from ..trainer.heads import evaluation_mode
from .distances import DISTANCES, sequence_sums
from .intervals import BOOTSTRAP, estimate
from .progress import bar
from .prompts import Prompt, fingerprint
from .rouge import is_readable, rouge_l
from .sampling import Draws, answer_prompts, random_numbers
from .weights import weights_fingerprint

logger = logging.getLogger(__name__)

__all__ = ["FOUND", "GREEDY", "RESULTS", "EvaluationError", "Settings", "check_settings", "evaluate", "read_results"]

FOUND = ("rouge_l", *DISTANCES)
"""What an evaluation finds, by the names of its files. ROUGE-L is in [0, 100], the agreement in [0, 1], all others are
in nats per labelled token of the references."""
GREEDY = "greedy"
"""What stands for a seed where answers are greedy."""
RESULTS = "results.json"
PACKAGES = ("adakd-kernels", "torch", "transformers", "rouge-score")


class EvaluationError(ValueError):
    """An evaluation that cannot be made or read; the message is one line and ends with the cure."""


@dataclass(frozen=True)
class Settings:
    """How answers are made and sequences are read.

    Attributes:
        seeds: one answer to each prompt is sampled for each.
        greedy: the most likely tokens instead; the seeds are not read.
        temperature, top_p: of the sampling.
        max_new_tokens: tokens of an answer at most.
        max_length: tokens of a prompt with its answer at most. A prompt that leaves no room for `max_new_tokens` gets
            no answer, and the end of a longer reference is not read.
        batch_size: prompts answered together, and sequences in a forward pass.
    """

    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    greedy: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    max_length: int = 1024
    batch_size: int = 32

    def draws(self) -> tuple[str, ...]:
        """The seeds as they are called in files."""
        return (GREEDY,) if self.greedy else tuple(map(str, self.seeds))


def check_settings(settings: Settings) -> None:
    """Refuse settings outside their ranges.

    Raises:
        EvaluationError: the message starts with the name of the setting.
    """
    for name, least in (("max_new_tokens", 1), ("max_length", 2), ("batch_size", 1)):
        if getattr(settings, name) < least:
            raise EvaluationError(f"{name} must be {least} or more, got {getattr(settings, name)}")
    if not settings.temperature > 0.0:
        raise EvaluationError(f"temperature must be above 0, got {settings.temperature}: greedy takes the likeliest")
    if not 0.0 < settings.top_p <= 1.0:
        raise EvaluationError(f"top_p must be in (0, 1], got {settings.top_p}")
    if settings.max_new_tokens >= settings.max_length:
        raise EvaluationError(
            f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt within max_length="
            f"{settings.max_length}: lower the first or raise the second"
        )
    if not settings.greedy and (not settings.seeds or len(set(settings.seeds)) < len(settings.seeds)):
        raise EvaluationError(f"seeds must be different numbers, one at least, got {list(settings.seeds)}")


def evaluate(
    student: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[Prompt]],
    settings: Settings,
    *,
    folder: str | Path,
    teacher: Any = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a student on sets of prompts, with progress on stderr, and write the results in `folder`.

    Files: `results.json`, `results.csv`, and `answers-<set>-<seed>.jsonl`. A folder that holds a part of the same
    evaluation is gone on with; seeds and sets that it has more stay in it. The models are known by their weights
    (`weights_fingerprint`), whatever they are called.

    Args:
        student: a causal language model of transformers, on its device.
        tokenizer: of both models.
        sets: the prompts of each set, as `load_prompts` gives them, by the name of the set.
        settings: see `Settings`.
        folder: where the files are.
        teacher: a model to measure distances from, or None for ROUGE-L alone.
        about: what else the results depend on or should say, such as names of models; JSON.

    Returns:
        The content of `results.json`.

    Raises:
        EvaluationError: settings outside their range, a set with nothing to measure, or a folder that holds another
            evaluation.
        FloatingPointError: a measure or logits that are not finite.
    """
    check_settings(settings)
    about = {**(about or {}), "distances": teacher is not None, "model_weights": weights_fingerprint(student)}
    if teacher is not None:
        about["teacher_weights"] = weights_fingerprint(teacher)
    run = _Run(Path(folder), settings, about)
    for name, prompts in sets.items():
        run.begin(name, prompts)
    run.save()  # not before all sets are checked: a refused one leaves the folder as it is
    for name, prompts in sets.items():
        if any(map(run.is_asked, prompts)) and not any(is_readable(each) for p in prompts for each in p.references):
            logger.warning(
                "set %r: rouge-score reads the letters a to z and digits alone, and no reference has one: rouge_l is 0",
                name,
            )
    with evaluation_mode(student):
        if teacher is not None:
            with evaluation_mode(teacher):
                _measure(run, student, teacher, sets)
        _answer(run, student, tokenizer, sets)
    found = run.results["sets"]
    for name in sets:
        found[name].update(_means(found[name], teacher is not None))
    run.results["complete"] = all(FOUND[0] in part for part in found.values())
    run.save()
    _write_whole(run.folder / "results.csv", _csv(found))
    return run.results


class _Run:
    """The state of an evaluation, which is `results.json`."""

    def __init__(self, folder: Path, settings: Settings, about: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        own = {name: value for name, value in asdict(settings).items() if name != "seeds"}
        own = json.loads(json.dumps({**own, **about}))  # tuples are lists in a file
        if (folder / RESULTS).is_file():
            self.results = read_results(folder, complete=False)
            _check_same(folder, self.results["settings"], own)
        else:
            self.results = {"settings": own, "sets": {}}
        self.results.update(complete=False, bootstrap=BOOTSTRAP, versions={name: _version(name) for name in PACKAGES})
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, name: str, prompts: Sequence[Prompt]) -> None:
        """Make the part of a set, or check the one that is there."""
        mark = fingerprint(prompts)
        part: dict[str, Any] | None = self.results["sets"].get(name)
        if part is not None and part["fingerprint"] != mark:
            raise EvaluationError(
                f"output_dir {self.folder} has an evaluation on another set {name!r}, of {part['records']} records: "
                "give another output_dir"
            )
        if part is None:
            asked = [prompt for prompt in prompts if self.is_asked(prompt)]
            rows = [{"id": p.id, "key": p.key, **({"rouge_l": {}} if self.is_asked(p) else {})} for p in prompts]
            part = {
                "fingerprint": mark, "records": len(prompts), "answered": len(asked),
                "too_long": sum(bool(p.prompt_ids) for p in prompts) - len(asked), "per_prompt": rows,
            }  # fmt: skip
            if not asked and not self.results["settings"]["distances"]:
                raise EvaluationError(
                    f"set {name!r}: nothing to measure, as no record has a prompt that leaves room for "
                    f"max_new_tokens={self.settings.max_new_tokens} within max_length={self.settings.max_length}: "
                    "raise max_length, or give a teacher to measure the distance from"
                )
            self.results["sets"][name] = part

    def is_asked(self, prompt: Prompt) -> bool:
        """Whether a prompt gets an answer."""
        return 0 < len(prompt.prompt_ids) <= self.settings.max_length - self.settings.max_new_tokens

    def save(self) -> None:
        _write_whole(self.folder / RESULTS, json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")


def _measure(run: _Run, student: Any, teacher: Any, sets: Mapping[str, Sequence[Prompt]]) -> None:
    """The distances of every set that has none yet."""
    todo = [name for name in sets if "tokens" not in run.results["sets"][name]]
    total = sum(len(prompt.sequences) for name in todo for prompt in sets[name])
    if not todo:
        return
    with bar(total, "references", "sequence") as progress:
        for name in todo:
            part, prompts, limit = run.results["sets"][name], sets[name], run.settings.max_length
            progress.set_postfix_str(name, refresh=False)
            sequences = [(ids[:limit], labels[:limit]) for prompt in prompts for ids, labels in prompt.sequences]
            sums = sequence_sums(
                student, teacher, sequences, batch_size=run.settings.batch_size, progress=progress.update
            )
            start = 0
            for row, prompt in zip(part["per_prompt"], prompts, strict=True):
                *values, tokens = sums[start : start + len(prompt.sequences)].sum(0).tolist()
                start += len(prompt.sequences)
                row["tokens"] = int(tokens)
                row.update({m: value / tokens for m, value in zip(DISTANCES, values, strict=True)} if tokens else {})
                _check_finite(name, row)
            part["tokens"] = sum(row["tokens"] for row in part["per_prompt"])
            if not part["tokens"]:
                raise EvaluationError(f"set {name!r}: no labelled token is within max_length={limit}: raise max_length")
            run.save()


def _answer(run: _Run, student: Any, tokenizer: Any, sets: Mapping[str, Sequence[Prompt]]) -> None:
    """The answers and their ROUGE-L, of every set and seed that has none yet."""
    asked = {name: [prompt for prompt in prompts if run.is_asked(prompt)] for name, prompts in sets.items()}
    todo = [
        (name, draw)
        for name in sets
        for draw in run.settings.draws()
        if asked[name]
        and any(draw not in row.get("rouge_l", {draw}) for row in run.results["sets"][name]["per_prompt"])
    ]
    if not todo:
        return
    with bar(sum(len(asked[name]) for name, _ in todo), "answers", "answer") as progress:
        for name, draw in todo:
            progress.set_postfix_str(f"{name}, {draw if run.settings.greedy else f'seed {draw}'}", refresh=False)
            _answer_set(run, student, tokenizer, name, asked[name], draw, progress.update)


def _answer_set(
    run: _Run, student: Any, tokenizer: Any, name: str, prompts: Sequence[Prompt], draw: str,
    progress: Callable[[int], Any],
) -> None:  # fmt: skip
    settings, file = run.settings, run.folder / f"answers-{name}-{draw}.jsonl"
    sampled = None
    if draw != GREEDY:
        numbers = random_numbers(int(draw), [prompt.key for prompt in prompts], settings.max_new_tokens)
        sampled = Draws(numbers, settings.temperature, settings.top_p)
    partial = file.with_suffix(".partial")
    answers = answer_prompts(
        student,
        tokenizer,
        [prompt.prompt_ids for prompt in prompts],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        draws=sampled,
        cache=partial,
        progress=progress,
    )
    lines, scores = [], {}
    for prompt, ids in zip(prompts, answers, strict=True):
        answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
        scores[prompt.key] = 100.0 * rouge_l(answer, prompt.references)
        line = {
            "id": prompt.id, "key": prompt.key, "prompt": tokenizer.decode(prompt.prompt_ids),
            "references": prompt.references, "answer": answer, "rouge_l": scores[prompt.key], "tokens": len(ids),
        }  # fmt: skip
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    _write_whole(file, "".join(lines))
    for row in run.results["sets"][name]["per_prompt"]:
        if row["key"] in scores:
            row["rouge_l"][draw] = scores[row["key"]]
    run.save()
    partial.unlink()


def _means(part: Mapping[str, Any], distances: bool) -> dict[str, Any]:
    """What a set comes to, of all its seeds."""
    found: dict[str, Any] = {name: None for name in FOUND}
    scores = [row["rouge_l"] for row in part["per_prompt"] if row.get("rouge_l")]
    if scores:
        seeds = [seed for seed in scores[0] if all(seed in each for each in scores)]
        of_seeds = {seed: mean(each[seed] for each in scores) for seed in seeds}
        found["rouge_l"] = {
            **estimate([mean(each[seed] for seed in seeds) for each in scores])._asdict(),
            "std": stdev(of_seeds.values()) if len(seeds) > 1 else None,
            "seeds": of_seeds,
        }
    if distances:
        rows = [row for row in part["per_prompt"] if row["tokens"]]
        weights = [row["tokens"] for row in rows]
        for name in DISTANCES:
            found[name] = estimate([row[name] * row["tokens"] for row in rows], weights)._asdict()
    return found


def read_results(folder: str | Path, complete: bool = True) -> dict[str, Any]:
    """The content of `results.json` in the folder of an evaluation.

    Raises:
        EvaluationError: there is none, or `complete` asks for its end and it has not come to it.
    """
    path = Path(folder) / RESULTS
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sets, settings = results["sets"], results["settings"]
    except OSError as error:
        raise EvaluationError(
            f"{folder}: no folder of an evaluation, {RESULTS} cannot be read ({error.strerror}): make it with "
            "'adakd eval --output_dir'"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(f"{path}: not what 'adakd eval' writes: give the folder of an evaluation") from None
    if complete and not (results.get("complete") and sets and settings):
        left = [name for name, part in sets.items() if FOUND[0] not in part]
        of_sets = f"of {', '.join(left)} " if left else ""
        raise EvaluationError(f"{folder}: the evaluation {of_sets}has not come to its end: run its 'adakd eval' again")
    return results


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a folder of other settings or models."""
    if "model_weights" not in before:
        raise EvaluationError(
            f"output_dir {folder} holds an evaluation of an older version, which did not note the models' weights: "
            "give another output_dir"
        )
    for name in {**before, **now}:
        if before.get(name) != now.get(name) and name in ("model_weights", "teacher_weights"):
            raise EvaluationError(
                f"output_dir {folder} holds an evaluation with other weights of the {name.removesuffix('_weights')}: "
                "give another output_dir"
            )
        if before.get(name) != now.get(name):
            raise EvaluationError(
                f"output_dir {folder} holds an evaluation with {name} {before.get(name)!r}, and this one has "
                f"{now.get(name)!r}: give another output_dir, or the same {name}"
            )


def _check_finite(name: str, row: Mapping[str, Any]) -> None:
    bad = [measure for measure in DISTANCES if not torch.tensor(row.get(measure, 0.0)).isfinite()]
    if bad:
        raise FloatingPointError(f"set {name!r}, record {row['id']}: {bad[0]} is {row[bad[0]]}, which is not finite")


def _csv(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each set, and for each measure its mean and the ends of its interval."""
    ends = ("low", "high")
    names = ["set", "records", "answered", "tokens", "seeds"]
    for measure in FOUND:
        names += [measure, *(f"{measure}_{end}" for end in ends)] + (["rouge_l_std"] if measure == "rouge_l" else [])
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for name, part in sets.items():
        row = {"set": name, **{column: part.get(column) for column in ("records", "answered", "tokens")}}
        for measure in FOUND:
            found = part.get(measure)
            if found is not None:
                row.update({measure: found["mean"], **{f"{measure}_{end}": found[end] for end in ends}})
        if part.get("rouge_l") is not None:
            row.update(seeds=" ".join(part["rouge_l"]["seeds"]), rouge_l_std=part["rouge_l"]["std"])
        writer.writerow(row)
    return text.getvalue()


def _write_whole(path: Path, text: str) -> None:
    # Written beside the file and moved over it: a reader, or a run that was killed, never sees half of it.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
