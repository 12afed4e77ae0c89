"""Packed rows and batches without padding: their losses and steps equal those of the separate records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Lfm2Config, Lfm2ForCausalLM

from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer, DataError
from adakd_kernels.trainer.collator import join_records
from adakd_kernels.trainer.packing import check_borders, pack_records

from .tiny_models import tiny_model, token_records
from .trainer_process import Stream, config

pytestmark = pytest.mark.fast

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64 throughout: only rounding
RECORDS = [{**record, "id": f"r{index}"} for index, record in enumerate(token_records(9, seed=3))]
RECORDS[4]["labels"] = RECORDS[4]["input_ids"]  # also of the first token, which nothing predicts


def trained(folder: Path, records: Any, rows: int, architecture: str = "llama", **options: Any) -> tuple[Any, Any, Any]:
    """Loss and evaluation of one step of all records in batches of so many rows, and the weights after it."""
    trainer = AdaKDTrainer(
        model=tiny_model(architecture, seed=1).double(),
        teacher=tiny_model(architecture, layers=2, seed=2).double(),
        args=config(
            folder, max_steps=1, per_device_train_batch_size=rows, per_device_eval_batch_size=4, optim="sgd",
            learning_rate=0.3, max_grad_norm=0.0, save_strategy="no", focus_ratio=0.5, **options,
        ),
        train_dataset=records,
        eval_dataset=RECORDS,
    )  # fmt: skip
    assert len(next(iter(trainer.get_eval_dataloader()))["input_ids"]) == 4  # each row is a record
    loss = trainer.train().training_loss
    return loss, trainer.model.state_dict(), trainer.evaluate()


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_of_several_records_give_the_same_step(tmp_path: Path, architecture: str, route: str) -> None:
    # All in one batch, because selection and temperatures are those of a batch.
    loss, weights, metrics = trained(tmp_path, RECORDS, 9, architecture, logits_route=route)
    for options in (
        {"packing": True, "max_length": 30},
        {"padding_free": True},
        {"packing": True, "padding_free": True, "max_length": 30},
    ):
        got = trained(tmp_path, RECORDS, 9, architecture, logits_route=route, **options)
        assert got[0] == pytest.approx(loss, rel=1e-6)  # Trainer adds losses up in fp32
        for name, value in weights.items():
            torch.testing.assert_close(got[1][name], value, **CLOSE)
        for name, value in metrics.items():
            if not name.endswith(("runtime", "second")):
                assert got[2][name] == pytest.approx(value, rel=1e-9)


def test_every_kind_of_data_is_packed_alike(tmp_path: Path) -> None:
    args = config(tmp_path, packing=True, max_length=30)
    rows = pack_records(args, RECORDS)
    table = Dataset.from_list([{**record, "note": "a"} for record in RECORDS])
    for data in (table, table.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(RECORDS)),
                 Stream(RECORDS)):  # fmt: skip
        packed = list(pack_records(args, data))
        assert [{name: list(v) if name != "id" else v for name, v in row.items()} for row in packed] == rows
    assert len(rows) < 5 and all(len(row["input_ids"]) <= 30 for row in rows)
    assert sorted(name for row in rows for name in row["id"].split(", ")) == [f"r{index}" for index in range(9)]
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        assert len(starts) == len(row["id"].split(", "))
        for name, start, end in zip(row["id"].split(", "), starts, [*starts[1:], None], strict=True):
            record = RECORDS[int(name[1:])]
            assert row["input_ids"][start:end] == record["input_ids"]
            assert row["labels"][start:end] == [-100, *record["labels"][1:]]
    with pytest.raises(DataError, match=r"record 'r\d' has \d+ tokens, but packing makes rows of max_length=8"):
        pack_records(config(tmp_path, packing=True, max_length=8), RECORDS)
    with pytest.raises(ValueError, match=r"field 'note' of record 'r\d' must have one entry for each of its"):
        pack_records(config(tmp_path, packing=True, max_length=30, remove_unused_columns=False), list(table))


def test_a_batch_without_padding() -> None:
    left = {"input_ids": [9, 9, 5, 6], "labels": [-100, -100, 5, 6], "attention_mask": [0, 0, 1, 1],
            "position_ids": [0, 0, 0, 1], "id": "a"}  # fmt: skip
    packed = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}
    batch = AdaKDDataCollator(padding_free=True)([left, packed, {"input_ids": torch.tensor([7]), "labels": [7]}])
    assert batch["input_ids"].tolist() == [[5, 6, 1, 2, 3, 4, 7]] and "attention_mask" not in batch
    assert batch["labels"].tolist() == [[-100, 6, -100, 2, -100, 4, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 0]]
    assert batch["logits_to_keep"].tolist() == [0, 2, 4]
    assert bytes(batch["id"][0].tolist()) == b"a, 1, 2"
    with pytest.raises(
        ValueError, match="the positions of record 'a' start at 2: records in one row need position_ids"
    ):
        join_records([{**left, "position_ids": [0, 1, 2, 3]}])


def test_what_cannot_be_in_one_row_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    student = Lfm2ForCausalLM(
        Lfm2Config(**sizes, num_hidden_layers=1, num_key_value_heads=1, layer_types=["conv"], initializer_range=0.5)
    )
    teacher = tiny_model("llama")
    AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path), train_dataset=RECORDS)
    for option in ("packing", "padding_free"):
        with pytest.raises(ValueError, match="the student Lfm2ForCausalLM does not keep the texts of one row apart"):
            AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path, **{option: True}), train_dataset=RECORDS)
    for architecture in ("llama", "gpt2", "gemma2", "phi"):
        check_borders("student", tiny_model(architecture))
    with pytest.raises(ValueError, match="padding_free is an option of the default data_collator"):
        AdaKDTrainer(
            model=tiny_model("llama"), teacher=teacher, args=config(tmp_path, padding_free=True),
            data_collator=AdaKDDataCollator(),
        )  # fmt: skip
