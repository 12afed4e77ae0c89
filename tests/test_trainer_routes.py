"""The two routes of the driver to the loss: equal numbers, taken by themselves where they can be, said once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer
from adakd_kernels.trainer.heads import HeadOptions, NoPlainHeadError, instead_of_head, plain_head

from .tiny_models import tiny_model, token_records
from .trainer_process import config

pytestmark = pytest.mark.fast

ARCHITECTURES = ["gpt2", "llama", "qwen2", "smollm2", "gemma2", "cohere", "granite", "phi"]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64 throughout: only rounding


class HeadRows(TrainerCallback):
    """How many rows of logits the head of each model made in a run, but for the two tokens on which it is tried out."""

    def __init__(self, *models: Any) -> None:
        self.rows = 0
        for model in models:
            model.get_output_embeddings().register_forward_hook(self.count)

    def count(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        self.rows += out.shape[1] if out.shape[-1] == module.out_features and out.shape[:2] != (1, 2) else 0


def run(folder: Path, architecture: str, route: str, **options: Any) -> tuple[AdaKDTrainer, HeadRows]:
    """Three steps in fp64, and an evaluation, on one route."""
    vocabularies = (64, 70) if architecture == "qwen2" else (64, 64)
    student = tiny_model(architecture, vocab_size=vocabularies[0], seed=1).double()
    teacher = tiny_model(architecture, layers=2, vocab_size=vocabularies[1], hidden=32, seed=2).double()
    trainer = AdaKDTrainer(
        model=student,
        teacher=teacher,
        args=config(folder, max_steps=3, save_strategy="no", per_device_train_batch_size=4, logits_route=route,
                    learning_rate=0.3, optim="sgd", gradient_accumulation_steps=2, focus_ratio=0.5, **options),
        train_dataset=token_records(24),
        eval_dataset=token_records(8, seed=3),
    )  # fmt: skip
    rows = HeadRows(student, teacher)
    trainer.train()
    trainer.evaluate()
    return trainer, rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_steps_are_equal(tmp_path: Path, architecture: str) -> None:
    options = {"ce_weight": 0.2} if architecture in ("llama", "gemma2") else {}
    (logits, logits_rows), (hidden, hidden_rows) = (
        run(tmp_path, architecture, route, **options) for route in ("logits", "auto")
    )
    assert hidden._head_options is not None and logits._head_options is None
    assert logits_rows.rows > 0 and hidden_rows.rows == 0
    for expected, got in zip(logits.state.log_history, hidden.state.log_history, strict=True):
        for name in set(expected) - {
            key for key in expected if "runtime" in key or "per_second" in key or "gib" in key
        }:
            assert got[name] == pytest.approx(expected[name], rel=1e-5), name
    for name, value in logits.model.state_dict().items():
        torch.testing.assert_close(hidden.model.state_dict()[name], value, **CLOSE)


def test_autocast(tmp_path: Path) -> None:
    """In bf16 the two routes differ by rounding: far less than either differs from fp32."""
    exact, logits, hidden = (
        run(tmp_path, "llama", route, bf16=bf16)[0].state.log_history[0]["loss"]
        for route, bf16 in (("logits", False), ("logits", True), ("hidden", True))
    )
    assert abs(hidden - logits) <= 2 * abs(logits - exact) + 1e-3 * abs(exact)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", HeadOptions()), ("gemma2", HeadOptions(softcap=2.0)), ("cohere", HeadOptions(scale=0.25)),
     ("granite", HeadOptions(scale=1 / 3))],
)  # fmt: skip
def test_plain_heads_are_tried_out(architecture: str, options: HeadOptions) -> None:
    model = tiny_model(architecture, dropout=0.1).train()
    model.lm_head.eval()
    assert plain_head(model) == options
    assert model.training and not model.lm_head.training and "forward" not in vars(model.lm_head)
    assert plain_head(model.bfloat16()) == options


def test_a_head_is_itself_again_after_nested_contexts_and_errors() -> None:
    head, hidden = nn.Linear(2, 3), torch.ones(1, 2)
    plain = head(hidden)
    with instead_of_head(head, lambda hidden: hidden + 1):
        with pytest.raises(KeyError), instead_of_head(head, lambda hidden: {}[0]):
            head(hidden)
        assert torch.equal(head(hidden), hidden + 1)
    assert torch.equal(head(hidden), plain) and "forward" not in vars(head)


def test_a_step_leaves_models_and_losses_as_they_were(tmp_path: Path) -> None:
    """After each kind of call, and after an error in the middle of one."""
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", layers=2, seed=2)
    records = token_records(4)
    for route in ("logits", "hidden"):
        trainer = AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path, logits_route=route))
        losses = trainer.loss_fn, trainer.eval_loss_fn
        assert losses[0] is not losses[1]
        before = [{name: value for name, value in vars(loss).items() if name[0] != "_"} for loss in losses]
        batch = trainer.data_collator(records)
        trainer.compute_loss(student, batch)
        trainer.compute_loss(student, batch, return_outputs=True)
        for loss_only in (True, False):
            trainer.prediction_step(student, batch, loss_only)
        with pytest.raises(TypeError, match="labels must be integers"):
            trainer.compute_loss(student, {**batch, "labels": batch["labels"].float()})
        after = [{name: value for name, value in vars(loss).items() if name[0] != "_"} for loss in losses]
        assert after == before and (trainer.loss_fn, trainer.eval_loss_fn) == losses
        assert "forward" not in {**vars(student.lm_head), **vars(teacher.lm_head)}


def _capped_in_secret(model: Any) -> None:
    _then(model, lambda logits: logits.div_(30.0).tanh_().mul_(30.0))


def _masked_in_secret(model: Any) -> None:
    _then(model, lambda logits: logits[..., 3].fill_(-math.inf))


def _then(model: Any, change: Callable[[Tensor], Any]) -> None:
    forward = model.forward

    def changed(**inputs: Any) -> Any:
        out = forward(**inputs)
        change(out.logits)
        return out

    model.forward = changed


def _wrapped(model: Any) -> None:
    model.set_output_embeddings(nn.Sequential(model.lm_head))


def _without_its_head(model: Any) -> None:
    weight = model.lm_head.weight
    model.forward = lambda **inputs: type("Out", (), {"logits": weight.new_zeros(1, 2, len(weight))})


def _failing(model: Any) -> None:
    def forward(**inputs: Any) -> None:
        raise KeyError("pixel_values")

    model.forward = forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_capped_in_secret, "its logits are not its head's result with HeadOptions"),
        (_masked_in_secret, "its logits are not its head's result with HeadOptions"),
        (_wrapped, "its head is no plain nn.Linear but Sequential"),
        (_without_its_head, "its head is not called once"),
        (_failing, "it cannot be tried out on two tokens: KeyError: 'pixel_values'"),
    ],
)
def test_other_heads_take_the_logits_route(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, message: str
) -> None:
    model = tiny_model("llama")
    change(model)
    with pytest.raises(NoPlainHeadError, match=message):
        plain_head(model)
    with pytest.raises(ValueError, match=f"logits_route='hidden' cannot be taken: student: {message}"):
        AdaKDTrainer(model=model, teacher=tiny_model("llama"), args=config(tmp_path, logits_route="hidden"))
    with caplog.at_level(logging.INFO):
        trainer = AdaKDTrainer(model=tiny_model("llama"), teacher=model, args=config(tmp_path))
    assert trainer._head_options is None
    (said,) = [record for record in caplog.records if "AdaKDTrainer" in record.message]
    assert said.message.startswith("AdaKDTrainer: loss from the logits") and f"teacher: {message}" in said.message
    assert said.levelno == logging.INFO


def test_the_route_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, "llama", "auto")
    said = [(record.levelno, record.message) for record in caplog.records if "AdaKDTrainer" in record.message]
    assert said == [(logging.INFO, "AdaKDTrainer: loss from hidden states; no logits of a whole batch are computed")]


def test_compiled_runs_take_the_logits_route(tmp_path: Path) -> None:
    args = config(tmp_path, logits_route="hidden")
    args.torch_compile = True
    with pytest.raises(ValueError, match="cannot be taken: torch_compile is on"):
        AdaKDTrainer(model=tiny_model("llama"), teacher=tiny_model("llama", seed=1), args=args)


def test_outputs_that_are_asked_for_have_logits(tmp_path: Path) -> None:
    """The same loss and share on the way, in training too."""
    student, batch = tiny_model("llama", seed=1).double(), AdaKDDataCollator()(token_records(4))
    teacher = tiny_model("llama", layers=2, seed=2).double()
    trainer = AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path, logits_route="hidden"))
    trainer.create_scheduler(10, torch.optim.SGD(student.parameters()))
    from_hidden = trainer.compute_loss(student.train(), batch)
    loss, outputs = trainer.compute_loss(student, batch, return_outputs=True)
    assert outputs.logits.shape == (*batch["labels"][:, batch["logits_to_keep"]].shape, 64)
    torch.testing.assert_close(from_hidden, loss, **CLOSE)
    trainer.loss_fn.step()
    torch.testing.assert_close(trainer.loss_fn.focus.loss_ema, loss.detach(), **CLOSE)


def test_frozen_head(tmp_path: Path) -> None:
    student = tiny_model("llama", seed=1)
    student.lm_head.weight.requires_grad_(False)
    before = student.lm_head.weight.clone()
    trainer = AdaKDTrainer(
        model=student,
        teacher=tiny_model("llama", layers=2, seed=2),
        args=config(tmp_path, max_steps=2, save_strategy="no", logits_route="hidden", learning_rate=0.1),
        train_dataset=token_records(16),
    )
    embedding = student.model.embed_tokens.weight.clone()
    trainer.train()
    assert student.lm_head.weight.grad is None and torch.equal(student.lm_head.weight, before)
    assert not torch.equal(student.model.embed_tokens.weight, embedding)
