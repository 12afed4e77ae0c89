"""The experiment of docs/quality.md on a tiny model: it resumes, its arms are what they say, its tables are right."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from adakd_kernels.demo.tiny import write_tiny_teacher
from benchmarks.quality import __main__ as quality
from benchmarks.quality import arms, experiment, summary
from benchmarks.quality.arms import ARMS

from .tiny_models import INSTRUCTIONS, write_jsonl

pytestmark = pytest.mark.fast

PLAN = {"first_cut": 1, "layers_cut": 1, "start_steps": 1, "steps": 6, "batch_size": 2, "max_new_tokens": 8,
        "max_length": 200, "prompts": 3}  # fmt: skip
TRAINED = ["latf", "adakd", "one_temperature", "random_tokens"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four arms of one seed have run."""
    folder = tmp_path_factory.mktemp("quality")
    write_tiny_teacher(folder / "teacher")
    write_jsonl(folder / "data.jsonl", INSTRUCTIONS)
    run(folder, TRAINED)
    return folder


def run(folder: Path, names: list[str], *more: str) -> list[dict[str, Any]]:
    plan = [word for name, value in PLAN.items() for word in (f"--{name}", str(value))]
    data = ["--train", str(folder / "data.jsonl"), "--held_out", f"a={folder}/data.jsonl", f"b={folder}/data.jsonl"]
    places = ["--teacher", str(folder / "teacher"), "--results", str(folder / "results.jsonl"),
              "--work_dir", str(folder / "work")]  # fmt: skip
    quality.main([*data, *places, *plan, "--seeds", "3", "--arms", *names, *more])
    return quality.read_results(folder / "results.jsonl")


def test_each_arm_is_what_it_says(workplace):
    lines = {line["arm"]: line for line in quality.read_results(workplace / "results.jsonl")}
    assert list(lines) == ["teacher", "start", *(arm for arm in ARMS if arm in TRAINED)]
    # The share starts to fall after the warm-up, as the loss does.
    latf, adakd = lines["latf"], lines["adakd"]
    assert len(latf["shares"]) == PLAN["steps"] and latf["mean_temperature"] == 1.0 and latf["options"] == {
        "divergence": "reverse_kl", "temperature_scale": 0.0}  # fmt: skip
    assert adakd["mean_temperature"] != 1.0
    only = lines["one_temperature"]
    assert only["mean_temperature"] == pytest.approx(adakd["mean_temperature"], rel=1e-6)
    assert only["options"]["temperature_scale"] == 0.0
    assert lines["random_tokens"]["shares"] == latf["shares"]
    for line in lines.values():
        prompts = line["sets"]["a"]
        assert len(prompts["key"]) == len(prompts["rouge_l"]) == 3 and len(prompts["rouge_l"][0]) == 5
        assert line["commit"] and line["versions"]["torch"] and line["plan"]["steps"] == 6
    assert (
        max(map(abs, lines["teacher"]["sets"]["a"]["forward_kl"])) < 1e-6 < lines["start"]["sets"]["a"]["forward_kl"][0]
    )
    assert [path.name for path in (workplace / "work").glob("*/3-*")] == ["3-start-student"]


@pytest.fixture
def outputs(monkeypatch) -> list[Any]:
    """What the losses of the training steps give from now on."""
    given: list[Any] = []
    keep = arms.RecordingLoss._keep
    monkeypatch.setattr(arms.RecordingLoss, "_keep", lambda self, out: given.append(out) or keep(self, out))
    return given


def test_shares_are_those_of_each_step(workplace, outputs, monkeypatch):
    """So random tokens are as many as LATF's in every step."""
    falls = ARMS["latf"].options | {"focus_schedule": "linear"}
    monkeypatch.setitem(ARMS, "latf", replace(ARMS["latf"], options=falls))
    again = workplace / "again.jsonl"
    lines = quality.read_results(workplace / "results.jsonl")
    again.write_text("".join(json.dumps(line) + "\n" for line in lines if line["arm"] in ("teacher", "start")))
    run(workplace, ["latf", "random_tokens"], "--results", str(again))
    latf, drawn = quality.read_results(again)[-2:]
    assert latf["shares"] == drawn["shares"] and min(latf["shares"]) < latf["shares"][0] == 1.0
    counts = [int(out.selected.sum()) for out in outputs]
    assert counts[: PLAN["steps"]] == counts[PLAN["steps"] :]


def test_random_tokens_are_drawn_at_the_share(workplace, outputs):
    """At a share of a half, half of each step's tokens, and not those that are hardest."""
    lines = quality.read_results(workplace / "results.jsonl")
    (latf,) = (line for line in lines if line["arm"] == "latf")
    latf["shares"] = [1.0] + [0.5] * (PLAN["steps"] - 1)
    halves = workplace / "halves.jsonl"
    halves.write_text("".join(json.dumps(line) + "\n" for line in lines if line["arm"] != "random_tokens"))
    run(workplace, ["random_tokens"], "--results", str(halves))
    found = quality.read_results(halves)[-1]
    assert (found["arm"], found["shares"]) == ("random_tokens", latf["shares"]) and len(outputs) == PLAN["steps"]
    counts = [(int(out.selected.sum()), int((out.difficulty > 0.0).sum())) for out in outputs]  # scores are above 0
    assert [selected for selected, _ in counts] == [counts[0][1]] + [valid // 2 for _, valid in counts[1:]]


def test_a_run_that_is_there_is_not_run_again_and_a_trained_student_is_kept(workplace, monkeypatch):
    before = (workplace / "results.jsonl").read_text()
    run(workplace, TRAINED)
    assert (workplace / "results.jsonl").read_text() == before

    evaluate = experiment.evaluate

    def stopped(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(workplace, ["reverse_kl"])
    monkeypatch.setattr(experiment, "evaluate", evaluate)
    monkeypatch.setattr(experiment.Experiment, "_train", None)  # so a second training would be an error
    # Nor is one of its lines lost by a kill while it is written.
    with (workplace / "results.jsonl").open("a") as file:
        file.write('{"arm": "reverse')
    assert [line["arm"] for line in run(workplace, ["reverse_kl"])].count("reverse_kl") == 1
    assert not list((workplace / "work").glob("*/3-reverse_kl"))


def test_a_trained_arm_stays_until_its_line_is_written(workplace, monkeypatch):
    def stopped(*_: Any) -> None:
        raise OSError("no space left on device")

    add = quality.add_result
    monkeypatch.setattr(quality, "add_result", stopped)
    with pytest.raises(OSError, match="no space"):
        run(workplace, ["low_temperature"])
    monkeypatch.setattr(quality, "add_result", add)
    monkeypatch.setattr(experiment.Experiment, "_train", None)
    assert run(workplace, ["low_temperature"])[-1]["mean_temperature"] == pytest.approx(math.exp(-0.5))


def test_a_sharpened_student_has_less_entropy(workplace):
    lines = {line["arm"]: line["sets"]["a"] for line in run(workplace, ["reverse_kl", "sharpened"])}
    of_each = zip(lines["sharpened"]["entropy"], lines["reverse_kl"]["entropy"], strict=True)
    assert all(0.85 * plain < sharp < plain for sharp, plain in of_each)


def test_what_an_arm_needs_runs_too(workplace, monkeypatch):
    asked: list[str] = []

    def nothing(self: Any, arm: str, seed: int | None, before: Any) -> dict[str, Any]:
        asked.append(arm)
        return {"arm": arm, "seed": seed, "plan": asdict(self.plan), "inputs": self.inputs}

    monkeypatch.setattr(experiment.Experiment, "run", nothing)
    run(workplace, ["random_tokens", "one_temperature"], "--results", str(workplace / "needs.jsonl"))
    assert asked == ["teacher", "start", "latf", "adakd", "one_temperature", "random_tokens"]


@pytest.mark.parametrize(
    ("arm", "expected"),
    {
        "reverse_kl": ("reverse_kl", 1.0, 0.0, 1.0),
        "idts": ("reverse_kl", 1.0, 0.5, 1.0),
        "idts_reversed": ("reverse_kl", 1.0, -0.5, 1.0),
        "low_temperature": ("reverse_kl", 1.0, 0.0, 0.6065306597126334),
        "latf_sooner": ("reverse_kl", None, 0.0, 1.0),
        "adakd_sooner": ("reverse_kl", None, 0.5, 1.0),
        "forward_kl": ("forward_kl", 1.0, 0.0, 1.0),
        "forward_kl_adakd": ("forward_kl", None, 0.5, 1.0),
        "abkd": ("alpha_beta", 1.0, 0.0, 1.0),
        "abkd_adakd": ("alpha_beta", None, 0.5, 1.0),
    }.items(),
)
def test_options_of_an_arm(tmp_path, arm, expected):
    args = arms.ArmConfig(str(tmp_path), report_to="none", **ARMS[arm].options)
    assert (args.divergence, args.focus_ratio, args.temperature_scale, args.base_temperature) == expected
    assert args.focus_beta == (0.83 if arm.endswith("sooner") else 0.99)


def test_another_plan_is_not_mixed_with_what_is_there(workplace, capsys):
    with pytest.raises(SystemExit):
        run(workplace, TRAINED, "--steps", "7")
    assert "holds runs of another plan, teacher or data (teacher, start, latf, " in capsys.readouterr().err
    write_jsonl(workplace / "more.jsonl", INSTRUCTIONS[:-1])
    with pytest.raises(SystemExit):
        run(workplace, TRAINED, "--train", str(workplace / "more.jsonl"))
    found = run(workplace, ["latf"], "--steps", "1", "--start_steps", "2", "--results", str(workplace / "other.jsonl"))
    start = {path.parent.name for path in (workplace / "work").glob("*/3-start-student")}
    assert len(start) == 2 and found  # a start of its own


def test_a_set_without_a_prompt_that_fits_is_refused(workplace):
    with pytest.raises(ValueError, match="no prompt with its reference is within max_length=20: raise it"):
        run(workplace, TRAINED, "--max_length", "20", "--results", str(workplace / "none.jsonl"))


def made_up(arm: str, seed: int, shift: float) -> dict[str, Any]:
    rng = random.Random(seed)
    tokens = [1, 3, 2, 6]
    numbers = {name: [rng.random() + shift for _ in tokens] for name in (*summary.DISTANCES, "rouge_l_greedy")}
    sampled = [[rng.random() + shift, rng.random() + shift] for _ in tokens]
    return {"arm": arm, "seed": seed, "mean_temperature": 1.0, "shares": [1.0], "train_cpu_seconds": 9.0,
            "plan": {}, "inputs": {"train": "1"}, "machine": "none", "versions": {"torch": "0"}, "date": "never",
            "commit": "none", "sets": {
        "a": {"key": list("wxyz"), "tokens": tokens, "rouge_l": sampled, **numbers}}}  # fmt: skip


def test_differences_are_paired_by_seed_and_prompt():
    first = [made_up("reverse_kl", seed, 0.0) for seed in (0, 1, 2)]
    second = [made_up("adakd", seed, 0.25) for seed in (2, 1)]
    for measure in summary.COLUMNS:
        found = summary.difference(first, second, "a", measure)
        # One shift of all prompts has no scatter at all, although the prompts have.
        assert found is not None and found.decided and len(found.seeds) == 2
        assert found.found == pytest.approx((0.25, 0.25, 0.25)) and found.seeds == pytest.approx([0.25, 0.25])
    line = second[0]["sets"]["a"]
    of_tokens = sum(v * t for v, t in zip(line["entropy"], line["tokens"], strict=True)) / sum(line["tokens"])
    assert summary.value(second[0], "a", "entropy") == pytest.approx(of_tokens)
    assert summary.value(second[0], "a", "rouge_l") == pytest.approx(mean(map(mean, line["rouge_l"])))
    assert summary.difference(first[:1], second, "a", "entropy") is None
    of_one_seed = summary.difference(first, second[:1], "a", "entropy")
    assert of_one_seed is not None and not of_one_seed.decided
    second[0]["inputs"]["train"] = "2"
    with pytest.raises(ValueError, match="seed 2 has lines of another plan, teacher or data"):
        summary.difference(first, second, "a", "entropy")


def test_seeds_that_disagree_decide_nothing():
    first = [made_up("reverse_kl", seed, 0.0) for seed in (0, 1)]
    found = summary.difference(first, [made_up("adakd", 0, 1.0), made_up("adakd", 1, -0.1)], "a", "entropy")
    assert found is not None and found.found.low is not None and found.found.low > 0.0 and not found.decided
    table = summary.differences_table([*first, made_up("adakd", 0, 1.0), made_up("adakd", 1, 1.0)])
    (row,) = [line for line in table.splitlines() if line.startswith("| + both (AdaKD)")]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["reverse KL", "2", "**+1.0** [+1.0, +1.0]<br>+1.0, +1.0"]


def test_the_table_of_arms_has_means_over_seeds():
    lines = [made_up("reverse_kl", seed, seed) for seed in (0, 1)]
    lines[1]["train_cpu_seconds"], lines[1]["shares"] = 10.0, [0.5, 0.3]
    (row,) = [line for line in summary.arms_table(lines).splitlines() if line.startswith("| reverse KL")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[:4] == ["2", "1.00", "0.70", "10"] and len(cells) == 4 + len(summary.COLUMNS)
    values = [summary.value(line, "a", "entropy") for line in lines]
    assert cells[-1] == f"{mean(values):.3f}"


def test_the_picture_is_drawn(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    lines = [made_up(arm, seed, 0.1 * number) for number, arm in enumerate(ARMS) for seed in (0, 1)]
    figure = summary.draw(pyplot, lines, {"text": "#000000", "back": "#ffffff", "ours": "#0072b2"})
    with pyplot.rc_context({"svg.fonttype": "none"}):
        figure.savefig(tmp_path / "a.svg")
    pyplot.close(figure)
    drawn = (tmp_path / "a.svg").read_text()
    assert all(arm.title in drawn for name, arm in ARMS.items() if name != "reverse_kl")
    assert "a, correlation 1.00" in drawn
