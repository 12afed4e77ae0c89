"""The driver on transformers' Trainer: gradients, accumulation, ranks, checkpoints, evaluation, logs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import modeling_utils

from adakd_kernels import reference
from adakd_kernels.integrations.transformers import (
    AdaKDDataCollator,
    AdaKDTrainer,
)

from .tiny_models import tiny_model, token_records
from .trainer_process import Gradients, config, train_logs

pytestmark = pytest.mark.fast

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64 throughout: only rounding


def flat(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All logits (N, V) and the token (N,) that each position predicts."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits.flatten(0, 1), batch["labels"][:, 1:].flatten()


def expected_loss(student: Any, teacher: Any, records: list[Any], **options: Any) -> Tensor:
    """The reference's loss of one batch, differentiable in the student's weights."""
    batch = AdaKDDataCollator()(records)
    with torch.no_grad():
        teacher_logits, _ = flat(teacher, batch)
    logits, labels = flat(student, batch)
    return reference.adakd_loss(logits, teacher_logits, labels, **options)


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("keep", ["per record", "per batch", "all"])
@pytest.mark.parametrize(
    ("architecture", "vocabularies"), [("gpt2", (64, 64)), ("llama", (64, 64)), ("qwen2", (64, 70))]
)
def test_step_equals_reference(
    tmp_path: Path, architecture: str, vocabularies: tuple[int, int], keep: str, route: str
) -> None:
    student = tiny_model(architecture, vocab_size=vocabularies[0], seed=1).double()
    teacher = tiny_model(architecture, layers=2, vocab_size=vocabularies[1], seed=2).double()
    initial, records, gradients = copy.deepcopy(student), token_records(4, seed=2), Gradients()
    valid = sum(label != -100 for record in records for label in record["labels"][1:])
    assert valid % 2 == 0  # so that the step's r·n of num_items is the reference's ⌊r·n⌋
    options = {"focus_ratio": 0.5, "ce_weight": 0.2, "temperature_scale": 0.7, "base_temperature": 1.5}
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=4, max_grad_norm=0.0, save_strategy="no",
                  divergence="jensen_shannon", divergence_kwargs={"beta": 0.3}, logits_route=route,
                  **options)  # fmt: skip
    trainer = AdaKDTrainer(
        model=student,
        teacher=teacher,
        args=args,
        train_dataset=records,
        data_collator=AdaKDDataCollator(logits_to_keep=keep != "all", per_record=keep == "per record"),
        callbacks=[gradients],
    )
    result = trainer.train()
    loss = expected_loss(initial, teacher, records, divergence=args.make_divergence(), **options)
    loss.backward()
    assert math.isclose(result.training_loss, loss.item(), rel_tol=1e-6)  # Trainer adds losses up in fp32
    for name, parameter in initial.named_parameters():
        torch.testing.assert_close(gradients.steps[0][name], parameter.grad, **CLOSE)


@pytest.mark.skipif(
    not hasattr(modeling_utils, "slice_logits_to_keep"), reason="this transformers takes one list of positions a batch"
)
def test_heads_compute_the_answer_only(tmp_path: Path) -> None:
    """Both models get as many positions as the longest answer, or those that predict a label in some record."""
    student, teacher = tiny_model("llama"), tiny_model("llama", layers=2, seed=2)
    rows = []
    records = [
        {"input_ids": [5] * 12, "labels": [-100] * 7 + [5] * 5},
        {"input_ids": [6] * 6, "labels": [-100] * 3 + [6] * 3},
    ]
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    trainer = AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path), train_dataset=records)
    rows.clear()  # the trainer has tried both heads out
    batch = trainer.data_collator(records)
    assert batch["logits_to_keep"].tolist() == [[6, 7, 8, 9, 10], [2, 3, 4, 11, 11]]
    loss = trainer.compute_loss(student, batch)
    union = AdaKDDataCollator()(records)
    assert union["logits_to_keep"].tolist() == [2, 3, 4, 6, 7, 8, 9, 10]
    torch.testing.assert_close(trainer.compute_loss(student, union), loss)
    assert rows == [5, 5, 8, 8]


def test_teacher_is_frozen_keeps_its_type_and_stays_out_of_the_checkpoint(tmp_path: Path) -> None:
    teacher = tiny_model("gpt2", layers=2, dropout=0.5, seed=2).bfloat16().train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = AdaKDTrainer(
        model=tiny_model("gpt2"),
        teacher=teacher,
        args=config(tmp_path, max_steps=2, save_steps=2, learning_rate=0.1),
        train_dataset=token_records(16),
    )
    trainer.train()
    assert trainer.teacher is teacher and not teacher.training and trainer.model.training
    for name, value in teacher.named_parameters():
        assert not value.requires_grad and value.grad is None
        assert value.dtype == torch.bfloat16 and torch.equal(value, before[name])
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(saved) == {name for name, _ in trainer.model.named_parameters()}  # a tied head is saved once
    for name, value in saved.items():
        assert torch.equal(value, trainer.model.get_parameter(name))
        assert not torch.equal(value, tiny_model("gpt2").get_parameter(name))


def test_teacher_from_a_folder(tmp_path: Path) -> None:
    teacher = tiny_model("llama", layers=2, seed=2).bfloat16()
    teacher.save_pretrained(tmp_path / "teacher")
    trainer = AdaKDTrainer(model=tiny_model("llama"), teacher=tmp_path / "teacher", args=config(tmp_path))
    for name, value in teacher.named_parameters():
        assert torch.equal(trainer.teacher.get_parameter(name), value)


def test_evaluation_selects_all_tokens_and_leaves_the_share_alone(tmp_path: Path) -> None:
    """eval_loss: r = 1, the batch's own temperatures, mean of the batches weighted by their number of tokens."""
    held_out = token_records(7, seed=5)
    options = {"temperature_scale": 0.8, "ce_weight": 0.3}
    trainer = AdaKDTrainer(
        model=tiny_model("gpt2", seed=1).double(),
        teacher=tiny_model("gpt2", layers=2, seed=2, dropout=0.4).double(),
        args=config(
            tmp_path, max_steps=4, save_strategy="no", per_device_eval_batch_size=4, focus_beta=0.1, focus_delta=0.2,
            focus_epsilon=1e-6, learning_rate=0.01, eval_strategy="steps", eval_steps=2, **options,
        ),
        train_dataset=token_records(32),
        eval_dataset=held_out,
    )  # fmt: skip
    plain = AdaKDTrainer(
        model=tiny_model("gpt2", seed=1).double(),
        teacher=trainer.teacher,
        args=config(
            tmp_path, max_steps=4, save_strategy="no", focus_beta=0.1, focus_delta=0.2, focus_epsilon=1e-6,
            learning_rate=0.01, **options,
        ),
        train_dataset=token_records(32),
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]  # works before any training
    model = tiny_model("gpt2", seed=1).double().eval()
    assert before == pytest.approx(_eval_loss(model, trainer.teacher, held_out, options), rel=1e-6)
    logs, plain_logs = train_logs(trainer), train_logs(plain)
    assert logs == plain_logs and logs[-1]["focus_ratio"] != 1.0
    found = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(found) == 2
    assert found[-1] == pytest.approx(_eval_loss(trainer.model.eval(), trainer.teacher, held_out, options), rel=1e-6)


@torch.no_grad()
def _eval_loss(student: Any, teacher: Any, records: list[Any], options: dict[str, float]) -> float:
    batches = [records[:4], records[4:]]
    losses = [expected_loss(student, teacher, batch, **options).item() for batch in batches]
    tokens = [sum(label != -100 for record in batch for label in record["labels"][1:]) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def test_log_lines(tmp_path: Path) -> None:
    """Share, averages and quantiles of two optimizer steps of two micro-batches, against the reference."""
    records = token_records(32)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    class Recording(AdaKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                logits, labels = flat(model, inputs)
                kept.append((logits, flat(self.teacher, inputs)[0], labels))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Recording(
        model=tiny_model("llama", seed=1),
        teacher=tiny_model("llama", layers=2, seed=2),
        args=config(
            tmp_path, max_steps=6, logging_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2,
            focus_beta=0.2, focus_warmup_ratio=0.4, focus_epsilon=0.01, learning_rate=0.01, save_strategy="no",
        ),
        train_dataset=records,
    )  # fmt: skip
    logs = train_logs(trainer)
    assert [log["step"] for log in logs] == [2, 4, 6]
    state, losses = reference.FocusState(), []
    for step in range(6):
        if step % 2 == 0:
            difficulties, tau = [], []
        micro = kept[2 * step : 2 * step + 2]
        items = sum((labels != -100).sum().item() for _, _, labels in micro)
        losses.append(0.0)
        for student, teacher, labels in micro:
            difficulty = reference.squared_hellinger(student, teacher)[labels != -100]
            k = max(1, math.floor(state.ratio * len(difficulty)))
            chosen = difficulty.sort(descending=True, stable=True).values[:k]
            difficulties.append(difficulty)
            median = chosen.sort().values[(k - 1) // 2]
            tau.append(torch.exp(-0.5 * (chosen - median) / (chosen + median)))
            losses[-1] += (
                reference.adakd_loss(student, teacher, labels, focus_ratio=state.ratio).item()
                * k
                / (state.ratio * items)
            )
        state = reference.focus_step(state, losses[-1], trainer.loss_fn.focus.warmup_steps, 0.2, 0.01)
        if step % 2 == 1:
            log = logs[step // 2]
            assert log["loss"] == pytest.approx(sum(losses[-2:]) / 2, rel=1e-5)
            assert log["focus_ratio"] == pytest.approx(state.ratio, rel=1e-12)
            assert log["loss_ema"] == pytest.approx(state.ema, rel=1e-5)
            assert log["loss_reference"] == pytest.approx(state.reference, rel=1e-5)
            for name, values in (("difficulty", torch.cat(difficulties)), ("temperature", torch.cat(tau))):
                for suffix, p in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
                    exact = values.sort().values[math.ceil(p * len(values)) - 1].item()
                    assert log[f"{name}_{suffix}"] == pytest.approx(exact, rel=0.006), (name, suffix)
    assert logs[-1]["focus_ratio"] < 1.0
    assert all(math.isfinite(value) for log in logs for value in log.values())


def test_fixed_share(tmp_path: Path) -> None:
    trainer = AdaKDTrainer(
        model=tiny_model("llama", seed=1),
        teacher=tiny_model("llama", layers=2, seed=2),
        args=config(tmp_path, max_steps=2, focus_ratio=0.25, save_strategy="no"),
        train_dataset=token_records(16),
    )
    logs = train_logs(trainer)
    assert [log["focus_ratio"] for log in logs] == [0.25, 0.25]
    assert "loss_ema" not in logs[0]


def test_returned_logits_are_not_overwritten(tmp_path: Path) -> None:
    """The gradient takes the logits' place in training, but not in logits that the caller gets."""
    student, batch = tiny_model("llama", seed=1), AdaKDDataCollator()(token_records(4))
    args = config(tmp_path, logits_route="logits")
    trainer = AdaKDTrainer(model=student, teacher=tiny_model("llama", layers=2, seed=2), args=args)
    logits: list[Tensor] = []
    student.register_forward_hook(lambda module, args, out: logits.append(out.logits))
    loss, outputs = trainer.compute_loss(student, batch, return_outputs=True)
    kept = outputs.logits.detach().clone()
    loss.backward()
    assert torch.equal(outputs.logits, kept)
    gradient = student.lm_head.weight.grad.clone()
    student.zero_grad()
    trainer.compute_loss(student, batch).backward()
    assert torch.equal(student.lm_head.weight.grad, gradient)
    assert not torch.equal(logits[-1], kept)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "logits_to_keep"}  # the caller's batch is left alone


def test_predictions_cover_all_positions(tmp_path: Path) -> None:
    records, seen = token_records(3), []
    trainer = AdaKDTrainer(
        model=tiny_model("llama", seed=1),
        teacher=tiny_model("llama", layers=2, seed=2),
        args=config(tmp_path),
        eval_dataset=records,
        compute_metrics=lambda prediction: seen.append(prediction) or {"answer": 42.0},
    )
    metrics = trainer.evaluate()
    batch = AdaKDDataCollator()(records)
    assert metrics["eval_answer"] == 42.0
    assert (seen[0].label_ids == batch["labels"].numpy()).all()
    full = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(seen[0].predictions), full.detach())
