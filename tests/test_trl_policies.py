"""Completions of the student, of the data and from the buffer: which, when, and that all are learnt from alike."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'adakd-kernels[trl]'")

from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from adakd_kernels.integrations.transformers import AdaKDTrainer
from adakd_kernels.integrations.trl.distillation import PromptSampler
from adakd_kernels.integrations.trl.policies import (
    PolicyCallback,
    ReplayBuffer,
    Source,
    choose_source,
    completion_of_data,
)

from .test_trl import OFF, PROMPTS, logs, on_policy, pair, recorded
from .tiny_models import INSTRUCTIONS
from .trainer_process import config as trainer_config
from .trainer_process import logged, of_both_ranks

pytestmark = pytest.mark.fast

PAIRS = Dataset.from_list([{"prompt": r["instruction"], "completion": r["output"]} for r in INSTRUCTIONS * 2])
CHATS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": r["instruction"]}],
            "completion": [{"role": "assistant", "content": r["output"]}],
        }
        for r in INSTRUCTIONS * 2
    ]
)


@pytest.mark.parametrize(
    ("draw", "lmbda", "progress", "replays", "full", "source"),
    [
        (0.3, 0.5, 0.0, False, False, "student"),  # GKD
        (0.5, 0.5, 0.0, False, False, "data"),
        (0.99, 1.0, 0.0, False, False, "student"),
        (0.0, 0.0, 0.0, False, False, "data"),
        (0.3, 0.5, 0.2, True, False, "student"),  # DistiLLM: the buffer fills first
        (0.3, 0.5, 0.2, True, True, "student"),  # 0.3 < 0.5·0.8
        (0.3, 0.5, 0.5, True, True, "replay"),  # 0.25 <= 0.3 < 0.5
        (0.6, 0.5, 0.5, True, True, "data"),
        (0.0, 0.5, 1.0, True, True, "replay"),
    ],
)
def test_choice(draw: float, lmbda: float, progress: float, replays: bool, full: bool, source: str) -> None:
    assert choose_source(draw, lmbda, progress, replays, full) is Source(source)


def test_buffer_keeps_the_latest() -> None:
    buffer = ReplayBuffer(3)
    buffer.add([[1], [2]], [[10], [20]])
    assert not buffer.full
    assert sorted(buffer.sample(2, random.Random(0))) == [([1], [10]), ([2], [20])]
    assert len(buffer.sample(5, random.Random(0))) == 5
    buffer.add([[3], [4]], [[30], [40]])
    assert buffer.full and sorted(buffer.sample(3, random.Random(0))) == [([2], [20]), ([3], [30]), ([4], [40])]


def test_lambda_rises_where_the_loss_of_evaluation_has() -> None:
    policy = PolicyCallback(0.0, adaptive=True)
    seen = []
    for loss in (2.0, 2.05, 1.0, 2.1, 2.15, 2.25):
        policy.on_evaluate(None, None, None, metrics={"eval_loss": loss})  # type: ignore[arg-type]
        seen.append(round(policy.lmbda, 6))
    assert seen == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2]  # against the loss of the last change, as DistiLLM has it
    fixed = PolicyCallback(0.3)
    for loss in (1.0, 9.0):
        fixed.on_evaluate(None, None, None, metrics={"eval_loss": loss})  # type: ignore[arg-type]
    assert fixed.lmbda == 0.3


@pytest.mark.parametrize("dataset", [PAIRS, CHATS], ids=["texts", "messages"])
def test_completions_of_the_data_keep_their_end_and_lose_what_is_behind_it(dataset: Dataset) -> None:
    _, _, tokenizer = pair()
    for row, record in zip(dataset, INSTRUCTIONS, strict=False):
        if isinstance(row["prompt"], str):
            prompt = tokenizer(text=row["prompt"])["input_ids"]
        else:
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        eos = tokenizer.eos_token_id
        ids = completion_of_data(row, prompt, tokenizer, [eos], 512)
        assert ids[-1] == eos and ids.count(eos) == 1
        assert tokenizer.decode(ids[:-1]) == record["output"]
        assert completion_of_data(row, prompt, tokenizer, [eos], 3) == ids[:3]


def test_without_own_completions_the_losses_are_those_of_the_trainer_on_the_data(tmp_path: Path) -> None:
    """λ = 0 is off-policy: AdaKDTrainer has the same losses, so labels, end-of-text and number of items are the same.

    Labels one position late, as in the code released with the paper, would change every loss.
    """
    student, teacher, tokenizer = pair()
    options = {"focus_ratio": 0.5, "ce_weight": 0.2,
               "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
               "learning_rate": 1e-2, "lr_scheduler_type": "constant"}  # fmt: skip
    trainer = on_policy(tmp_path, True, lmbda=0.0, train_dataset=PAIRS, max_completion_length=64, **options)
    kept = recorded(trainer)
    ours = logs(trainer)
    records = []
    for _, batch, _ in kept:
        for row in range(len(batch["prompt_ids"])):
            ids, mask = (torch.cat([batch[f"{part}_{x}"][row] for part in ("prompt", "completion")])
                         for x in ("ids", "mask"))  # fmt: skip
            labels = torch.full_like(ids, -100)
            labels[batch["prompt_ids"].shape[1] :] = ids[batch["prompt_ids"].shape[1] :]
            records.append({"input_ids": ids[mask == 1].tolist(), "labels": labels[mask == 1].tolist()})
    assert all(record["labels"][-1] == tokenizer.eos_token_id for record in records)
    counts = [sum(label != -100 for record in records[4 * step : 4 * step + 4] for label in record["labels"])
              for step in range(3)]  # fmt: skip
    assert [int(batch["num_items_in_batch"]) for _, batch, _ in kept[::2]] == counts
    args = trainer_config(tmp_path, save_strategy="no", train_sampling_strategy="sequential", **options)
    expected = logs(AdaKDTrainer(student, teacher, args, train_dataset=records, processing_class=tokenizer))
    for got, wanted in zip(ours, expected, strict=True):
        for name in ("loss", "grad_norm", "difficulty_p50"):
            assert got[name] == pytest.approx(wanted[name], rel=1e-5), name
        assert got["source/data"] == 1.0 and got["source/student"] == got["source/replay"] == 0.0


def run(folder: Path, **options: Any) -> tuple[Any, list[Any]]:
    """A run of which the completions of every step are kept."""
    trainer = on_policy(folder, True, train_dataset=PAIRS, gradient_accumulation_steps=1, **options)
    kept = recorded(trainer)
    trainer.train()
    return trainer, [(batch["prompt_ids"], batch["completion_ids"]) for _, batch, _ in kept]


def test_own_and_given_completions_alternate_and_old_ones_come_back(tmp_path: Path) -> None:
    trainer, steps = run(tmp_path, lmbda=0.7, replay_capacity=4, max_steps=12)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    sources = [next(s for s in Source if line[f"source/{s.value}"]) for line in lines]
    assert {*sources} == {*Source}
    assert sources.index(Source.REPLAY) > 1  # the buffer is full after two steps of the student
    tokenizer = trainer.processing_class
    outputs = {record["output"] for record in INSTRUCTIONS}
    sampled: set[str] = set()
    for source, (prompts, completions) in zip(sources, steps, strict=True):
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        both = {*zip(tokenizer.batch_decode(prompts, skip_special_tokens=True), texts, strict=True)}
        if source is Source.DATA:
            assert all(any(output.startswith(text) for output in outputs) for text in texts)
        elif source is Source.REPLAY:
            assert both <= sampled
        else:
            sampled |= both
    assert trainer._buffer.full


def test_sampling_does_not_depend_on_adakd(tmp_path: Path) -> None:
    """At a learning rate of 0, both runs learn from the same completions in the same order, from every source."""
    still = {"lmbda": 0.7, "replay_capacity": 4, "max_steps": 6, "learning_rate": 0.0}
    (_, plain), (_, adakd) = run(tmp_path, **still, **OFF), run(tmp_path, **still, focus_ratio=0.5)
    for first, second in zip(plain, adakd, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, stock = run(tmp_path, learning_rate=0.0, max_steps=2)
    _, mixed = run(tmp_path, lmbda=1.0, replay_capacity=100, learning_rate=0.0, max_steps=2)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(stock, mixed, strict=True))


def test_the_adaptive_schedule_is_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a loss of evaluation that rises each time, λ does; evaluations read the data and repeat themselves."""
    options = {
        "lmbda": 0.0, "adaptive_lmbda": True, "replay_capacity": 4, "max_steps": 6, "eval_strategy": "steps",
        "eval_steps": 1, "save_strategy": "steps", "save_steps": 4, "train_dataset": PAIRS, "learning_rate": 0.0,
        "eval_dataset": PAIRS.select(range(4)), "gradient_accumulation_steps": 1,
    }  # fmt: skip
    trainer = on_policy(tmp_path, True, **options)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    monkeypatch.setattr("adakd_kernels.integrations.trl.policies.LOSS_EPSILON", 0.0)  # a loss that stays has risen
    whole = logs(on_policy(tmp_path, True, **options))
    lmbdas = [line["lmbda"] for line in whole]
    assert lmbdas == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3, 0.4])
    resumed = on_policy(tmp_path, True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    after = [line["lmbda"] for line in resumed.state.log_history if "loss" in line][-2:]
    assert after == pytest.approx(lmbdas[-2:])


MOVING = {"focus_beta": 0.2, "focus_epsilon": 1e-3, "focus_warmup_ratio": 0.2, "learning_rate": 0.1}
"""A share that moves with every step."""
SAVED = {**MOVING, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "train_dataset": PAIRS}
"""Six steps over an epoch and a half."""
POLICIES = {
    "SSSSSS": {},
    "SDSSDS": {"lmbda": 0.6, "seed": 21},
    "SSDRDR": {
        "lmbda": 0.3, "adaptive_lmbda": True, "replay_capacity": 4, "eval_strategy": "steps", "eval_steps": 1,
        "eval_dataset": PAIRS.select(range(2)), "seed": 78,
    },
}  # fmt: skip
"""Options, and the sources of the six steps: the student, the data, the replay buffer."""
SHORT = {Source.STUDENT: "S", Source.DATA: "D", Source.REPLAY: "R"}


def numbers(trainer: Any, checkpoint: str | bool | None = None) -> tuple[list[Any], list[dict[str, float]]]:
    """Of a run: prompts, completions and loss of each micro-batch, and its log lines without what the clock says."""
    kept: list[Any] = []
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(model, inputs, *args, **kwargs)
        if trainer.model.training:
            kept.append((inputs["prompt_ids"].tolist(), inputs["completion_ids"].tolist(), loss.item()))
        return loss

    trainer.compute_loss = compute_loss
    trainer.train(resume_from_checkpoint=checkpoint)
    return kept, [{name: line[name] for name in line if name != "step_time"} for line in logged(trainer)]


def sources(lines: list[dict[str, float]]) -> str:
    """A letter for each step."""
    return "".join(SHORT[s] for line in lines for s in Source if line.get(f"source/{s.value}", s is Source.STUDENT))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_has_the_numbers_of_one_that_was_not_stopped(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from the middle of the first epoch, from its end, and from the middle of the second."""
    monkeypatch.setattr("adakd_kernels.integrations.trl.policies.LOSS_EPSILON", -10.0)  # every loss has risen
    options = {**SAVED, **POLICIES[policy]}
    batches, lines = numbers(on_policy(tmp_path, True, **options))
    assert sources(lines) == policy
    assert len({line["focus_ratio"] for line in lines}) > 2
    assert "2510.11615" in (tmp_path / "README.md").read_text()
    if "adaptive_lmbda" in options:
        assert [line["lmbda"] for line in lines] == pytest.approx([0.3, 0.3, 0.4, 0.5, 0.6, 0.7])
    for step in (3, 4, 5):
        resumed = on_policy(tmp_path, True, **options)
        torch.rand(step)
        assert numbers(resumed, str(tmp_path / f"checkpoint-{step}")) == (batches[2 * step :], lines)


def test_the_order_of_prompts_is_that_of_trl_in_every_epoch() -> None:
    """Which TRL has only where it reads all epochs one after the other."""
    options = {"data_source": range(20), "mini_repeat_count": 1, "batch_size": 4, "repeat_count": 2, "seed": 3}
    theirs = RepeatSampler(**options)
    for epoch in range(3):
        assert [*PromptSampler(lambda epoch=epoch: epoch, **options)] == [*theirs]
    assert [*RepeatSampler(**options)] != [*theirs]
    unshuffled = PromptSampler(lambda: 1, **options, shuffle=False)
    assert [*unshuffled][:8] == [0, 1, 2, 3] * 2


class Interrupt(TrainerCallback):
    """Ctrl-C between the two micro-batches of the fourth step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and not self.done:
            self.done = True
            raise KeyboardInterrupt

    done = False


def test_the_same_trainer_goes_on_after_an_interruption(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From its last whole checkpoint, without what it had sampled for the step that it did not end."""
    options = {**SAVED, **POLICIES["SDSSDS"], "replay_capacity": 50}  # too many to be full
    batches, _ = numbers(on_policy(tmp_path / "whole", True, **options))
    trainer = on_policy(tmp_path / "stopped", True, callbacks=[Interrupt()], **options)
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*stopped' to resume from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(trainer._buffer.records) == 12  # with those of the fourth step
    (tmp_path / "stopped" / "checkpoint-4").mkdir()  # killed while it saved
    after, _ = numbers(trainer, True)
    assert after == batches[6:]
    assert len(trainer._buffer.records) == 16
    assert not caplog.records
    (tmp_path / "stopped" / "checkpoint-3" / "replay_buffer_0.json").unlink()
    numbers(trainer, str(tmp_path / "stopped" / "checkpoint-3"))
    assert "replay_buffer_0.json: the replay buffer begins empty" in caplog.text
    assert len(trainer._buffer.records) == 8


RANKED = {**OFF, "lmbda": 0.0, "gradient_accumulation_steps": 1, "optim": "sgd", "learning_rate": 0.5,
          "max_grad_norm": 0.0, "train_dataset": PAIRS, "max_completion_length": 64}  # fmt: skip
"""Steps that do not depend on how a batch is split."""


def test_two_ranks_are_one_with_twice_the_batch(tmp_path: Path, two_ranks: Path) -> None:
    """The number of items is that of all ranks, and the ranks take their completions from one source."""
    whole = on_policy(tmp_path, True, **RANKED, per_device_train_batch_size=4)
    logs(whole)
    ranks = of_both_ranks(two_ranks, "policies")
    initial = pair()[0].state_dict()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        assert name.endswith("norm.weight") or not torch.allclose(value, initial[name], rtol=1e-3, atol=1e-4)
    assert ranks[0]["sources"] == ranks[1]["sources"] and len({*ranks[0]["sources"]}) == 2


def test_two_ranks_resume(two_ranks: Path) -> None:
    """Each with its own buffer and its part of the prompts, from the middle of each epoch."""
    ranks = of_both_ranks(two_ranks, "policies")
    for rank in ranks:
        batches, lines = rank["whole"]
        assert sources(lines) == "SSSRRS"
        for step, resumed in rank["resumed"].items():
            assert resumed == (batches[step:], lines)
    assert all(a[1] != b[1] for a, b in zip(ranks[0]["whole"][0], ranks[1]["whole"][0], strict=True))


def one_of_two_ranks(folder: Path) -> dict[str, Any]:
    """Train, and draw sources: weights and draws; and the numbers of a run that is resumed and of one that is not."""
    options = {**SAVED, "gradient_accumulation_steps": 1, "lmbda": 0.9, "replay_capacity": 2, "seed": 48}
    whole = numbers(on_policy(folder, True, **options))
    resumed = {step: numbers(on_policy(folder, True, **options), str(folder / f"checkpoint-{step}")) for step in (3, 5)}
    trainer = on_policy(folder, True, **RANKED, per_device_train_batch_size=2)
    trainer.train()
    policy = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PolicyCallback))
    policy.lmbda, drawn = 0.5, []
    # As if each rank had drawn for itself.
    trainer.args.seed += int(os.environ["RANK"])
    for trainer.state.global_step in range(8):
        drawn.append(trainer._choose_source([{}]).value)
    return {"weights": trainer.model.state_dict(), "sources": drawn, "whole": whole, "resumed": resumed}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 1.5}, r"lmbda must be in \[0, 1\], got 1.5"),
        ({"replay_capacity": -1}, "replay_capacity must be 0 or more, got -1"),
        ({"adaptive_lmbda": True, "lmbda": 0.0}, "there are none: set eval_strategy"),
        ({"adaptive_lmbda": True, "eval_strategy": "steps", "eval_steps": 1}, "which is 1 already"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_policy(tmp_path, True, **options)


def test_wrong_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"each prompt needs a completion, got \['prompt'\]; set lmbda to 1"):
        on_policy(tmp_path, True, lmbda=0.0, train_dataset=PROMPTS).train()
    _, _, tokenizer = pair()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages|length }}<eos>"
    with pytest.raises(ValueError, match="writes the prompt of an answered conversation in another way"):
        prompt = tokenizer.apply_chat_template(CHATS[0]["prompt"], add_generation_prompt=True, return_dict=True)
        completion_of_data(CHATS[0], prompt["input_ids"], tokenizer, [tokenizer.eos_token_id], 512)
