"""`adakd eval` and `adakd compare`: files, what is printed, stopping and going on, and every mistake in one line."""

from __future__ import annotations

import csv
import importlib
import json
import logging
import math
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from adakd_kernels.cli import main
from adakd_kernels.commands import eval as eval_command
from adakd_kernels.evaluation import FOUND, Settings, compare, distances, evaluate, intervals, load_prompts, sampling
from adakd_kernels.evaluation.evaluate import EvaluationError, read_results
from adakd_kernels.evaluation.prompts import Prompt
from adakd_kernels.integrations.transformers import AdaKDConfig, AdaKDTrainer

from .tiny_models import INSTRUCTIONS, save_pair, tiny_model, write_jsonl

pytestmark = pytest.mark.fast

SEEDS = ["10", "20"]
SECOND = [
    {"prompt": "cat rhymes with", "references": ["hat", "a bat"], "id": "cat"},
    {"text": "It has no prompt."},
    {"prompt": "tree rhymes with", "completion": "bee"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and data, and a whole evaluation in `whole`."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_pair(folder, "llama", chat_template=True)
    write_jsonl(folder / "first.jsonl", INSTRUCTIONS[:5])
    write_jsonl(folder / "second.jsonl", SECOND)
    assert main(command(folder, folder / "whole")) == 0
    return folder


def command(place: Path, out: Path | None, *flags: str, seeds: list[str] = SEEDS) -> list[str]:
    given = ["eval", "--model", str(place / "student"), "--teacher", str(place / "teacher"), "--data"]
    given += [str(place / "first.jsonl"), str(place / "second.jsonl"), "--seeds", *seeds, "--max_new_tokens", "8"]
    return [*given, "--batch_size", "2", "--use_cpu", *(["--output_dir", str(out)] if out else []), *flags]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_line(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(argv) == code
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("adakd")]
    assert captured.err.rstrip().endswith(line) and "Traceback" not in captured.err and not captured.out
    return line


def test_files_and_their_numbers(place: Path) -> None:
    out = place / "whole"
    answers = {f"answers-{name}-{seed}.jsonl" for name in ("first", "second") for seed in SEEDS}
    assert {path.name for path in out.iterdir()} == {"results.json", "results.csv", *answers}
    results = read_results(out)
    assert results["bootstrap"]["draws"] == 10_000 and results["bootstrap"]["level"] == 0.95
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    with (out / "results.csv").open() as file:
        table = {row["set"]: row for row in csv.DictReader(file)}
    for name, data, count in (("first", INSTRUCTIONS[:5], 5), ("second", [SECOND[0], SECOND[2]], 2)):
        part, scores = results["sets"][name], {}
        for seed in SEEDS:
            rows = rows_of(out / f"answers-{name}-{seed}.jsonl")
            references = [row.get("references") or [row.get("output") or row["completion"]] for row in data]
            assert [row["references"] for row in rows] == references and len(rows) == count
            for row in rows:
                found = max(scorer.score(text, row["answer"])["rougeL"].fmeasure for text in row["references"])
                assert row["rouge_l"] == 100 * found and 0 < row["tokens"] <= 8
            scores[seed] = mean(row["rouge_l"] for row in rows)
        found = part["rouge_l"]
        assert found["seeds"] == pytest.approx(scores) and found["mean"] == pytest.approx(mean(scores.values()))
        assert found["std"] == pytest.approx(stdev(scores.values()))
        asked = [row for row in part["per_prompt"] if "rouge_l" in row]
        totals = [mean(row["rouge_l"].values()) for row in asked]
        assert (found["low"], found["high"]) == intervals.estimate(totals)[1:]
        for measure in FOUND:
            written = [table[name][column] for column in (measure, f"{measure}_low", f"{measure}_high")]
            assert [float(text) for text in written] == [part[measure][key] for key in ("mean", "low", "high")]
        assert table[name]["seeds"] == "10 20" and float(table[name]["rouge_l_std"]) == found["std"]
    assert (results["sets"]["second"]["records"], results["sets"]["second"]["answered"]) == (3, 2)


def test_distances_are_those_of_the_trainers_evaluation(place: Path, tmp_path: Path) -> None:
    models = [
        AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32) for name in ("student", "teacher")
    ]
    args = AdaKDConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    trainer = AdaKDTrainer(*models, args, processing_class=tokenizer, eval_dataset=str(place / "first.jsonl"))
    expected = trainer.evaluate()
    part = read_results(place / "whole")["sets"]["first"]
    for measure in FOUND[1:-1]:
        assert part[measure]["mean"] == pytest.approx(expected[f"eval_{measure}"], rel=1e-5)
    rows = part["per_prompt"]
    totals, tokens = [row["entropy"] * row["tokens"] for row in rows], [row["tokens"] for row in rows]
    assert list(part["entropy"].values()) == pytest.approx(intervals.estimate(totals, tokens))
    assert sum(tokens) == part["tokens"] and 0 < part["entropy"]["mean"] < math.log(300)


def test_the_table_on_the_screen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(place, None, seeds=["10"])) == 0
    printed = capsys.readouterr().out
    part = read_results(place / "whole")["sets"]["first"]
    (line,) = [line for line in printed.splitlines() if line.startswith("| forward KL")]
    mean_, low, high = (part["forward_kl"][key] for key in ("mean", "low", "high"))
    assert line.split(" | ")[1].strip() == f"{mean_:.3f} [{low:.3f}, {high:.3f}]"
    (line,) = [line for line in printed.splitlines() if line.startswith("| ROUGE-L")]
    assert line.split(" | ")[1].strip().startswith(f"{part['rouge_l']['seeds']['10']:.1f} [")
    assert "first: 5 records, 5 answered, for each of the seeds 10, " in printed
    assert (
        "second: 3 records, 2 answered" in printed and "[95% interval of a bootstrap over the prompts, 10000" in printed
    )


def test_numbers_next_to_0_have_no_minus(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a teacher against itself."""
    shutil.copytree(place / "whole", tmp_path / "whole")
    results = read_results(place / "whole")
    results["sets"]["first"]["forward_kl"] = {"mean": -1e-9, "low": -2e-9, "high": 1e-9}
    for row in results["sets"]["first"]["per_prompt"]:
        row["forward_kl"] = -1e-9
    (tmp_path / "whole" / "results.json").write_text(json.dumps(results))
    assert "| 0.000 [0.000, 0.000] |" in eval_command.table(results)
    assert main(["compare", str(tmp_path / "whole"), str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    assert "+0.000 [+0.000, +0.000]" in printed and "-0.000" not in printed


def stops_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The function is interrupted at its n-th call."""
    function, calls = getattr(owner, name), list[int]()

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopped)


RUN = importlib.import_module("adakd_kernels.evaluation.evaluate")
STOPS: dict[str, tuple[Any, str, int]] = {
    "between the sets": (distances, "pad_batch", 4),
    "while it answers": (sampling, "generate", 6),
    "before a seed is noted": (RUN._Run, "save", 5),  # its answers are written
    "at the end": (RUN, "_means", 1),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_killed_run_ends_with_the_same_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: str
) -> None:
    with monkeypatch.context() as patch:
        stops_at(patch, *STOPS[stop])
        assert main(command(place, tmp_path / "out")) == 130
    assert f"adakd eval: interrupted; the same command goes on from {tmp_path / 'out'}" in capsys.readouterr().err
    stopped = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not stopped["complete"] and not (tmp_path / "out" / "results.csv").exists()
    assert "has not come to its end" in error_line(capsys, ["compare", str(place / "whole"), str(tmp_path / "out")])
    generated = list[int]()
    generate = sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda *args: generated.append(1) or generate(*args))
    assert main(command(place, tmp_path / "out")) == 0
    assert files_in(tmp_path / "out") == files_in(place / "whole")
    assert len(generated) < 8 or stop == "between the sets"  # 2 × (3 + 1) batches in all


def test_seeds_and_sets_are_added(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = ["--data", str(place / "first.jsonl")]
    assert main([*command(place, out, seeds=["10"]), *first]) == 0
    assert main([*command(place, out, seeds=["20"]), *first]) == 0
    assert list(read_results(out)["sets"]["first"]["rouge_l"]["seeds"]) == SEEDS
    assert main(command(place, out)) == 0
    found, whole = read_results(out), read_results(place / "whole")
    assert found["sets"] == whole["sets"]

    def refused(*args: Any) -> Any:
        raise AssertionError("something is computed again")

    monkeypatch.setattr(sampling, "generate", refused)
    monkeypatch.setattr(distances, "labelled_states", refused)
    before = files_in(out)
    assert main(command(place, out)) == 0 and files_in(out) == before


def test_greedy_answers_and_no_teacher(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["eval", "--model", str(place / "student"), "--data", f"mine={place / 'first.jsonl'}", "--greedy"]
    assert main([*given, "--max-new-tokens=8", "--use-cpu", "--output-dir", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json", "results.csv", "answers-mine-greedy.jsonl",
    }  # fmt: skip
    part = read_results(tmp_path / "out")["sets"]["mine"]
    assert part["rouge_l"]["std"] is None and part["forward_kl"] is None and "tokens" not in part
    model = AutoModelForCausalLM.from_pretrained(place / "student")
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    for row, record in zip(rows_of(tmp_path / "out" / "answers-mine-greedy.jsonl"), INSTRUCTIONS, strict=False):
        request = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
        asked = [{"role": "user", "content": request}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()
    printed = capsys.readouterr().out
    assert "mine: 5 records, 5 answered, greedily\n" in printed and "±" not in printed and "KL" not in printed


def test_an_adapter_is_evaluated_on_its_base(place: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(place / "student")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(place / "student").save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(place / "student").save_pretrained(tmp_path / "merged")
    found = []
    for name in ("adapter", "merged"):
        flags = ["--model", str(tmp_path / name), "--data", str(place / "first.jsonl"), "--max_new_tokens", "1"]
        assert main(command(place, tmp_path / f"out-{name}", *flags, seeds=["1"])) == 0
        found.append(read_results(tmp_path / f"out-{name}")["sets"]["first"])
    for measure in FOUND[1:]:
        assert found[0][measure]["mean"] == pytest.approx(found[1][measure]["mean"], rel=1e-4)
    assert found[0]["reverse_kl"] != read_results(place / "whole")["sets"]["first"]["reverse_kl"]


def test_what_is_too_long_is_cut_or_not_asked(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(place, tmp_path / "out", "--max_length", "44")) == 0
    prompts = load_prompts(place / "first.jsonl", AutoTokenizer.from_pretrained(place / "student"))
    asked = [prompt for prompt in prompts if len(prompt.prompt_ids) + 8 <= 44]
    part = read_results(tmp_path / "out")["sets"]["first"]
    assert 0 < len(asked) == part["answered"] < 5 and part["too_long"] == 5 - len(asked)
    labels = [prompt.sequences[0][1] for prompt in prompts]
    whole, left = ([sum(label != -100 for label in each[:n]) for each in labels] for n in (256, 44))
    assert part["tokens"] == sum(left) and any(0 < some < all_ for some, all_ in zip(left, whole, strict=True))
    assert f"{5 - len(asked)} prompts too long for max_length=44" in capsys.readouterr().out


def other_student(place: Path, folder: Path) -> Path:
    model = tiny_model("llama", vocab_size=len(AutoTokenizer.from_pretrained(place / "student")), seed=9)
    model.save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(place / "student").save_pretrained(folder / "other")
    return folder / "other"


def test_a_comparison_is_paired(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(other_student(place, tmp_path))]
    assert main(command(place, tmp_path / "other-run", *model, seeds=["20", "30"])) == 0
    capsys.readouterr()
    folders = [str(place / "whole"), str(tmp_path / "other-run")]
    assert main(["compare", *folders]) == 0
    printed = capsys.readouterr().out
    first, second = (read_results(folder) for folder in folders)
    differences, notes = compare(first, second)
    assert [(each.set, each.measure) for each in differences] == [(s, m) for s in ("first", "second") for m in FOUND]
    for each in differences:
        pairs = list(zip(*(results["sets"][each.set]["per_prompt"] for results in (first, second)), strict=True))
        if each.measure == "rouge_l":
            changes = [b["rouge_l"]["20"] - a["rouge_l"]["20"] for a, b in pairs if "rouge_l" in a]
            expected = intervals.estimate(changes)
            assert each.seeds == ("20",)
        else:
            changes = [(b[each.measure] - a[each.measure]) * a["tokens"] for a, b in pairs]
            expected = intervals.estimate(changes, [a["tokens"] for a, _ in pairs])
        assert each.difference == pytest.approx(expected) and each.second - each.first == pytest.approx(expected.mean)
        assert f"{expected.mean:+.{1 if each.measure == 'rouge_l' else 3}f} [" in printed
    assert notes == [f"{name}: ROUGE-L of the seeds that both have: 20" for name in ("first", "second")]
    assert all(f"note: {note}" in printed for note in notes) and "other-run − whole" in printed
    assert {each.difference for each in compare(first, first)[0]} == {(0.0, 0.0, 0.0)}
    second["sets"]["first"]["per_prompt"].reverse()
    assert compare(first, second) == (differences, notes)
    assert main(["compare", *folders, folders[0]]) == 0
    assert capsys.readouterr().out.count("| whole, ") == 12


def test_a_comparison_says_what_it_leaves_out(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(place / "first.jsonl"), "--max_records", "3", "--temperature", "0.7"]
    assert main(command(place, tmp_path / "few", *flags, "--teacher", str(other_student(place, tmp_path)))) == 0
    capsys.readouterr()
    differences, notes = compare(read_results(place / "whole"), read_results(tmp_path / "few"))
    assert [each.measure for each in differences] == ["rouge_l", "cross_entropy", "entropy"]
    assert {each.prompts for each in differences} == {3}
    assert notes == [
        "temperature differs: 1.0 against 0.7", "first: 3 prompts are in both, of 5 and 3",
        "the teachers differ, so forward_kl, reverse_kl, agreement are not compared",
    ]  # fmt: skip


def test_mistakes_of_a_comparison_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = str(place / "whole")
    shutil.copytree(whole, tmp_path / "renamed")
    text = (tmp_path / "renamed" / "results.json").read_text()
    (tmp_path / "renamed" / "results.json").write_text(text.replace('"first"', '"a"').replace('"second"', '"b"'))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("[1]")
    for folders, message in (
        ([whole], "a comparison needs two folders"),
        ([whole, str(tmp_path)], "no folder of an evaluation, results.json cannot be read (No such file or directory)"),
        ([whole, str(tmp_path / "broken")], "not what 'adakd eval' writes"),
        ([whole, str(tmp_path / "renamed")], "no set is in both: first, second against a, b; name the sets alike"),
    ):
        assert message in error_line(capsys, ["compare", *folders])


def test_mistakes_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "a", "output": []}])
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])
    only = ["eval", "--model", str(place / "student")]
    for argv, message in (
        (only, "the following arguments are required: --data"),
        (command(place, None, "--teachr", "x"), "unrecognized arguments: --teachr x; did you mean --teacher?"),
        (command(place, None, "--model", "./nowhere"), "model ./nowhere: no such folder"),
        (command(place, None, "--data", str(bad)), f"{bad}:1: field 'output' must be a string"),
        (command(place, None, "--data", "none.jsonl"), "none.jsonl: cannot be read: No such file"),
        (command(place, None, "--data", str(text), str(text)), "data: two sets are called text"),
        (command(place, None, "--top_p", "0"), "top_p must be in (0, 1], got 0.0"),
        (command(place, None, "--temperature", "0"), "temperature must be above 0, got 0.0"),
        (command(place, None, "--batch_size", "0"), "batch_size must be 1 or more"),
        (command(place, None, "--max_records", "0"), "max_records must be 1 or more, got 0"),
        (command(place, None, seeds=["1", "1"]), "seeds must be different numbers, one at least, got [1, 1]"),
        (command(place, None, "--greedy"), "seeds says how to sample, and greedy not to sample: give one"),
        (command(place, place / "first.jsonl"), "first.jsonl: cannot be written to: [Errno 17] File exists"),
        (command(place, None, "--max_length", "8"), "max_new_tokens=8 leaves no room for a prompt within max_length=8"),
        (command(place, None, "--max_length", "999"), "max_length must be 256 or less, which is all that the model"),
        ([*only, "--data", str(text), "--max_new_tokens", "8"], "set 'text': nothing to measure, as no record has"),
        (command(place, place / "whole", "--temperature", "2"), "holds an evaluation with temperature 1.0, and this"),
        (command(place, place / "whole", "--max_records", "1"), "has an evaluation on another set 'first', of 5"),
    ):  # fmt: skip
        assert message in error_line(capsys, argv), message


def test_a_model_that_changed_is_not_gone_on_with(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = other_student(place, tmp_path)
    flags = ["--model", str(model), "--data", str(place / "first.jsonl")]
    argv = command(place, tmp_path / "out", *flags, seeds=["1"])
    assert main(argv) == 0
    # The same weights once more: other times of the files, as of a model that comes from a hub or from its cache.
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model)
    assert main(argv) == 0
    tiny_model("llama", vocab_size=300, seed=10).save_pretrained(model)
    assert "holds an evaluation with other weights of the model: give another output_dir" in error_line(capsys, argv)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    del results["settings"]["model_weights"]
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    assert "holds an evaluation of an older version" in error_line(capsys, argv)


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text, f"{text}-1", [5, 6], [text], [([5, 6, 7], [-100, -100, 7])]) for text in texts]


def test_a_refused_set_leaves_the_folder_as_it_is(place: Path, tmp_path: Path) -> None:
    """And one that is not finished is named, whichever of the sets were run to the end."""
    student, tokenizer = (kind.from_pretrained(place / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    settings = Settings(greedy=True, max_new_tokens=1, max_length=16)
    evaluate(student, tokenizer, {"a": prompts_of("one", "two")}, settings, folder=tmp_path)
    before = files_in(tmp_path)
    for refused in ({"c": prompts_of("one"), "a": prompts_of("three")}, {"b": prompts_of("one"), "c": []}):
        with pytest.raises(EvaluationError, match=r"another set 'a'|set 'c': nothing to measure"):
            evaluate(student, tokenizer, refused, settings, folder=tmp_path)
        assert files_in(tmp_path) == before
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stops_at(patch, sampling, "generate", 1)
        evaluate(student, tokenizer, {"a": prompts_of("one", "two"), "b": prompts_of("one")}, settings, folder=tmp_path)
    evaluate(student, tokenizer, {"a": prompts_of("one", "two")}, settings, folder=tmp_path)
    with pytest.raises(
        EvaluationError, match="the evaluation of b has not come to its end: run its 'adakd eval' again"
    ):
        read_results(tmp_path)


def test_references_that_rouge_does_not_read_are_warned_of(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, tokenizer = (kind.from_pretrained(place / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    sets = {"mixed": prompts_of("Привет", "hello"), "other": prompts_of("Привет", "мир")}
    with caplog.at_level(logging.WARNING, "adakd_kernels"):
        evaluate(student, tokenizer, sets, Settings(greedy=True, max_new_tokens=1, max_length=16), folder=tmp_path)
    assert caplog.messages == [
        "set 'other': rouge-score reads the letters a to z and digits alone, and no reference has one: rouge_l is 0"
    ]


def test_a_measure_that_is_not_finite_ends_with_1(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = AutoModelForCausalLM.from_pretrained(place / "student")
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(place / "student").save_pretrained(tmp_path / "broken")
    argv = command(place, tmp_path / "out", "--model", str(tmp_path / "broken"))
    line = error_line(capsys, argv, code=1)
    assert "set 'first', record" in line and "forward_kl is nan, which is not finite" in line


def test_from_python(place: Path, tmp_path: Path) -> None:
    """The public functions give what the command writes, and leave the models in their mode."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(place / name).train() for name in ("student", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    sets = {name: load_prompts(place / f"{name}.jsonl", tokenizer) for name in ("first", "second")}
    settings = Settings(seeds=(10, 20), max_new_tokens=8, max_length=256, batch_size=2)
    found = evaluate(student, tokenizer, sets, settings, folder=tmp_path, teacher=teacher)
    assert found["sets"] == read_results(place / "whole")["sets"] and student.training and teacher.training


def test_python_knows_the_models_by_their_weights(place: Path, tmp_path: Path) -> None:
    """As the student changes from epoch to epoch, without a word about it in `about`."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("student", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    sets = {"first": load_prompts(place / "first.jsonl", tokenizer)}
    settings = Settings(greedy=True, max_new_tokens=1, max_length=256)
    found = evaluate(student, tokenizer, sets, settings, folder=tmp_path / "a", teacher=teacher)
    assert evaluate(student, tokenizer, sets, settings, folder=tmp_path / "a", teacher=teacher) == found
    with pytest.raises(EvaluationError, match="with other weights of the teacher: give another output_dir"):
        evaluate(student, tokenizer, sets, settings, folder=tmp_path / "a", teacher=student)
    with torch.no_grad():
        student.model.norm.weight.add_(0.1)
    with pytest.raises(EvaluationError, match="with other weights of the model: give another output_dir"):
        evaluate(student, tokenizer, sets, settings, folder=tmp_path / "a", teacher=teacher)
    other = evaluate(student, tokenizer, sets, settings, folder=tmp_path / "b", teacher=teacher)
    assert [each.measure for each in compare(found, other)[0]] == list(FOUND) and compare(found, other)[1] == []
    far = evaluate(student, tokenizer, sets, settings, folder=tmp_path / "c", teacher=student)
    differences, notes = compare(found, far)
    assert [each.measure for each in differences] == ["rouge_l", "cross_entropy", "entropy"]
    assert notes == ["the teachers differ, so forward_kl, reverse_kl, agreement are not compared"]
    alone = evaluate(student, tokenizer, sets, settings, folder=tmp_path / "d")
    assert compare(alone, alone)[1] == []
    assert compare(found, alone)[1][-1].startswith("one of them notes no weights of a teacher, so forward_kl")
    # As an older version left them: the teachers may be any.
    for results in (found, other):
        del results["settings"]["teacher_weights"]
    assert len(compare(found, other)[0]) == 3
