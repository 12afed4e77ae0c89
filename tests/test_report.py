"""`adakd report`: what a trainer records for it, the numbers on the page, and the page in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adakd_kernels import reference
from adakd_kernels.adaptive import inverse_difficulty_temperature, select_tokens
from adakd_kernels.cli import main
from adakd_kernels.integrations.transformers import AdaKDTrainer
from adakd_kernels.report.figures import THEMES, Curve, Panel, _legend, panels
from adakd_kernels.report.page import SHADES, _ink, _plain, _visible, write_report
from adakd_kernels.report.runs import read_runs
from adakd_kernels.trainer import costs
from adakd_kernels.trainer.token_file import TOKEN_FILE, read_tokens, write_tokens
from adakd_kernels.trainer.token_records import MOST_TOKENS, token_texts

from .tiny_models import tiny_model, tiny_tokenizer, token_records
from .trainer_process import MOVING, PLAIN, config, resumed_trainer, uneven_run

pytestmark = pytest.mark.fast

EVIL = "</script><b onclick=\"alert('1')\">&amp; {{ 7 }}\n"


def make_trainer(folder: Path, **options: Any) -> AdaKDTrainer:
    """Six steps in fp64 with an evaluation after every third, under a share that moves."""
    named = ("train_dataset", "eval_dataset", "processing_class")
    data = {name: options.pop(name) for name in named if name in options}
    given = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "per_device_train_batch_size": 2, **MOVING}
    return AdaKDTrainer(
        model=tiny_model("llama", vocab_size=300, seed=1).double(),
        teacher=tiny_model("llama", layers=2, vocab_size=300, seed=2).double(),
        args=config(folder, **{**PLAIN, **given, **options}),
        **{
            "train_dataset": token_records(16),
            "eval_dataset": token_records(7, seed=5),
            "processing_class": tiny_tokenizer(),
            **data,
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a report shows, as `adakd train` leaves it."""
    folder = tmp_path_factory.mktemp("report") / "first"
    trainer = make_trainer(folder)
    trainer.train()
    trainer.save_state()
    return folder


def expected_tokens(student: Any, teacher: Any, records: list[Any], focus_ratio: float) -> list[list[Any]]:
    """Difficulty, temperature, rank and selection of each token with a label, by the reference, for each record."""
    difficulties = []
    for record in records:
        ids, labels = torch.tensor([record["input_ids"]]), torch.tensor(record["labels"])[1:]
        with torch.no_grad():
            s, t = (model.eval()(input_ids=ids).logits[0, :-1][labels != -100] for model in (student, teacher))
        difficulties.append(reference.squared_hellinger(s, t))
    difficulty = torch.cat(difficulties)
    selected = select_tokens(difficulty, focus_ratio)
    temperature = inverse_difficulty_temperature(difficulty, selected)
    rank = (difficulty.unsqueeze(0) > difficulty.unsqueeze(1)).sum(1) + 1
    columns = (
        column.split([len(each) for each in difficulties]) for column in (difficulty, temperature, rank, selected)
    )
    return [list(zip(*(column.tolist() for column in each), strict=True)) for each in zip(*columns, strict=True)]


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_tokens_before_and_after_training(tmp_path: Path, route: str) -> None:
    trainer = make_trainer(tmp_path, logits_route=route, token_records=3)
    records, tokenizer = token_records(7, seed=5), tiny_tokenizer()
    before = expected_tokens(trainer.model, trainer.teacher, records[:3], 1.0)
    trainer.train()
    share = float(trainer.loss_fn.focus_ratio)
    after = expected_tokens(trainer.model, trainer.teacher, records[:3], share)
    assert share < 1.0
    lines = read_tokens(tmp_path)
    assert [(line["step"], line["record"], line["source"]) for line in lines] == [
        (step, str(row), "eval") for step in (0, 6) for row in range(3)
    ]
    for line, record, expected in zip(lines, records[:3] * 2, before + after, strict=True):
        assert line["focus_ratio"] == (1.0 if line["step"] == 0 else share) and line["left_out"] == 0
        assert line["of"] == sum(len(each) for each in before)
        prompt, *answer = line["tokens"]
        found = [[token[name] for name in ("difficulty", "temperature", "rank", "selected")] for token in answer]
        for got, wanted in zip(found, expected, strict=True):
            assert got[:2] == pytest.approx(wanted[:2], rel=1e-5) and got[2:] == list(wanted[2:])
        assert prompt.keys() == {"text"}
        assert "".join(token["text"] for token in line["tokens"]) == tokenizer.decode(record["input_ids"])


def test_recording_changes_no_weight(tmp_path: Path) -> None:
    """Under dropout, so that a random number more would be seen; the records are those of the training."""
    weights = []
    for count in (0, 4):
        trainer = resumed_trainer(tmp_path / str(count), token_records=count)
        trainer.args.save_strategy = "no"
        trainer.train()
        weights.append(trainer.model.state_dict())
        assert (tmp_path / str(count) / TOKEN_FILE).exists() == bool(count)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert {line["source"] for line in read_tokens(tmp_path / "4")} == {"train"}


def test_a_resumed_run_goes_on_with_its_records(tmp_path: Path) -> None:
    def train(resume: bool) -> list[int]:
        options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "eval_strategy": "no"}
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=resume)
        return [line["step"] for line in read_tokens(tmp_path)]

    assert train(resume=False) == [0] * 4 + [2] * 4
    whole = read_tokens(tmp_path)
    # As a run leaves it that was killed behind its first step: nothing of the end.
    shutil.rmtree(tmp_path / "checkpoint-2")
    write_tokens(tmp_path, [line for line in whole if line["step"] == 0])
    train(resume=True)
    assert read_tokens(tmp_path) == whole
    # The records of an older version's run begin where it is resumed.
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / TOKEN_FILE).unlink()
    assert train(resume=True) == [1] * 4 + [2] * 4
    # A new run in the same folder has none of the former one's.
    write_tokens(tmp_path, [{**line, "step": 7} for line in whole])
    train(resume=False)
    assert read_tokens(tmp_path) == whole


def test_a_killed_run_has_what_it_measured(tmp_path: Path) -> None:
    class Killed(AdaKDTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(tmp_path)
    trainer.__class__ = Killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sorted({line["step"] for line in read_tokens(tmp_path)}) == [0, 3]


def test_the_best_model_is_measured_where_it_is_kept(tmp_path: Path) -> None:
    """At a learning rate that makes the student worse, it is that of the first evaluation."""
    options = {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True, "learning_rate": 30.0}
    options["metric_for_best_model"] = "forward_kl"
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    lines = [line for line in read_tokens(tmp_path) if line["step"]]
    assert {line["step"] for line in lines} == {trainer.state.best_global_step} == {3}
    expected = expected_tokens(
        trainer.model, trainer.teacher, token_records(4, seed=5), float(trainer.loss_fn.focus_ratio)
    )
    found = [token["difficulty"] for line in lines for token in line["tokens"] if "rank" in token]
    assert found == pytest.approx([each[0] for record in expected for each in record], rel=1e-5)


def test_records_of_several_sets_take_turns_and_long_ones_are_cut(tmp_path: Path) -> None:
    long = [5, *([6, 7] * 400)]
    sets = {"short": token_records(5, seed=3), "long": [{"input_ids": long, "labels": [-100, *long[1:]], "id": "a/1"}]}
    trainer = make_trainer(tmp_path, eval_dataset=sets, max_steps=1, eval_strategy="no", processing_class=None)
    trainer.model.config.max_position_embeddings = trainer.teacher.config.max_position_embeddings = 1024
    trainer.train()
    lines = read_tokens(tmp_path)[:4]
    assert [line["record"] for line in lines] == ["0", "a/1", "1", "2"]
    assert [line["left_out"] for line in lines] == [0, len(long) - 1 - MOST_TOKENS, 0, 0]
    assert len(lines[1]["tokens"]) == 1 + MOST_TOKENS and lines[1]["tokens"][1]["text"] == "6 "


def test_two_ranks_write_what_one_does(tmp_path: Path, two_ranks: Path) -> None:
    uneven_run(tmp_path, "hidden", "step", batch_size=8, accumulation=1)
    alone, together = read_tokens(tmp_path), read_tokens(two_ranks / "uneven-hidden-step")
    assert [line["step"] for line in alone] == [line["step"] for line in together] == [0] * 4 + [5] * 4
    for one, two in zip(alone, together, strict=True):
        assert two["focus_ratio"] == pytest.approx(one["focus_ratio"])
        for a, b in zip(one["tokens"], two["tokens"], strict=True):
            assert b.pop("text") == a.pop("text") and b == pytest.approx(a, rel=1e-5)


def test_token_texts() -> None:
    """Put together they are the text; a character of several tokens belongs to the last."""
    tokenizer = tiny_tokenizer()
    text = "A word is 🙂, señor.\n<eos>"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer.decode, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert texts[texts.index("🙂") - 3 : texts.index("🙂")] == ["", "", ""]
    cut = token_texts(tokenizer.decode, ids[: texts.index("🙂")])
    assert "".join(cut) == tokenizer.decode(ids[: texts.index("🙂")])

    def without_leading_space(ids: list[int]) -> str:  # as sentencepiece has it
        return "".join(f" w{token}" for token in ids)[1:]

    assert token_texts(without_leading_space, [3, 4, 3]) == ["w3", " w4", " w3"]
    assert token_texts(None, [3, 4]) == ["3 ", "4 "]


LINE: dict[str, Any] = {
    "step": 0, "source": "eval", "record": "0", "measure": "hellinger", "focus_ratio": 1.0, "of": 1, "left_out": 0,
    "tokens": [{"text": "a", "difficulty": 0.5, "temperature": 1.0, "rank": 1, "selected": True}],
}  # fmt: skip


def test_every_character_of_a_text_comes_back(tmp_path: Path) -> None:
    lines = [{**LINE, "tokens": [{"text": "one\u2028two\u2029three\x85four\x0b\x1c\r\nfive"}]}, LINE]
    write_tokens(tmp_path, lines)
    assert read_tokens(tmp_path) == lines


@pytest.mark.parametrize("name", LINE)
def test_a_line_without_one_of_its_fields_is_refused(tmp_path: Path, name: str) -> None:
    write_tokens(tmp_path, [LINE, {key: value for key, value in LINE.items() if key != name}])
    with pytest.raises(ValueError, match=f"line 2 is no record of tokens: KeyError.'{name}'"):
        read_tokens(tmp_path)


def test_what_training_costs_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each look moves by 1, so that a step takes 1; evaluations and checkpoints take 100."""
    time = [0.0]

    def look() -> float:
        time[0] += 1.0
        return time[0]

    class Slow(AdaKDTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            time[0] += 100.0
            return super().evaluate(*args, **kwargs)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            time[0] += 100.0
            super()._save_checkpoint(*args, **kwargs)

    monkeypatch.setattr(costs.time, "perf_counter", look)
    monkeypatch.setattr("adakd_kernels.trainer.trainer.peak_memory", lambda device: 3 * 2**30)
    records = token_records(16)
    trainer = make_trainer(
        tmp_path, train_dataset=records, logging_steps=2, eval_steps=2, save_strategy="steps", save_steps=3
    )
    trainer.__class__ = Slow
    for resume in (False, str(tmp_path / "checkpoint-3")):
        trainer.train(resume_from_checkpoint=resume)
        labels = [sum(label != -100 for label in record["labels"][1:]) for record in records]
        lines = [log for log in trainer.state.log_history if "loss" in log]
        expected = [sum(labels[4 * n : 4 * n + 4]) / 2 for n in range(3)]
        # A run that is resumed behind its third step has not counted that one.
        expected[1] = expected[1] if not resume else float(sum(labels[6:8]))
        assert [line["tokens_per_second"] for line in lines] == expected
        assert [line["peak_memory_gib"] for line in lines] == [3.0] * 3


def test_peak_memory_grows_with_what_is_held() -> None:
    before = costs.peak_memory(torch.device("cpu"))
    held = torch.ones(before // 8 + 2**25)  # fp32: half of it, and 128 MiB
    after = costs.peak_memory(torch.device("cpu"))
    assert 2**20 < before < after and after < before + 2 * 4 * held.numel()


@pytest.mark.parametrize("value", [-1, 1.5, "all"])
def test_a_wrong_number_of_records_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^token_records must be a number of records, 0 or more, got"):
        config(tmp_path, token_records=value)


class Page(HTMLParser):
    """What stands on a page: its tokens, tables, texts, pictures and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.tokens: list[tuple[dict[str, str], str]] = []
        self.given: list[str] = []
        self.cells: list[list[str]] = []
        self.headings: list[str] = []
        self.code = ""
        self.feed(text)
        self.close()
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)
        if "data-rank" in found:
            self.tokens.append((found, ""))
        if found.get("class") == "given":
            self.given.append("")
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        place, last = self.open[-1:], self.tags[-1][1] if self.tags else {}
        if place in (["script"], ["style"]):
            self.code += data
        elif place == ["span"] and "data-rank" in last:
            self.tokens[-1] = (self.tokens[-1][0], self.tokens[-1][1] + data)
        elif place == ["span"] and last.get("class") == "given":
            self.given[-1] += data
        elif place in (["td"], ["th"]):
            self.cells[-1][-1] += data
        elif place and place[0] in ("h1", "h2", "h3", "h4"):
            self.headings[-1] += data


def report(tmp_path: Path, *runs: Path) -> Page:
    assert main(["report", *map(str, runs), "--output_dir", str(tmp_path / "out")]) == 0
    return Page((tmp_path / "out" / "report.html").read_text())


@pytest.fixture(scope="module")
def reported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run, which lacks nothing."""
    out = tmp_path_factory.mktemp("one") / "out"
    (found,) = write_report([run], out)
    assert found.missing == []
    return out


def test_the_page_has_the_numbers_of_the_run(run: Path, reported: Path) -> None:
    page = Page((reported / "report.html").read_text())
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    training = [log for log in logs if "loss" in log]
    held_out = [log for log in logs if "eval_loss" in log]
    rows = {tuple(row) for row in page.cells}

    def shown(step: int, *values: float) -> tuple[str, ...]:
        return (str(step), *(f"{value:.4g}" for value in values))

    for log in training:
        step = log["step"]
        reference_loss = f"{log['loss_reference']:.4g}" if log["loss_reference"] else "–"  # none in the warm-up
        assert (*shown(step, log["loss"], log["loss_ema"]), reference_loss) in rows
        assert shown(step, log["focus_ratio"]) in rows and shown(step, log["tokens_per_second"]) in rows
        assert shown(step, log["peak_memory_gib"]) in rows
        for name in ("difficulty", "temperature"):
            assert shown(step, *(log[f"{name}_{p}"] for p in ("p10", "p50", "p90"))) in rows
    for log in held_out:
        assert shown(log["step"], log["eval_forward_kl"], log["eval_reverse_kl"]) in rows
    first, last = (f"{log['eval_agreement']:.4g}" for log in (held_out[0], held_out[-1]))
    assert ("held out: agreement", f"{first} → {last}") in rows
    assert len(training) == 6 and len(held_out) == 2

    lines = sorted(read_tokens(run), key=lambda line: (line["record"], line["step"]))
    tokens = [(line, token) for line in lines for token in line["tokens"] if "rank" in token]
    assert len(tokens) == len(page.tokens) > 0
    shares = set()
    for (line, token), (attributes, text) in zip(tokens, page.tokens, strict=True):
        assert attributes["data-difficulty"] == f"{token['difficulty']:.4g}"
        assert attributes["data-temperature"] == f"{token['temperature']:.4g}"
        assert attributes["data-rank"] == str(token["rank"]) and attributes["data-of"] == str(line["of"])
        assert attributes["data-selected"] == ("yes" if token["selected"] else "no")
        classes = attributes["class"].split()
        assert ("s" in classes) == token["selected"]
        assert f"d{min(7, int(8 * math.sqrt(token['difficulty'])))}" in classes
        assert text == (token["text"].replace("\n", "↵\n") or "▯")
        shares.add(token["selected"])
    assert shares == {True, False}


def test_nothing_on_the_page_needs_the_network(reported: Path) -> None:
    page = Page((reported / "report.html").read_text())
    links = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "srcset")]
    assert len([link for link in links if link.startswith("data:image/png;base64,")]) == 2 * 7
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"https?:|//\w|@import|url\(|fetch|XMLHttp|import\(", page.code)
    assert not {"iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    pictures = {path.name for path in reported.glob("*.png")}
    assert pictures == {
        f"{name}.png" for name in ("loss", "share", "difficulty", "temperature", "held_out", "throughput", "memory")
    }
    for picture in pictures:
        with Image.open(reported / picture) as image:
            assert image.size == (960, 672)
            assert len(image.convert("RGB").getcolors(2**20) or ()) > 20  # something is drawn


def test_texts_of_data_stay_texts(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<i>$x$ & {{ 7 }}"
    shutil.copytree(run, folder)
    lines = read_tokens(folder)
    for line in lines:
        line["record"] = EVIL
        line["tokens"] = [{"text": EVIL}, *line["tokens"][1:]]
        line["tokens"][-1]["text"] = EVIL
        line["tokens"][-2]["text"] = ""
        line["tokens"][-2]["difficulty"] = line["tokens"][-2]["temperature"] = None
    write_tokens(folder, lines)
    page = report(tmp_path, folder)
    assert page.given == [EVIL] * len(lines)
    texts = [text for _, text in page.tokens]
    assert texts.count(EVIL.replace("\n", "↵\n")) == texts.count("▯") == len(lines)
    assert not {"b", "i"} & {tag for tag, _ in page.tags}
    assert page.headings[0] == folder.name
    assert [found["data-difficulty"] for found, text in page.tokens if text == "▯"] == ["–"] * len(lines)


@pytest.mark.parametrize(
    "text, token, given",
    [
        ("\u200b", "[U+200B]", "[U+200B]"),
        ("\ufeffa", "[U+FEFF]a", "[U+FEFF]a"),
        ("a\u202eb", "a[U+202E]b", "a[U+202E]b"),
        ("\x00\x1b\x7f", "[U+0000][U+001B][U+007F]", "[U+0000][U+001B][U+007F]"),
        ("\u2028\x85", "[U+2028][U+0085]", "[U+2028][U+0085]"),
        ("\U000e0001", "[U+E0001]", "[U+E0001]"),
        ("\r\n\r\ta", "↵\n[U+000D]\ta", "\n[U+000D]\ta"),
        ("\u200d", "[U+200D]", "[U+200D]"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
        ("\ufe0f", "◌\ufe0f", "\ufe0f"),
        ("e\u0301 é 你\u3000", "e\u0301 é 你\u3000", "e\u0301 é 你\u3000"),
        ("", "▯", ""),
    ],
)
def test_every_token_has_something_to_see(text: str, token: str, given: str) -> None:
    assert (_visible(text), _plain(text)) == (token, given)


def line_of(text: str, **changes: Any) -> dict[str, Any]:
    return {**LINE, "tokens": [{"text": "\u202ethe prompt"}, {**LINE["tokens"][0], "text": text}], **changes}


def test_equal_records_of_one_run_stay_apart(tmp_path: Path) -> None:
    """Each beside its own later measurement, and beside that of another run which has as many."""
    lines = [line_of("a", record=name, step=step) for step in (0, 6) for name in ("first", "copy")]
    for name in ("one", "two"):
        write_tokens(tmp_path / name, [*lines, line_of("b", record="last")])
    (tmp_path / "two" / TOKEN_FILE).write_text((tmp_path / "one" / TOKEN_FILE).read_text())
    write_tokens(tmp_path / "three", [line_of("b"), line_of("b", record="more")])
    page = report(tmp_path, *(tmp_path / name for name in ("one", "two", "three")))
    at = [number for number, heading in enumerate(page.headings) if heading.startswith("Held-out record")]
    found = {page.headings[a]: page.headings[a + 1 : b] for a, b in pairwise([*at, len(page.headings)])}
    both = [f"{run}, step {when}" for run in ("one", "two") for when in ("0 (before training)", "6 (latest)")]
    start = "step 0 (before training)"
    assert found.pop("Held-out record more")[0] == f"three, {start}"
    assert found == {
        "Held-out record first": both, "Held-out record copy": both,
        "Held-out record last": [f"{run}, {start}" for run in ("one", "two", "three")],
    }  # fmt: skip
    assert set(page.given) == {"[U+202E]the prompt"}


def test_42_runs_look_unlike() -> None:
    curves = [Curve(run, "loss", [1, 2], [0.5, 0.25]) for run in range(42)]
    panel = Panel("loss", "", "", "", curves)
    for theme in THEMES.values():
        handles = _legend(panel, [f"run {number}" for number in range(42)], theme)
        assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 42
        assert len({handle.get_marker() for handle in handles[:7]}) == 7


def test_several_runs_stand_side_by_side(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In columns; a record that both have is shown once with the tokens of both."""
    other = tmp_path / "other" / "first"
    trainer = make_trainer(other, focus_ratio=0.5, temperature_scale=0.0)
    trainer.train()
    trainer.save_state()
    capsys.readouterr()
    page = report(tmp_path, run, other)
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out' / 'report.html'}\n" and captured.err == ""
    assert page.headings[0] == f"{run.parent.name}/first, other/first"
    names = [f"{run.parent.name}/first", "other/first"]
    assert page.cells[0] == ["", *names]
    shares = []
    for each in (run, other):
        logs = json.loads((each / "trainer_state.json").read_text())["log_history"]
        shares.append([log["focus_ratio"] for log in logs if "loss" in log][-1])
    assert shares[1] == 0.5 != shares[0]
    assert ["share of selected tokens", f"1 → {shares[0]:.4g}", "0.5 → 0.5"] in page.cells
    assert ["step", *(f"{name}: {part} KL" for name in names for part in ("forward", "reverse"))] in page.cells
    articles = [heading for heading in page.headings if heading.startswith("Held-out record")]
    assert len(articles) == 4
    first = page.headings.index(articles[0]) + 1
    assert page.headings[first : first + 4] == [
        f"{name}, {when}" for name in names for when in ("step 0 (before training)", "step 6 (latest)")
    ]


def without(folder: Path, what: str) -> None:
    """Make a run that lacks something."""
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text())
    logs = state["log_history"]
    if what == "state":
        file.unlink()
        return
    if what == "whole state":
        file.write_text(file.read_text()[:-40])
        return
    if what == "tokens":
        (folder / TOKEN_FILE).unlink()
    elif what == "whole tokens":
        with (folder / TOKEN_FILE).open("a") as tokens:
            tokens.write('{"step": 1}\n')
    elif what == "evaluation":
        logs = [log for log in logs if "eval_loss" not in log]
    elif what == "KLs":
        logs = [{name: value for name, value in log.items() if not name.endswith("_kl")} for log in logs]
    elif what == "training":
        logs = [log for log in logs if "loss" not in log]
    else:
        names = {"AdaKD": ("focus_ratio",), "costs": ("tokens_per_second", "peak_memory_gib")}[what]
        logs = [{name: value for name, value in log.items() if name not in names} for log in logs]
    file.write_text(json.dumps({**state, "log_history": logs}))


@pytest.mark.parametrize(
    "what, said, lost",
    [
        ("state", ["There is no trainer_state.json", "lower save_steps"], {"loss", "held_out", "memory"}),
        ("whole state", ["trainer_state.json cannot be read", "lower save_steps"], {"loss", "held_out", "memory"}),
        ("tokens", ["_tokens.jsonl is missing", "token_records above 0"], set()),
        ("whole tokens", ["_tokens.jsonl cannot be read (line 9 is no record"], set()),
        ("evaluation", ["There was no evaluation: give the run an eval_file"], {"held_out"}),
        ("KLs", ["The evaluations have no KLs"], {"held_out"}),
        ("training", ["no log lines of the training: set logging_steps lower"], {"loss", "share", "throughput"}),
        ("AdaKD", ["no share, difficulties and temperatures: a trainer without AdaKD"], {"share"}),
        ("costs", ["no throughput: an older version wrote them", "no memory: an older"], {"throughput", "memory"}),
    ],
)  # fmt: skip
def test_the_page_says_what_is_missing_and_how_to_get_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, said: list[str], lost: set[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    without(folder, what)
    (found,) = read_runs([folder])
    assert all(part in " ".join(found.missing) for part in said)
    assert bool(found.tokens) == ("tokens" not in what)
    drawn = {panel.name for panel in panels([found])}
    assert not drawn & lost and (drawn or "state" in what)
    if what in ("state", "tokens"):
        page = report(tmp_path, folder)
        text, printed = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().err
        assert all(part in text and part in printed for part in found.missing)
        assert "What is missing" in page.headings and bool(page.tokens) == bool(found.tokens)


def test_the_newest_state_is_taken(run: Path, tmp_path: Path) -> None:
    """A run that ended, and was then resumed and killed, has it in its last whole checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    newer = {**state, "global_step": 9, "log_history": [*state["log_history"], {"step": 9, "loss": 0.125}]}
    for step, text in ((8, json.dumps(state)), (9, json.dumps(newer)), (12, "{")):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    for _ in range(2):
        (found,) = read_runs([folder])
        assert found.training[-1] == {"step": 9, "loss": 0.125}
        (folder / "trainer_state.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "runs, said",
    [
        (["nowhere"], "run nowhere: no such folder; give the output_dir of a training run"),
        (["empty"], "run empty holds neither trainer_state.json, nor a checkpoint with one, nor _tokens.jsonl"),
        (["run", "run/../run"], "run run/../run is named twice"),
        ([], "the following arguments are required: RUN"),
        (["run", "--output_dir", "run/trainer_state.json"], "output_dir run/trainer_state.json: cannot be written to"),
        (["run", "--outputdir", "x"], "did you mean --output_dir?"),
    ],
)
def test_mistakes_are_one_line(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run")
    Path("empty").mkdir()
    assert main(["report", *runs]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("adakd report: error: ") and said in line


def test_without_matplotlib_the_cure_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("adakd_kernels.report", "adakd_kernels.commands.rep"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run)]) == 2
    assert "error: a report needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_neither_models_nor_transformers_are_needed(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('transformers', 'accelerate', 'datasets')))\n"
        "from adakd_kernels.cli import main\n"
        f"sys.exit(main(['report', {str(run)!r}, '--output_dir', {str(tmp_path)!r}]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{tmp_path / 'report.html'}\n", "")


def test_colours_are_legible_and_ordered_by_lightness() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, two: str) -> float:
        low, high = sorted((luminance(one), luminance(two)))
        return (high + 0.05) / (low + 0.05)

    for theme, shades in SHADES.items():
        values = [luminance(shade) for shade in shades]
        assert values == sorted(values, reverse=theme == "light") and len(set(values)) == 8
        assert all(contrast(shade, _ink(shade)) >= 4.5 for shade in shades)
        assert contrast(shades[-1], THEMES[theme].ground) > contrast(shades[0], THEMES[theme].ground)
        assert all(contrast(color, THEMES[theme].ground) >= 3.0 for color in THEMES[theme].runs)
        assert contrast(THEMES[theme].ink, THEMES[theme].ground) >= 7.0


@pytest.fixture
def browser(reported: Path) -> Iterator[Any]:
    """A headless Chromium with the page, without a network."""
    reason = "no browser to drive: pip install selenium, and chromium with its chromedriver from the system's packages"
    webdriver = pytest.importorskip("selenium.webdriver", reason=reason)
    paths = [next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS)]
    if None in paths:
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    # No sandbox, because tests may run as root in a container.
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    try:
        driver.get((reported / "report.html").as_uri())
        yield driver
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver", "chromium.chromedriver")


def test_a_browser_shows_the_numbers_of_a_token(browser: Any, run: Path) -> None:
    """When it is pointed at, and when it has the focus; in both themes, and as narrow as a phone."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    line = read_tokens(run)[0]
    own = [token for token in line["tokens"] if "rank" in token]
    expected = [
        f"difficulty {token['difficulty']:.4g}\ntemperature {token['temperature']:.4g}\n"
        f"rank {token['rank']} of {line['of']}\n{'selected' if token['selected'] else 'not selected'}"
        for token in own
    ]
    grounds = set()
    for theme, width in (("light", 1300), ("dark", 360)):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # nothing sticks out
        tip, tokens = browser.find_element(By.ID, "tip"), browser.find_elements(By.CSS_SELECTOR, ".t")
        browser.execute_script("document.activeElement.blur()")
        ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
        assert not tip.is_displayed()
        ActionChains(browser).move_to_element(tokens[1]).perform()
        assert tip.is_displayed() and tip.text == expected[1]
        box = tip.rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        browser.execute_script("arguments[0].focus()", tokens[0])
        assert tip.text == expected[0]
        ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
        assert browser.switch_to.active_element == tokens[2] and tip.text == expected[2]
        assert tokens[2].get_attribute("aria-describedby") == "tip"
        ActionChains(browser).send_keys(Keys.END).perform()
        assert tip.is_displayed() and tip.text == expected[-1]
        ActionChains(browser).send_keys(Keys.ESCAPE).perform()
        assert not tip.is_displayed()
        ActionChains(browser).send_keys(Keys.TAB).perform()  # to the next text, not to the next token
        assert browser.switch_to.active_element == tokens[len(own)] and tip.is_displayed()
        grounds.add(tuple(element.value_of_css_property("background-color") for element in (tokens[0], tip)))
        shown = "return [...document.images].map(image => image.currentSrc.length && image.naturalWidth)"
        assert browser.execute_script(shown) == [960] * 7
        lines = [token.value_of_css_property("text-decoration-line") for token in tokens]
        selected = [token.get_attribute("data-selected") == "yes" for token in tokens]
        assert [line == "underline" for line in lines] == selected and len(set(selected)) == 2
    assert len(grounds) == 2
