"""What the driver takes of a record: masks, positions, ids, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DataCollatorWithFlattening

from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer

from .tiny_models import tiny_model, token_records
from .trainer_process import config

pytestmark = pytest.mark.fast

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64 throughout: only rounding


def pair(architecture: str = "llama") -> dict[str, Any]:
    """A student and a teacher in fp64."""
    return {
        "model": tiny_model(architecture, seed=1).double(),
        "teacher": tiny_model(architecture, layers=2, seed=2).double(),
    }


def trained(
    folder: Path, records: list[Any], architecture: str = "llama", data_collator: Any = None, **options: Any
) -> tuple[float, Any]:
    """The loss of one step of one batch, and the weights after it."""
    args = config(folder, max_steps=1, per_device_train_batch_size=len(records), optim="sgd", learning_rate=0.3,
                  max_grad_norm=0.0, save_strategy="no", focus_ratio=0.5, **options)  # fmt: skip
    trainer = AdaKDTrainer(**pair(architecture), args=args, train_dataset=records, data_collator=data_collator)
    return trainer.train().training_loss, trainer.model.state_dict()


def assert_equal(got: tuple[float, Any], expected: tuple[float, Any]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-6)  # Trainer adds losses up in fp32
    for name, value in expected[1].items():
        torch.testing.assert_close(got[1][name], value, **CLOSE)


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(tmp_path: Path, architecture: str, route: str) -> None:
    records = token_records(4, seed=1)
    padded = []
    for count, record in enumerate(records):
        ids, labels = record["input_ids"], record["labels"]
        padded.append({
            "input_ids": [0] * count + ids,
            "labels": [-100] * count + labels,
            "attention_mask": [0] * count + [1] * len(ids),
            "position_ids": [0] * count + list(range(len(ids))),
        })  # fmt: skip
    options = {"logits_route": route}
    assert_equal(
        trained(tmp_path, padded, architecture, **options), trained(tmp_path, records, architecture, **options)
    )


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packed_records_do_not_see_each_other(tmp_path: Path, architecture: str, masked: bool, route: str) -> None:
    """Also where the first token of a text has a label, and where a mask of ones comes along."""
    records = token_records(6, seed=1)
    packed = []
    for part in (records[:3], records[3:]):
        ids = [token for record in part for token in record["input_ids"]]
        labels = [label for record in part for label in (record["input_ids"][0], *record["labels"][1:])]
        positions = [i for record in part for i in range(len(record["input_ids"]))]
        packed.append({"input_ids": ids, "labels": labels, "position_ids": positions})
        if masked:
            packed[-1]["attention_mask"] = [1] * len(ids)
    options = {"logits_route": route}
    assert_equal(
        trained(tmp_path, packed, architecture, **options), trained(tmp_path, records, architecture, **options)
    )


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_a_batch_in_one_row(tmp_path: Path, route: str) -> None:
    """Transformers' padding-free collator, which names no borders but by positions."""
    records, options = token_records(4, seed=1), {"logits_route": route}
    flat = trained(tmp_path, records, data_collator=DataCollatorWithFlattening(), **options)
    assert_equal(flat, trained(tmp_path, records, **options))


def test_the_collator_keeps_fields() -> None:
    records = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [0, 1, 1], "weight": 2.0, "id": "doc/7"},
        {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": None, "weight": 3.0, "kind": None},
    ]
    batch = AdaKDDataCollator(pad_to_multiple_of=4)(records)
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 2, -100, -100]]
    assert batch["weight"].tolist() == [2.0, 3.0] and "kind" not in batch
    assert bytes(batch["id"][0].tolist()) == b"doc/7" and bytes(batch["id"][1].tolist()) == b"1\0\0\0\0"
    padded = AdaKDDataCollator()([
        {"input_ids": [1, 2], "labels": [1, 2], "token_type_ids": torch.tensor([0, 1])},
        {"input_ids": [1], "labels": [1], "token_type_ids": torch.tensor([1])},
    ])  # fmt: skip
    assert padded["token_type_ids"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a cat"}, r"field 'text' of record 'doc/7' is no list of numbers.*remove_unused_columns=True"),
        ({"attention_mask": [1]}, r"field 'attention_mask' of record 'doc/7' must have one entry for each of its 3"),
        ({"attention_mask": [[1] * 3] * 3}, r"one entry for each of its 3 tokens, got shape \(3, 3\)"),
        ({"token_type_ids": [0, 0, 0]}, "record 1 of the batch has no field 'token_type_ids'"),
        ({"position_ids": [0, 0, 1], "attention_mask": [0, 1, 1]}, None),
        ({"position_ids": [0, 1, 0], "attention_mask": [1, 0, 1]}, None),
        ({"input_ids": [5] * 4, "labels": [5] * 4, "position_ids": [1, 0, 1, 0], "attention_mask": [0, 1, 1, 1]},
         "packed records .* cannot have an attention_mask that hides more than their end"),
    ],
)  # fmt: skip
def test_fields_that_do_not_fit(fields: dict[str, Any], message: str | None) -> None:
    records = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "id": "doc/7", **fields},
        {"input_ids": [1, 2], "labels": [1, 2]},
    ]
    if message is None:
        AdaKDDataCollator()(records)
        return
    with pytest.raises(ValueError, match=message):
        AdaKDDataCollator()(records)


def test_a_field_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    records = [{**record, "token_type_ids": [0] * len(record["input_ids"])} for record in token_records(4)]
    with pytest.raises(ValueError, match="'token_type_ids' of the batch is not read by the student LlamaForCausalLM"):
        trained(tmp_path, records, remove_unused_columns=False)
    trained(tmp_path, records)  # removed, as transformers does
    with_ids = [{**record, "id": f"r{i}", "text": "a"} for i, record in enumerate(token_records(4))]
    assert_equal(trained(tmp_path, with_ids), trained(tmp_path, token_records(4)))
    with pytest.raises(ValueError, match=r"field 'text' of record 'r.'"):
        trained(tmp_path, with_ids, remove_unused_columns=False)
    student, teacher = tiny_model("gpt2"), tiny_model("llama")
    trainer = AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path))
    with pytest.raises(ValueError, match="'token_type_ids' of the batch is not read by the teacher LlamaForCausalLM"):
        trainer.compute_loss(student, AdaKDDataCollator()(records))


def test_positions_that_a_model_does_not_take(tmp_path: Path) -> None:
    """They are not removed, because the borders of packed records would go with them."""
    student = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    record = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}
    args = config(tmp_path, max_steps=1, save_strategy="no")
    trainer = AdaKDTrainer(model=student, teacher=tiny_model("llama"), args=args, train_dataset=[record])
    with pytest.raises(
        ValueError, match=r"'position_ids' .* the student Bloom.*: leave this field out of the records$"
    ):
        trainer.train()


def test_packed_records_under_flash_attention(tmp_path: Path) -> None:
    models = pair()
    models["teacher"].config._attn_implementation = "flash_attention_2"
    record = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}
    trainer = AdaKDTrainer(**models, args=config(tmp_path))
    with pytest.raises(ValueError, match=r"with flash_attention_2 the teacher .* a batch of one row only"):
        trainer.compute_loss(models["model"], AdaKDDataCollator()([record, record]))
