"""The driver over whole runs: micro-batches, ranks, killed and resumed, run again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adakd_kernels.integrations.transformers import (
    AdaKDTrainer,
    last_checkpoint,
)

from .tiny_models import tiny_model, token_records
from .trainer_process import config, logged, of_both_ranks, ranked_trainer, resumed_trainer, train_logs, uneven_run

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64 throughout: only rounding


def test_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    runs = [ranked_trainer(tmp_path, batch_size=b, accumulation=a) for b, a in ((8, 1), (2, 4), (1, 8))]
    losses = [[log["loss"] for log in train_logs(trainer)] for trainer in runs]
    for trainer, loss in zip(runs[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        for name, value in runs[0].model.state_dict().items():
            torch.testing.assert_close(trainer.model.state_dict()[name], value, **CLOSE)
        assert trainer.loss_fn.focus.loss_ema.item() == pytest.approx(runs[0].loss_fn.focus.loss_ema.item(), rel=1e-12)
        assert trainer.loss_fn.focus.steps.item() == 3  # optimizer steps, not micro-batches


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("selection", ["micro_batch", "step"])
def test_two_ranks_equal_one(tmp_path: Path, two_ranks: Path, selection: str, route: str) -> None:
    """Two micro-batches on each rank, of which one has no label in the second step.

    One process with the same micro-batches in order, or with one big batch a step where the whole step chooses.
    """
    sizes = (2, 4) if selection == "micro_batch" else (8, 1)
    expected = uneven_run(tmp_path, route, selection, *sizes)
    both = of_both_ranks(two_ranks, f"uneven-{route}-{selection}")
    for found in both:
        for step, gradients in zip(expected["gradients"], found["gradients"], strict=True):
            for name, value in step.items():
                torch.testing.assert_close(gradients[name], value, **CLOSE)
        for name, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, **CLOSE)
        for log, own in zip(expected["logs"], found["logs"], strict=True):
            for name, value in log.items():
                tolerance = 0.012 if name[-4:] in ("_p10", "_p50", "_p90") else 1e-6  # a bin of the histograms
                assert own[name] == pytest.approx(value, rel=tolerance), name
    shares = [[log["focus_ratio"] for log in found["logs"]] for found in both]
    assert shares[0] == shares[1] == [log["focus_ratio"] for log in expected["logs"]]
    assert len(set(shares[0])) > 1 and min(shares[0]) < 1.0


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing checkpoint 6: the run goes on from checkpoint 4 and every number is the same."""
    killed = tmp_path / "killed"
    process = subprocess.run(
        [sys.executable, "-m", "tests.trainer_process", "killed", str(killed)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (killed / "checkpoint-6" / "model.safetensors").exists()
    assert last_checkpoint(killed) == str(killed / "checkpoint-4")

    whole = resumed_trainer(tmp_path / "whole")
    logs = train_logs(whole)
    assert len(logs) == 10
    assert len({log["focus_ratio"] for log in logs[4:]}) > 2  # the share moves after the checkpoint too
    for restore_callbacks in (False, True):
        resumed = resumed_trainer(killed if restore_callbacks else shutil.copytree(killed, tmp_path / "copy"))
        resumed.args.restore_callback_states_from_checkpoint = restore_callbacks
        resumed.train(resume_from_checkpoint=True)
        assert logged(resumed) == logs
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), name
        for name, value in whole.loss_fn.focus.state_dict().items():
            assert torch.equal(resumed.loss_fn.focus.state_dict()[name], value), name


def test_resuming_without_a_share_is_an_error(tmp_path: Path) -> None:
    def trainer(**options: Any) -> AdaKDTrainer:
        return AdaKDTrainer(
            model=tiny_model("llama", seed=1),
            teacher=tiny_model("llama", layers=2, seed=2),
            args=config(tmp_path, max_steps=2, save_steps=1, **options),
            train_dataset=token_records(16),
        )

    trainer(focus_ratio=0.5).train()
    with pytest.raises(ValueError, match=r"no state of the adaptive share.*set focus_ratio"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer(focus_ratio=0.5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_second_run_starts_with_a_new_share(tmp_path: Path) -> None:
    trainer = resumed_trainer(tmp_path)
    trainer.train()
    assert trainer.loss_fn.focus.steps.item() == 10 and trainer.loss_fn.focus.focus_ratio.item() < 1.0
    trainer.args.max_steps = 1
    assert train_logs(trainer)[0]["focus_ratio"] == 1.0
    assert trainer.loss_fn.focus.steps.item() == 1


def test_last_checkpoint_skips_what_was_not_finished(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "missing") is None and last_checkpoint(tmp_path) is None
    for step, text in ((2, "{}"), (10, "{}"), (12, '{"global_'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
