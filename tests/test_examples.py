"""The examples that train transformers' models, and the notebook, on tiny models and data."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .tiny_models import INSTRUCTIONS, save_pair, write_jsonl

pytestmark = pytest.mark.fast

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """The models and data that the examples ask for."""
    save_pair(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", INSTRUCTIONS)
    places = {"student": tmp_path / "student", "teacher": tmp_path / "teacher", "train": tmp_path / "train.jsonl"}
    return [word for name, path in places.items() for word in (f"--{name}", str(path))]


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_a_loop_of_ones_own(asked, tmp_path):
    sizes = ["--steps", "12", "--batch_size", "2", "--accumulation", "2", "--learning_rate", "1e-2"]
    logs = main_of("own_loop.py")([*asked, *sizes, "--output_dir", str(tmp_path / "out")])
    losses = [log["loss"] for log in logs]
    assert len(logs) == 12 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "student", tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_loop_counts_each_token_the_same(asked):
    """Two micro-batches of two records are one of four, with all tokens selected as in the warm-up."""
    one, two = (
        main_of("own_loop.py")([*asked, "--steps", "1", "--batch_size", size, "--accumulation", count])[0]["loss"]
        for size, count in (("4", "1"), ("2", "2"))
    )
    # The median difficulty, and so the temperatures, are those of a micro-batch.
    assert one == pytest.approx(two, rel=0.02)


def test_the_trainer_with_lora_resumes(asked, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    run = [*asked, "--lora", "--eval", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "run")]
    main_of("trainer.py")([*run, "--steps", "2"])
    trainer = main_of("trainer.py")([*run, "--steps", "4"])
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert [log["step"] for log in trainer.state.log_history if "eval_reverse_kl" in log] == [1, 2, 3, 4]


def test_the_trainer_on_two_processes(asked, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = [*asked, "--steps", "2", "--output_dir", str(tmp_path / "run")]
    subprocess.run(
        [*torchrun, str(EXAMPLES / "trainer.py"), *run],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and (tmp_path / "run" / "model.safetensors").is_file()


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell, names)
    assert names["losses"][-1] < names["losses"][0] and min(names["shares"]) < 1.0
    assert not any(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
