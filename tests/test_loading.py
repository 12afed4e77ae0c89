"""Data as people have it: every source gives the same records, tokenised once and counted; errors name the place."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from adakd_kernels.integrations.transformers import AdaKDTrainer, DataError, load_records
from adakd_kernels.trainer import loading

from .tiny_models import INSTRUCTIONS, tiny_model, tiny_tokenizer, token_records, write_jsonl
from .trainer_process import Stream, config, of_both_ranks

pytestmark = pytest.mark.fast


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, records: list[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


def write(folder: Path, kind: str, records: list[dict[str, Any]]) -> Any:
    """The records as data of one kind."""
    table = datasets.Dataset.from_list(records)
    if kind == "jsonl":
        return write_jsonl(folder / "train.jsonl", records)
    if kind == "json":
        (folder / "train.json").write_text(json.dumps(records, indent=1))
        return folder / "train.json"
    if kind == "csv":
        with (folder / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        return str(folder / "train.csv")
    if kind == "parquet":
        (folder / "a[1]*").mkdir()  # characters of a pattern
        table.to_parquet(folder / "a[1]*" / "train.parquet")
        return folder / "a[1]*" / "train.parquet"
    if kind == "folder":
        table.save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "split":
        datasets.DatasetDict(train=table).save_to_disk(folder / "splits")
        return folder / "splits"
    if kind == "streaming":
        file = str(write_jsonl(folder / "stream.jsonl", records))
        return datasets.load_dataset("json", data_files=file, split="train", streaming=True)
    return {
        "table": table, "list": records, "torch": Rows(records), "torch stream": Stream(records),
        "generator": datasets.IterableDataset.from_generator(lambda: iter(records)),
    }[kind]  # fmt: skip


FILES = ["jsonl", "json", "csv", "parquet", "folder"]
KINDS = [*FILES, "split", "table", "list", "torch", "streaming", "generator", "torch stream"]
PLACES = {
    "jsonl": "{}:2: ", "json": "{}, row 2: ", "csv": "{}:3: ", "parquet": "{}, row 2: ", "folder": "{}, row 2: ",
    "split": "{}, row 2: ", "table": "data[1]: ", "list": "data[1]: ", "torch": "data[1]: ",
    "streaming": "data, row 2: ", "generator": "data, row 2: ", "torch stream": "data, row 2: ",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    expected = load_records(write_jsonl(tmp_path / "expected.jsonl"), tiny_tokenizer())
    data = write(tmp_path, kind, INSTRUCTIONS)
    loaded = load_records(data, tiny_tokenizer())
    records = list(loaded.records)
    assert [(r["input_ids"], r["labels"]) for r in expected.records] == [
        (list(r["input_ids"]), list(r["labels"])) for r in records
    ]
    assert (loaded.read, loaded.truncated, loaded.dropped) == (8, 0, 0)
    assert records[1]["id"] == PLACES[kind].format(data).removesuffix(": ")
    named = load_records([{**record, "id": n} for n, record in enumerate(INSTRUCTIONS)], tiny_tokenizer())
    assert list(named.records["id"]) == [str(n) for n in range(8)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_name_the_place(tmp_path: Path, kind: str) -> None:
    """Also from another process."""
    records = [*INSTRUCTIONS[:1], {**INSTRUCTIONS[1], "output": ""}, *INSTRUCTIONS[2:]]
    data = write(tmp_path, kind, records)
    for num_proc in (None, *([2] if kind in ("jsonl", "parquet") else [])):
        with pytest.raises(DataError) as raised:
            list(load_records(data, tiny_tokenizer(), num_proc=num_proc).records)
        place = PLACES[kind].format(data)
        assert str(raised.value) == f"{place}field 'output', which is to be learnt, is empty"


def test_a_table_of_numbers_and_words_that_mean_nothing(tmp_path: Path) -> None:
    """In CSV, and only there, all fields are texts."""
    (tmp_path / "a.csv").write_text('﻿instruction,output\n1,NA\n"a\nb",null\nc,"d, ""e"""\n', encoding="utf-8")
    tokenizer = tiny_tokenizer()
    loaded = load_records(tmp_path / "a.csv", tokenizer).records
    answers = [tokenizer.decode([label for label in record["labels"] if label >= 0]) for record in loaded]
    assert answers == ["NA<eos>", "null<eos>", 'd, "e"<eos>']
    assert loaded["id"][:] == [f"{tmp_path}/a.csv:{line}" for line in (2, 3, 5)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"instruction,output\na,b,c\n", ":2: has more fields than the header, 2"),
        ("a.csv", b'instruction,output\na,"b', ":2: not CSV: unexpected end of data"),
        ("a.csv", b"instruction,output\na,b\nc,\xff\n", "not CSV: 'utf-8' codec can't decode byte 0xff"),
        ("a.csv", b"instruction\na\n", ":2: field 'output' is missing: expected 'instruction' and 'output'"),
        ("a.csv", b"instruction,output\n", ": nothing to train on: it has no records"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"]', ": not JSON: "),
        ("a.json", b'[{"text": "a b"}, 3]', ", row 2: expected a JSON object, got int"),
        ("a.parquet", b"PAR", ": cannot be read: "),
        ("a.jsonl", b'{"input_ids": [1, 2], "labels": [1]}', ":1: 'input_ids' and 'labels' must have one length, got"),
        ("a.jsonl", b'{"input_ids": [1, 2], "labels": "a"}', ":1: field 'labels' must be a list of whole numbers, got"),
        (
            "a.jsonl",
            b'{"input_ids": [1], "labels": [1]}\n{"text": "a"}',
            ":2: field 'input_ids' must be a list of whole numbers, got None",
        ),
        (
            "a.jsonl",
            b'{"input_ids": [1], "labels": [1]}\n{"input_ids": [1], "labels": [1], "weight": 2}',
            ":2: field 'weight' is not in the first record: give it to all or none",
        ),
        ("a.jsonl", b'{"text": "a cat"}\n{"input_ids": [1]}', ":2: has 'input_ids', which the first record has not"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        load_records(tmp_path / name, tiny_tokenizer())
    assert str(raised.value).startswith(str(tmp_path / name)) and message in str(raised.value)


def test_data_that_are_refused(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(
        a=datasets.Dataset.from_list(INSTRUCTIONS), b=datasets.Dataset.from_list(INSTRUCTIONS)
    )
    with pytest.raises(TypeError, match=r"data must be one data set, got the splits a, b: choose one, data\[...\]"):
        load_records(splits, tiny_tokenizer())
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"holds the splits a, b: give the folder of one, .*splits/a$"):
        load_records(tmp_path / "splits", tiny_tokenizer())
    with pytest.raises(DataError, match=r"cannot be read: FileNotFoundError: Directory .* is neither"):
        load_records(tmp_path, tiny_tokenizer())
    for data in (3, {"text": ["a"]}, b"a"):
        with pytest.raises(
            TypeError, match=r"data must be a path, a datasets\.Dataset, a list of records or another data"
        ):
            load_records(data, tiny_tokenizer())
    with pytest.raises(ValueError, match="long_records must be one of truncate, drop, refuse, got 'cut'"):
        load_records(INSTRUCTIONS, tiny_tokenizer(), long_records="cut")
    with pytest.raises(DataError, match="data has no 'input_ids': give the tokenizer as processing_class"):
        load_records(splits["a"], None)


def test_tokenised_records_go_through_as_they_are(tmp_path: Path) -> None:
    records = [{**record, "weight": 2.0} for record in token_records(3)]
    records[1]["id"] = 7
    records[0]["id"] = "a"
    file = write_jsonl(tmp_path / "ids.jsonl", records)
    loaded = load_records(file, None, max_length=4)
    assert [row["id"] for row in loaded.records] == ["a", "7", f"{file}:3"]
    assert [{**row, "id": 0} for row in loaded.records] == [{**row, "id": 0} for row in records]
    table = datasets.Dataset.from_list(token_records(3))
    for data in (table, table.to_iterable_dataset(), records, Rows(records), Stream(records)):
        assert load_records(data, tiny_tokenizer(), max_length=4).records is data


def test_long_records_are_counted(tmp_path: Path) -> None:
    file, tokenizer = write_jsonl(tmp_path / "train.jsonl"), tiny_tokenizer()
    whole = load_records(file, tokenizer).records
    starts = [next(i for i, label in enumerate(record["labels"]) if label != -100) for record in whole]
    limit = sorted(starts)[4] + 1  # the fifth prompt leaves room for one token
    cut = load_records(file, tokenizer, limit)
    kept = [record for record, start in zip(whole, starts, strict=True) if start < limit]
    assert cut.dropped == sum(start >= limit for start in starts) > 0
    assert cut.truncated == sum(len(record["input_ids"]) > limit for record in kept) > 0
    assert list(cut.records) == [
        {**record, "input_ids": record["input_ids"][:limit], "labels": record["labels"][:limit]} for record in kept
    ]
    assert str(cut) == (
        f"{file}: {len(kept)} records; {cut.truncated} of them cut at max_length; {cut.dropped} more left out: nothing "
        "to learn within max_length"
    )
    stream = load_records(Stream(INSTRUCTIONS), tokenizer, limit)
    assert len(list(stream.records)) == len(kept)
    assert (stream.read, stream.truncated, stream.dropped) == (8, cut.truncated, cut.dropped)

    length = sorted(len(record["input_ids"]) for record in whole)[3]
    short = [record for record in whole if len(record["input_ids"]) <= length]
    dropped = load_records(file, tokenizer, length, long_records="drop")
    assert list(dropped.records) == short and (dropped.truncated, dropped.dropped) == (0, 8 - len(short))
    first = next(n for n, record in enumerate(whole, 1) if len(record["input_ids"]) > length)
    with pytest.raises(
        DataError, match=rf"train.jsonl:{first}: has \d+ tokens, more than max_length={length}: raise it"
    ):
        load_records(file, tokenizer, length, long_records="refuse")
    with pytest.raises(DataError, match=r"none of its 8 records has anything to learn within max_length=4; raise it"):
        load_records(file, tokenizer, 4)
    late = [{"text": "a cat " * 9}] * 1500 + [{"text": "a"}]  # a whole batch of nothing first
    assert len(load_records(late, tokenizer, 5, long_records="drop").records) == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder", "table", "list"])
def test_a_second_run_reads_the_cache(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, tokenizer = write(tmp_path, kind, INSTRUCTIONS), tiny_tokenizer()
    before = sorted(tmp_path.rglob("*"))
    first = load_records(data, tokenizer, 60, num_proc=2)
    # What a tokenizer keeps of its last call does not matter.
    tokenizer(["a", "a cat"], padding=True, truncation=True, max_length=8)
    calls: list[Any] = []
    tokenize_record = loading.tokenize_record
    monkeypatch.setattr(loading, "tokenize_record", lambda *args: calls.append(args) or tokenize_record(*args))
    second = load_records(data, tokenizer, 60)
    assert list(second.records) == list(first.records) and not calls
    assert (second.read, second.truncated, second.dropped) == (first.read, first.truncated, first.dropped)
    assert first.truncated > 0 and sorted(tmp_path.rglob("*")) == before  # nothing is written beside the data
    load_records(data, tokenizer, 61)
    assert len(calls) == 8
    tokenizer.chat_template = "?{% generation %}{{ messages[1].content }}{% endgeneration %}"
    load_records(data, tokenizer, 60)
    assert len(calls) == 16
    if kind == "jsonl":
        write_jsonl(data, INSTRUCTIONS[:3])
        assert len(load_records(data, tokenizer, 60).records) == 3 and len(calls) == 19


def test_one_rank_tokenises(two_ranks: Path) -> None:
    ranks = of_both_ranks(two_ranks, "data")
    assert ranks[0]["records"] == ranks[1]["records"] and len(ranks[0]["records"]) == 3
    assert all(len(records) == 8 for records in ranks[0]["records"][:2])
    assert [rank["calls"] for rank in ranks] == [16, 0]  # of a file and of a list; the third is packed


def make_trainer(folder: Path, train: Any, held_out: Any = None, **options: Any) -> AdaKDTrainer:
    tokenizer = tiny_tokenizer()
    sizes = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    return AdaKDTrainer(
        model=tiny_model("llama", vocab_size=len(tokenizer), seed=1),
        teacher=tiny_model("llama", vocab_size=len(tokenizer), layers=2, seed=2),
        args=config(folder, **{**sizes, **options}),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )


def test_a_trainer_takes_paths_and_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_jsonl(tmp_path / "train.jsonl")
    caplog.set_level(logging.INFO)
    trainer = make_trainer(tmp_path, str(file), {"file": file, "texts": INSTRUCTIONS[:3]}, max_length=60)
    said = [record.message for record in caplog.records if " records" in record.message]
    assert (
        len(said) == 3 and said[0].startswith(f"AdaKDTrainer: {file}: 8 records; ") and "cut at max_length" in said[0]
    )
    assert [record.levelname for record in caplog.records if "8 records; " in record.message] == ["WARNING"] * 2
    losses = [log["loss"] for log in (trainer.train(), trainer.state.log_history)[1] if "loss" in log]
    found = trainer.evaluate()
    assert found["eval_file_cross_entropy"] != found["eval_texts_cross_entropy"]
    texts = datasets.Dataset.from_list(INSTRUCTIONS[:3])
    assert trainer.evaluate(texts)["eval_cross_entropy"] == pytest.approx(found["eval_texts_cross_entropy"])
    records = list(load_records(file, tiny_tokenizer(), 60).records)
    again = make_trainer(tmp_path, records, max_length=60)
    again.train()
    assert [log["loss"] for log in again.state.log_history if "loss" in log] == pytest.approx(losses, rel=1e-5)
    for empty in ([], texts.select([]), datasets.Dataset.from_list(records).select([])):
        with pytest.raises(DataError, match="train_dataset: nothing to train on: it has no records"):
            make_trainer(tmp_path, empty)
    with pytest.raises(DataError, match=r"eval_dataset\['a'\]\[0\]: field 'text' must be a string, got 3"):
        make_trainer(tmp_path, str(file), {"a": [{"text": 3}]})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_reads_streams(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    for stream in (
        datasets.load_dataset("json", data_files=str(write_jsonl(tmp_path / "a.jsonl")), split="train", streaming=True),
        Stream(INSTRUCTIONS),
    ):
        with pytest.raises(ValueError, match=r"train_dataset does not implement __len__.*max_steps"):
            make_trainer(tmp_path, stream, max_steps=-1)
        caplog.clear()
        trainer = make_trainer(tmp_path, stream, max_length=60, dataloader_num_workers=workers)
        trainer.train()
        said = [record.message for record in caplog.records if "train_dataset" in record.message]
        assert len(said) == 1 and said[0].startswith("AdaKDTrainer: train_dataset: ") and "cut at max_length" in said[0]
    packed = make_trainer(tmp_path, stream, packing=True, max_steps=1, max_length=200)
    assert packed.train().global_step == 1
    wrong = Stream([*INSTRUCTIONS[:1], {"text": 3}])
    with pytest.raises(DataError, match=r"train_dataset, row 2: field 'text' must be a string, got 3"):
        make_trainer(tmp_path, wrong, dataloader_num_workers=workers).train()


def test_nothing_of_the_users_cache_is_touched() -> None:
    assert str(datasets.config.HF_DATASETS_CACHE) == os.environ["HF_DATASETS_CACHE"]
    assert ".cache/huggingface" not in os.environ["HF_DATASETS_CACHE"]
