"""A loss or gradient that is not finite: the run stops before the step and says where, or leaves it out and counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer, NonFiniteLossError

from .tiny_models import tiny_tokenizer
from .trainer_process import nan_trainer, of_both_ranks, train_logs

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("per_record", [True, False])
@pytest.mark.parametrize("selection", ["micro_batch", "step"])
def test_the_run_stops_and_says_where(tmp_path: Path, selection: str, per_record: bool, route: str) -> None:
    """The teacher is NaN at the token 50, which record 9 has at index 2; batches of two, two of them a step."""
    options = {"logits_route": route, "selection": selection, "processing_class": tiny_tokenizer()}
    trainer = nan_trainer(tmp_path, data_collator=AdaKDDataCollator(per_record=per_record), **options)
    with pytest.raises(FloatingPointError) as raised:
        trainer.train()
    assert isinstance(raised.value, NonFiniteLossError)
    name = tiny_tokenizer().decode([7])
    assert str(raised.value) == (
        "step 3, micro-batch 1 of 2, rank 0: the loss is nan on record 'r8', record 'r9'; the first token at fault is "
        f"input_ids[3] of record 'r9': id 7, {name!r}; the last checkpoint is {tmp_path / 'checkpoint-2'}"
    )
    for value in trainer.model.state_dict().values():
        assert value.isfinite().all()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for key, value in saved.items():
        assert torch.equal(value, trainer.model.state_dict()[key])


def test_records_without_an_id(tmp_path: Path) -> None:
    trainer = nan_trainer(tmp_path, save_strategy="no")
    trainer.train_dataset = [{k: v for k, v in record.items() if k != "id"} for record in trainer.train_dataset]
    with pytest.raises(NonFiniteLossError, match=r"record 1 of the batch: id 7; there is no checkpoint in "):
        trainer.train()


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_a_micro_batch_is_left_out_and_counted(tmp_path: Path, route: str, caplog: pytest.LogCaptureFixture) -> None:
    """The steps equal those of a run whose bad micro-batch has no gradient."""
    trainer = nan_trainer(tmp_path, on_nan="skip", save_strategy="no", logits_route=route, learning_rate=0.1)
    logs = train_logs(trainer)
    assert [log["skipped_micro_batches"] for log in logs] == [0, 0, 1, 1]
    assert all(math.isfinite(value) for log in logs for value in log.values())
    assert "step 3: left out: the loss is nan on record 'r8', record 'r9'" in caplog.text

    class WithoutIt(AdaKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            bad = (inputs["input_ids"] == 50).any()
            if bad:
                inputs = {**inputs, "input_ids": inputs["input_ids"].clamp(max=49)}
            return super().compute_loss(model, inputs, *args, **kwargs) * (0.0 if bad else 1.0)

    other = nan_trainer(tmp_path, WithoutIt, save_strategy="no", logits_route=route, learning_rate=0.1)
    expected = train_logs(other)
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in expected], rel=1e-6)
    for name, value in other.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_the_whole_step_is_chosen_without_it(tmp_path: Path, route: str) -> None:
    """With selection="step", the other micro-batches go on as if the bad one had no labels."""
    options = {"on_nan": "skip", "save_strategy": "no", "logits_route": route, "selection": "step",
               "focus_ratio": 0.3, "learning_rate": 0.1}  # fmt: skip
    trainer, other = (nan_trainer(tmp_path, **options) for _ in range(2))
    for record in other.train_dataset[8:10]:
        record["labels"] = [-100] * len(record["labels"])
    logs, expected = train_logs(trainer), train_logs(other)
    assert [log.pop("skipped_micro_batches") for log in logs] == [0, 0, 1, 1]
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in expected], rel=1e-6)
    for name, value in other.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("on_nan", ["raise", "skip"])
def test_a_gradient_of_nan(tmp_path: Path, on_nan: str, max_grad_norm: float) -> None:
    """The loss is finite, its gradient is not: found before the step too."""
    trainer = nan_trainer(tmp_path, on_nan=on_nan, max_grad_norm=max_grad_norm, save_strategy="no")
    trainer.train_dataset[9].update(input_ids=[3, 4], labels=[-100, 4])
    trainer.model.lm_head.weight.register_hook(
        lambda gradient: gradient * math.nan if trainer.state.global_step == 1 else gradient
    )
    before = trainer.model.model.norm.weight.clone()
    if on_nan == "raise":
        with pytest.raises(NonFiniteLossError, match="step 2, the loss is finite, but the norm of its gradient is nan"):
            trainer.train()
    else:
        assert [log["skipped_micro_batches"] for log in train_logs(trainer)] == [0, 1, 1, 1]
    assert not torch.equal(trainer.model.model.norm.weight, before)
    for value in trainer.model.state_dict().values():
        assert value.isfinite().all()


@pytest.mark.parametrize("selection", ["micro_batch", "step"])
@pytest.mark.parametrize("on_nan", ["raise", "skip"])
def test_ranks_decide_alike(two_ranks: Path, on_nan: str, selection: str) -> None:
    """One of two ranks has the bad record; both stop with one message, or both go on with equal weights."""
    first, second = of_both_ranks(two_ranks, f"nan-{on_nan}-{selection}")
    assert first["error"] == second["error"]
    if on_nan == "raise":
        assert first["error"].startswith(
            "step 3, micro-batch 1 of 1, rank 0: the loss is nan on record 'r8', record 'r9'"
        )
    else:
        assert first["error"] == "" and [log["skipped_micro_batches"] for log in first["logs"]] == [0, 0, 1, 1]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]) and value.isfinite().all()
