"""The measures of an evaluation: equal to the reference over the whole set, however it is split and on both routes."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adakd_kernels import reference
from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer
from adakd_kernels.linear import heads
from adakd_kernels.trainer import evaluation
from adakd_kernels.trainer.evaluation import MEASURES, HeldOutSums
from adakd_kernels.trainer.heads import HeadOptions

from .tiny_models import tiny_model, token_records
from .trainer_process import config, evaluated_trainer, held_out_sets, of_both_ranks

pytestmark = pytest.mark.fast

EXACT = 1e-10  # fp64 throughout: only rounding


def measures_of(metrics: dict[str, float], prefix: str = "eval") -> dict[str, float]:
    return {name: metrics[f"{prefix}_{name}"] for name in MEASURES}


def flat_set(student: Any, teacher: Any, records: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both (N, V) and labels (N,) of all tokens with a label, each record in a forward of its own."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for record in records:
        labels = torch.tensor(record["labels"])[1:]
        ids = torch.tensor([record["input_ids"]])
        rows = [model.eval()(input_ids=ids).logits[0, :-1][labels != -100].detach() for model in (student, teacher)]
        parts.append((rows[0], rows[1], labels[labels != -100]))
    student_logits, teacher_logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return student_logits, teacher_logits, labels


def expected_measures(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """The reference's, of logits (N, V)."""
    z_s, z_t = reference.common_vocabulary(student, teacher)
    per_token = {
        "forward_kl": reference.token_divergence(student, teacher, divergence="forward_kl"),
        "reverse_kl": reference.token_divergence(student, teacher, divergence="reverse_kl"),
        "cross_entropy": reference.cross_entropy(student, teacher, labels),
        "agreement": (z_s.argmax(-1) == z_t.argmax(-1)).double(),
    }
    return {name: values.double().mean().item() for name, values in per_token.items()}


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "cohere", "granite", "phi"])
def test_measures_equal_the_reference_at_every_batch_size_and_loss(
    tmp_path: Path, architecture: str, route: str
) -> None:
    vocabularies = (64, 70) if architecture == "qwen2" else (64, 64)
    student = tiny_model(architecture, vocab_size=vocabularies[0], seed=1).double()
    teacher = tiny_model(architecture, layers=2, vocab_size=vocabularies[1], hidden=32, seed=2).double()
    records = token_records(11, seed=3)
    expected = expected_measures(*flat_set(student, teacher, records))
    assert 0 < expected["agreement"] < 1
    losses = [
        {},
        {"divergence": "total_variation", "temperature_scale": 2.0, "base_temperature": 3.0},
        {"divergence": "jensen_shannon", "ce_weight": 0.7, "focus_ratio": 0.2, "difficulty": "cross_entropy"},
    ]
    for batch_size, loss in zip((1, 2, 8), losses, strict=True):
        args = config(tmp_path, per_device_eval_batch_size=batch_size, logits_route=route, **loss)
        trainer = AdaKDTrainer(model=student, teacher=teacher, args=args, eval_dataset=records)
        assert measures_of(trainer.evaluate()) == pytest.approx(expected, rel=EXACT)
        assert measures_of(trainer.state.log_history[-1]) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_eval_loss_is_a_mean_over_the_tokens(tmp_path: Path, route: str) -> None:
    """At one temperature, where no median depends on the batch, it is the loss of the whole set as one batch."""
    student, teacher = tiny_model("llama", seed=1).double(), tiny_model("llama", layers=2, seed=2).double()
    records = token_records(11, seed=3)
    options = {"temperature_scale": 0.0, "base_temperature": 1.5, "ce_weight": 0.2, "divergence": "jensen_shannon"}
    expected = reference.adakd_loss(*flat_set(student, teacher, records), **options).item()
    for batch_size in (1, 2, 8):
        args = config(tmp_path, per_device_eval_batch_size=batch_size, logits_route=route, **options)
        trainer = AdaKDTrainer(model=student, teacher=teacher, args=args, eval_dataset=records)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_two_ranks_equal_one(tmp_path: Path, two_ranks: Path, route: str) -> None:
    """Sets that leave a part of the last batch, or a whole rank, to records that are repeated; maps and streams."""
    found = of_both_ranks(two_ranks, f"evaluation-{route}")
    trainer = evaluated_trainer(tmp_path, route)
    expected = trainer.evaluate(held_out_sets())
    names = [f"eval_{data}_{name}" for data in held_out_sets() for name in ("loss", *MEASURES)]
    for metrics in found:
        assert {name: metrics[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=EXACT
        )
    assert len({expected[name] for name in names if name.endswith("forward_kl")}) == len(held_out_sets())


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_predictions_and_metrics_of_the_user(tmp_path: Path, route: str) -> None:
    records = token_records(7, seed=4)
    student, teacher = tiny_model("llama", seed=1).double(), tiny_model("llama", layers=2, seed=2).double()
    expected = expected_measures(*flat_set(student, teacher, records))
    trainer = AdaKDTrainer(
        model=student,
        teacher=teacher,
        args=config(tmp_path, per_device_eval_batch_size=4, logits_route=route, prediction_loss_only=False),
        eval_dataset=records,
        compute_metrics=lambda prediction: {"records": float(len(prediction.predictions))},
    )
    metrics = trainer.evaluate(metric_key_prefix="held_out")
    assert metrics["held_out_records"] == 7.0
    assert measures_of(metrics, "held_out") == pytest.approx(expected, rel=EXACT)
    predicted = trainer.predict(records)
    assert measures_of(predicted.metrics, "test") == pytest.approx(expected, rel=EXACT)
    batch = AdaKDDataCollator()(records)
    assert (predicted.label_ids == batch["labels"].numpy()).all()
    # Without labels there is nothing to measure.
    unlabelled = trainer.predict([{"input_ids": r["input_ids"], "labels": [-100] * len(r["labels"])} for r in records])
    assert all(math.isnan(value) for value in measures_of(unlabelled.metrics, "test").values())


def test_rows_of_nothing_but_minus_infinity_are_not_valid(tmp_path: Path) -> None:
    student, teacher = tiny_model("llama", seed=1).double(), tiny_model("llama", layers=2, seed=2).double()
    records = token_records(7, seed=4)
    logits, teacher_logits, labels = flat_set(student, teacher, records)
    ids = torch.cat([torch.tensor(r["input_ids"])[:-1][torch.tensor(r["labels"])[1:] != -100] for r in records])
    empty = ids < 20
    assert empty.any() and not empty.all()
    expected = expected_measures(logits[~empty], teacher_logits[~empty], labels[~empty])
    forward = teacher.forward

    @functools.wraps(forward)  # the trainer reads its signature
    def emptied(input_ids: Tensor, **inputs: Any) -> Any:
        out = forward(input_ids=input_ids, **inputs)
        out.logits[input_ids < 20] = -math.inf
        return out

    teacher.forward = emptied
    trainer = AdaKDTrainer(
        model=student,
        teacher=teacher,
        args=config(tmp_path, per_device_eval_batch_size=2, logits_route="logits"),
        eval_dataset=records,
        data_collator=AdaKDDataCollator(logits_to_keep=False),
    )
    assert measures_of(trainer.evaluate()) == pytest.approx(expected, rel=EXACT)


def hidden_batch() -> tuple[Any, ...]:
    """The arguments of `HeldOutSums.add_hidden`, for 300 tokens of which about 200 have a label."""
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(8, 64).double(), torch.nn.Linear(16, 70, bias=False).double()
    targets = torch.randint(64, (3, 100)).where(torch.rand(3, 100) < 0.67, -100)
    options = (HeadOptions(scale=3.0, softcap=2.0), HeadOptions(scale=4.0))
    hidden, teacher_hidden = torch.randn(3, 100, 8).double(), torch.randn(3, 100, 16).double()
    return hidden, student, teacher_hidden, teacher, options, targets


class Alone:
    """An accelerator of one rank."""

    @staticmethod
    def reduce(values: Tensor) -> Tensor:
        return values


def test_the_heads_make_the_logits_of_a_chunk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, student, teacher_hidden, teacher, _, targets = batch = hidden_batch()
    valid = targets != -100
    z_s = 2.0 * torch.tanh(3.0 * student(hidden) / 2.0)
    expected = expected_measures(z_s[valid].detach(), (4.0 * teacher(teacher_hidden))[valid].detach(), targets[valid])
    made: list[int] = []
    computed: list[int] = []
    empty_rows, product = heads.Head.empty_rows, heads.WeightHead.product
    monkeypatch.setattr(heads.Head, "empty_rows", lambda self, rows: made.append(rows) or empty_rows(self, rows))
    monkeypatch.setattr(
        heads.WeightHead, "product", lambda self, rows, *args: computed.append(len(rows)) or product(self, rows, *args)
    )
    for budget, rows in ((1, 64), (2**30, int(valid.sum()))):
        made.clear()
        computed.clear()
        monkeypatch.setitem(evaluation.CHUNK_BYTES, "cpu", budget)
        sums = HeldOutSums(torch.device("cpu"))
        sums.add_hidden(*batch)
        assert made == [rows, rows]
        assert sum(computed) == 2 * int(valid.sum()) and max(computed) == rows
        assert {name: sums.means(Alone)[name] for name in MEASURES} == pytest.approx(expected, rel=EXACT)


def test_entries_that_are_not_common_have_no_part() -> None:
    """Not in the agreement either, where the teacher's most likely entry is one of them."""
    torch.manual_seed(0)
    student, targets = torch.randn(1, 5, 8), torch.randint(8, (1, 5))
    sums = HeldOutSums(torch.device("cpu"))
    sums.add_logits(student, torch.cat((student, torch.full((1, 5, 2), 50.0)), -1), targets)
    means = sums.means(Alone)
    assert means["agreement"] == 1.0 and abs(means["forward_kl"]) + abs(means["reverse_kl"]) < 1e-6


def test_nothing_valid_on_the_hidden_route() -> None:
    """Rows of nothing but −inf, and then a batch without labels."""
    hidden, student, teacher_hidden, teacher, _, targets = hidden_batch()
    torch.nn.init.constant_(student.bias, -math.inf)
    sums = HeldOutSums(torch.device("cpu"))
    plain = (HeadOptions(), HeadOptions())
    sums.add_hidden(hidden, student, teacher_hidden, teacher, plain, targets)
    sums.add_hidden(hidden, student, teacher_hidden, teacher, plain, torch.full_like(targets, -100))
    assert sums.measures.tolist() == [0.0] * 5
    assert all(math.isnan(sums.means(Alone)[name]) for name in MEASURES)


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_autocast(tmp_path: Path, route: str) -> None:
    """In bf16 the measures are near those in fp32, and equal for all batch sizes to rounding."""
    records, found = token_records(11, seed=3), []
    for bf16, batch_size in ((False, 8), (True, 1), (True, 8)):
        trainer = AdaKDTrainer(
            model=tiny_model("llama", seed=1),
            teacher=tiny_model("llama", layers=2, seed=2),
            args=config(tmp_path, per_device_eval_batch_size=batch_size, logits_route=route, bf16=bf16),
            eval_dataset=records,
        )
        found.append(measures_of(trainer.evaluate()))
        found[-1].pop("agreement")
    exact, alone, together = found
    assert alone == pytest.approx(exact, rel=0.02) and alone != exact
    assert together == pytest.approx(alone, rel=1e-3)


def test_the_best_model_at_the_end(tmp_path: Path) -> None:
    """The one with the lowest forward KL, in the middle of the run; the loss is lowest at its end."""
    trainer = AdaKDTrainer(
        model=tiny_model("llama", seed=1).double(),
        teacher=tiny_model("llama", layers=2, seed=2).double(),
        args=config(
            tmp_path, max_steps=10, eval_strategy="steps", eval_steps=1, save_steps=1, learning_rate=0.4,
            per_device_train_batch_size=4, load_best_model_at_end=True, metric_for_best_model="forward_kl",
            greater_is_better=False, lr_scheduler_type="constant",
        ),
        train_dataset=token_records(24),
        eval_dataset=token_records(8, seed=3),
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_forward_kl" in log]
    steps = {name: min(logs, key=lambda log: log[name])["step"] for name in ("eval_forward_kl", "eval_loss")}
    assert len(logs) == 10 and steps["eval_loss"] == 10 > steps["eval_forward_kl"] > 1
    assert trainer.state.best_global_step == steps["eval_forward_kl"]
    best = min(log["eval_forward_kl"] for log in logs)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_forward_kl"] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("forward_kl", False), ("eval_reverse_kl", False), ("eval_web_cross_entropy", False), ("loss", False),
     ("agreement", True)],
)  # fmt: skip
def test_which_direction_is_better_by_default(tmp_path: Path, metric: str, greater: bool) -> None:
    assert config(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    told = config(tmp_path, metric_for_best_model=metric, greater_is_better=not greater)
    assert told.greater_is_better is not greater
