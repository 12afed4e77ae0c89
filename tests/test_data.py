"""Records from JSONL, their tokens and labels, batches of them, and the quantiles that are logged."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adakd_kernels.trainer import collator, histogram
from adakd_kernels.trainer.collator import AdaKDDataCollator
from adakd_kernels.trainer.histogram import TokenHistogram
from adakd_kernels.trainer.loading import load_records
from adakd_kernels.trainer.records import DataError, check_same_tokenizer, tokenize_messages

from .tiny_models import INSTRUCTIONS, tiny_tokenizer, write_jsonl

pytestmark = pytest.mark.fast


def parts(record: dict[str, list[int]], tokenizer: Any) -> tuple[str, str]:
    """The text without labels and the text with."""
    start = next(i for i, label in enumerate(record["labels"]) if label != -100)
    assert record["labels"] == [-100] * start + record["input_ids"][start:]
    return tokenizer.decode(record["input_ids"][:start]), tokenizer.decode(record["input_ids"][start:])


def test_plain_format(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    loaded = load_records(write_jsonl(tmp_path / "train.jsonl"), tokenizer)
    assert (len(loaded.records), loaded.truncated, loaded.dropped) == (8, 0, 0)
    assert parts(loaded.records[0], tokenizer) == (
        "### User:\nName a word that rhymes with cat.\n\n### Assistant:\n",
        "A word is hat, of course.<eos>",
    )
    assert parts(loaded.records[1], tokenizer)[0] == (
        "### User:\nName a word that rhymes with light.\n\nTake a short one.\n\n### Assistant:\n"
    )


def learnt(record: dict[str, Any], tokenizer: Any) -> list[str]:
    """The texts that have labels."""
    texts = "".join(chr(0) if label < 0 else tokenizer.decode([label]) for label in record["labels"])
    return [text for text in texts.split(chr(0)) if text]


def test_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=True)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "A word?"},
        {"role": "assistant", "content": "Word."},
    ]
    file = write_jsonl(tmp_path / "train.jsonl", [{"messages": messages, "id": 3}, INSTRUCTIONS[0]])
    first, second = load_records(file, tokenizer).records
    assert tokenizer.decode(first["input_ids"]) == (
        "<|system|>\nBe brief.<eos>\n<|user|>\nHello<eos>\n<|assistant|>\nHello.<eos>\n"
        "<|user|>\nA word?<eos>\n<|assistant|>\nWord.<eos>\n"
    )
    assert learnt(first, tokenizer) == ["Hello.<eos>\n", "Word.<eos>\n"]
    assert (first["id"], second["id"]) == ("3", f"{file}:2")
    assert parts(second, tokenizer)[1] == "A word is hat, of course.<eos>\n"


def test_the_answer_begins_where_the_tokens_part() -> None:
    """A token that spans the end of the prompt belongs to the answer, and ids are those of the whole text."""

    class Merging:
        eos_token_id = 9

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert add_special_tokens
            return {"input_ids": [1, 2, 3] if text.endswith("Assistant:\n") else [1, 2, 4, 5]}

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenize_messages(Merging(), messages) == ([1, 2, 4, 5, 9], 2)


GOOD = '{"instruction": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (GOOD + "\n{'a'}\n", 3, "not JSON: "),
        (GOOD + "\xff\n", 2, "not JSON: 'utf-8' codec can't decode byte 0xff"),
        (GOOD + "[1]\n", 2, "expected a JSON object, got list"),
        (GOOD + '{"instruction": "a", "answer": "b"}\n', 2, "field 'output' is missing: expected 'instruction' and"),
        ("{}\n", 1, "no field to train on: expected 'messages', or "),
        ('{"instruction": 3, "output": "b"}\n', 1, "field 'instruction' must be a string, got 3"),
        ('{"instruction": "a", "input": [1], "output": "b"}\n', 1, "field 'input' must be a string, got [1]"),
        ('{"instruction": "a", "output": ""}\n', 1, "field 'output', which is to be learnt, is empty"),
        ('{"messages": "a"}\n', 1, "'messages' must be a list, a prompt and an answer at least, got \"a\""),
        ('{"messages": ["a", "b"]}\n', 1, 'messages[0] must have role and content, got "a"'),
        (
            '{"messages": [{"role": "user"}, {}]}\n',
            1,
            "field 'messages[0].content' is missing: expected role and content",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
            1,
            "the last of 'messages' must be the assistant's, got role 'user'",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n',
            1,
            "field 'messages[1].content', which is to be learnt, is empty",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, content: str, line: int, message: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as raised:
        load_records(file, tiny_tokenizer())
    assert str(raised.value).startswith(f"{file}:{line}: {message}")
    assert "\n" not in str(raised.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read: No such file or directory"):
        load_records(tmp_path / "none.jsonl", tiny_tokenizer())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl: nothing to train on: it has no records"):
        load_records(tmp_path / "empty.jsonl", tiny_tokenizer())


def test_same_tokenizer() -> None:
    class Vocabulary:
        def __init__(self, *tokens: str) -> None:
            self.tokens = tokens

        def get_vocab(self) -> dict[str, int]:
            return {token: index for index, token in enumerate(self.tokens)}

    check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer(chat_template=True))
    check_same_tokenizer(Vocabulary("a", "b"), Vocabulary("a", "b", "<pad>"))
    check_same_tokenizer(Vocabulary("a", "b", "<pad>"), Vocabulary("a", "b"))
    with pytest.raises(
        DataError, match=r"token 'b' is 1 in the student's \(2 tokens\) and 2 in the teacher's .* 1 is 'c'"
    ):
        check_same_tokenizer(Vocabulary("a", "b"), Vocabulary("a", "c", "b"))
    with pytest.raises(DataError, match=r"token 'b' is 1 in the student's \(2 tokens\) and missing in the teacher's"):
        check_same_tokenizer(Vocabulary("a", "b"), Vocabulary("a", "c"))


def test_collator() -> None:
    records = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]},
        {"input_ids": [1, 2, 3], "labels": [1, -100, 3]},  # nothing predicts the first token
    ]
    batch = AdaKDDataCollator(pad_token_id=4, pad_to_multiple_of=4)(records)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 4, 4], [1, 2, 3, 4, 4, 4, 4, 4]]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5]
    assert batch["labels"].tolist() == [[-100] * 3 + [8, 9] + [-100] * 3, [-100, -100, 3] + [-100] * 5]
    assert batch["logits_to_keep"].tolist() == [1, 2, 3]
    assert next(iter(batch)) == "input_ids"  # Trainer takes the batch size from the first tensor
    assert "logits_to_keep" not in AdaKDDataCollator(logits_to_keep=False)(records)
    own = AdaKDDataCollator(per_record=True, pad_to_multiple_of=4)(records)
    assert own["logits_to_keep"].tolist() == [[2, 3], [1, 7]]  # position 7 is the last and predicts nothing
    for per_record in (True, False):
        empty = AdaKDDataCollator(per_record=per_record)([{"input_ids": [1], "labels": [-100]}])
        assert empty["logits_to_keep"].flatten().tolist() == [0]
    with pytest.raises(ValueError, match=r"a record must have input_ids and labels, got \['input_ids'\]"):
        AdaKDDataCollator()([{"input_ids": [1]}])
    with pytest.raises(ValueError, match="must have one length, got 2 and 1"):
        AdaKDDataCollator()([{"input_ids": [1, 2], "labels": [1]}])


def test_histogram() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator).mul(2).exp().view(50, 100)
    mask = torch.rand(50, 100, generator=generator) < 0.7
    histogram, exact = TokenHistogram("cpu"), values[mask].sort().values
    for row, keep in zip(values, mask, strict=True):
        histogram.add(row, keep)
    for p in (0.001, 0.1, 0.5, 0.9, 1.0):
        assert histogram.quantiles(p)[0] == pytest.approx(exact[math.ceil(p * len(exact)) - 1].item(), rel=0.0055)
    histogram.reset()
    assert all(math.isnan(q) for q in histogram.quantiles(0.1, 0.9))
    histogram.add(torch.tensor([0.0, 0.0, 1e-12, 1.0, 2.0**-7, math.inf]), torch.ones(6, dtype=torch.bool))
    assert histogram.quantiles(0.1, 0.5, 0.6, 0.8, 1.0) == [0.0, 0.0, 2.0**-7, 1.0, 2.0**16]


def test_histogram_of_nan() -> None:
    """NaN comes behind every number, as in torch.sort, and stays NaN; a rounding error below 0 is 0."""
    values = torch.tensor([math.nan, 1.0, math.inf, -1e-9, math.nan])
    histogram = TokenHistogram("cpu")
    histogram.add(values, torch.ones(5, dtype=torch.bool))
    assert histogram.quantiles(0.2, 0.4, 0.6) == [0.0, 1.0, 2.0**16]
    assert all(math.isnan(q) for q in histogram.quantiles(0.7, 0.9, 1.0))
    histogram.reset()
    histogram.add(values, torch.tensor([False, True, False, False, False]))
    assert histogram.quantiles(0.1, 1.0) == [1.0, 1.0]


@pytest.mark.parametrize("module", [collator, histogram])
def test_examples(module: Any) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0
