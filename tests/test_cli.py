"""The command line: a training run, one line for every mistake, and the doctor."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from adakd_kernels import ops
from adakd_kernels.cli import COMMANDS, main
from adakd_kernels.commands import doctor
from adakd_kernels.commands.options import parse
from adakd_kernels.integrations.transformers import AdaKDConfig, AdaKDTrainer

from .tiny_models import CHAT_TEMPLATE, INSTRUCTIONS, save_pair, tiny_tokenizer, write_jsonl

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher, records, and run.yaml, which names them."""
    folder = tmp_path_factory.mktemp("cli")
    student, teacher = save_pair(folder, "llama", chat_template=True)
    options = {
        "student": str(student), "teacher": str(teacher), "train_file": str(write_jsonl(folder / "train.jsonl")),
        "eval_file": str(folder / "train.jsonl"), "output_dir": str(folder / "unused"), "max_steps": 3, "save_steps": 1,
        "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": "1e-2", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "divergence": "jensen_shannon",
        "divergence_kwargs": {"beta": 0.3},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is found before a model is loaded."""

    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


def error_line(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run the command line, and return its one line of error."""
    assert main(argv) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("adakd")]
    assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0]) and "Traceback" not in captured.err
    return lines[0]


def run_flags(workspace: Path, tmp_path: Path) -> list[str]:
    return ["train", "--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path / "out")]


def train(workspace: Path, tmp_path: Path, *flags: str) -> int:
    return main([*run_flags(workspace, tmp_path), *flags])


def test_train_and_resume(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(workspace, tmp_path) == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out.splitlines()[-1])
    assert metrics["steps"] == 3 and metrics["focus_ratio"] == 1.0  # a warm-up of 5 %, then a change below epsilon
    assert metrics["output_dir"] == str(tmp_path / "out")
    assert f"{workspace / 'train.jsonl'}: 8 records\n" in captured.err
    check_lines_to_try(captured.err, tmp_path / "out", capsys)
    check_model_card(workspace, tmp_path / "out")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 3)
    assert metrics["eval_loss"] == state["log_history"][-1]["eval_loss"] < losses[0]
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_loss"] == metrics["eval_loss"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(workspace / "student", dtype=torch.float32)
    assert all(
        a.shape == b.shape and not torch.equal(a, b)
        for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()

    assert "holds checkpoints of an earlier run: give --resume_from_checkpoint last" in error_line(
        capsys, "train", "--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path / "out")
    )
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    assert train(workspace, tmp_path, "--resume_from_checkpoint", "last") == 0
    resumed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert resumed["steps"] == 3 and resumed["eval_loss"] == metrics["eval_loss"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_best_checkpoint_of_a_finished_run(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate that makes the student worse, it is the first; also after a run was killed at its end."""
    out = tmp_path / "out"
    flags = ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true"]
    flags += ["--metric_for_best_model", "forward_kl", "--learning_rate", "9"]
    for resume in ([], ["--resume_from_checkpoint", "last"]):
        assert train(workspace, tmp_path, *flags, *resume) == 0
        state = json.loads((out / "trainer_state.json").read_text())
        assert (state["global_step"], state["best_global_step"]) == (3, 1), state["log_history"]
        evaluation = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert evaluation["eval_forward_kl"] == pytest.approx(state["best_metric"])
        card = ModelCard.load(out / "README.md").text
        assert "- steps: 3\n- step of this model, whose forward_kl is the best: 1\n" in card
        (out / "trainer_state.json").unlink()


def check_lines_to_try(printed: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two lines that a run prints at its end do what they say."""
    said, _, lines = printed.partition(f"adakd train: the model is in {out}. To try it:\n\n")
    assert said and len(lines.splitlines()) == 2
    exec(lines, {})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    question = [{"role": "user", "content": "Name a word that rhymes with cat."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def check_model_card(workspace: Path, out: Path) -> None:
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and "adakd" in card.data.tags
    assert card.data.base_model is None  # a folder, which means nothing on the hub
    state = json.loads((out / "trainer_state.json").read_text())
    for log in [log for log in state["log_history"] if "loss" in log]:
        assert f"| {log['step']} | {log['focus_ratio']:.3f} | {log['loss']:.4g} |" in card.text
    assert f"- eval_loss: {state['log_history'][-1]['eval_loss']:.6g}" in card.text
    for part in (
        f"`{workspace / 'student'}`, distilled from `{workspace / 'teacher'}`",
        f"`{workspace / 'train.jsonl'}`: 8 records of at most 1024 tokens",
        "- divergence: `jensen_shannon`\n- divergence_kwargs: `{'beta': 0.3}`\n- temperature_scale: 0.5",
        "- steps: 3\n- learning_rate: 0.01",
        "arXiv:2510.11615",
    ):
        assert part in card.text


def test_data_in_other_forms(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Parquet file, packed, and a folder to evaluate on; what was cut is said, once."""
    rows = [{"prompt": row["instruction"], "completion": row["output"], "id": n} for n, row in enumerate(INSTRUCTIONS)]
    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "train.parquet")
    table.save_to_disk(tmp_path / "held_out")
    flags = ["--train_file", str(tmp_path / "train.parquet"), "--eval_file", str(tmp_path / "held_out")]
    options = ["--max_length", "20", "--packing", "--padding-free", "--dataset_num_proc", "2", "--max_steps", "1"]
    assert train(workspace, tmp_path, *flags, *options) == 0
    captured = capsys.readouterr()
    for name in ("train.parquet", "held_out"):
        (line,) = [line for line in captured.err.splitlines() if line.startswith(str(tmp_path / name))]
        assert re.fullmatch(r".*: 8 records; \d of them cut at max_length", line)
    assert json.loads(captured.out.splitlines()[-1])["eval_loss"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`{tmp_path / 'train.parquet'}`: 8 records of at most 20 tokens" in card and "- packing: True" in card
    (tmp_path / "bad.csv").write_text("instruction,output\na,b\nc,\n")
    line = error_line(
        capsys, *run_flags(workspace, tmp_path / "bad"), "--train_file", str(tmp_path / "bad.csv"),
        "--dataset_num_proc", "2",
    )  # fmt: skip
    assert line == (f"adakd train: error: {tmp_path / 'bad.csv'}:3: field 'output', which is to be learnt, is empty")
    line = error_line(capsys, *run_flags(workspace, tmp_path / "bad"), "--long_records", "refuse", "--max_length", "50")
    assert re.search(r"train.jsonl:\d: has \d+ tokens, more than max_length=50: raise it, or set long_records to", line)


def test_a_finished_run_has_nothing_to_do(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert train(workspace, tmp_path, "--max_steps", "2") == 0
    weights = (out / "model.safetensors").read_bytes()
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    flags = ["--max_steps", "2", "--resume_from_checkpoint", "last"]
    assert train(workspace, tmp_path, *flags) == 0
    captured = capsys.readouterr()
    assert captured.err.endswith(f"adakd train: nothing to do: the run in {out} has all its 2 steps\n")
    assert captured.out == "" and not (out / "checkpoint-3").exists()
    (out / "model.safetensors").unlink()  # as if it had been killed while it wrote these
    (out / "trainer_state.json").write_text('{"global_st')
    assert train(workspace, tmp_path, *flags) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["steps"] == 2 and again["eval_loss"] == metrics["eval_loss"]
    assert (out / "model.safetensors").read_bytes() == weights and not (out / "checkpoint-3").exists()
    # Whole epochs: two of four steps of two records.
    epochs = ["--max_steps", "-1", "--num_train_epochs", "0.5", "--resume_from_checkpoint", "last"]
    assert train(workspace, tmp_path, *epochs) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert train(workspace, tmp_path, "--max_steps", "3", "--resume_from_checkpoint", "last") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 3


def test_ctrl_c_saves_what_can_be_resumed(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "adakd_kernels.cli", "train", "--config", str(workspace / "run.yaml"),
        "--output_dir", str(out), "--max_steps", "1000000", "--save_steps", "1000000", "--dataloader_num_workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert any("'loss'" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers of the data loader too
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    (checkpoint,) = out.glob("checkpoint-*")
    assert err.endswith(f"adakd train: interrupted; '--resume_from_checkpoint last' goes on from {checkpoint}\n")
    assert "Traceback" not in err and not (out / "model.safetensors").exists()
    steps = int(checkpoint.name.removeprefix("checkpoint-"))
    assert train(workspace, tmp_path, "--max_steps", str(steps + 1), "--resume_from_checkpoint", "last") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == steps + 1


def test_ctrl_c_before_a_checkpoint_promises_nothing(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AdaKDTrainer, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert train(workspace, tmp_path) == 130
    assert capsys.readouterr().err.endswith("adakd train: interrupted; there is no checkpoint to resume from\n")
    assert signal.getsignal(signal.SIGINT) is handler


def fails_at_step(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    training_step = AdaKDTrainer.training_step

    def failing(trainer: AdaKDTrainer, *args: Any) -> Any:
        if trainer.state.global_step == step:
            raise error
        return training_step(trainer, *args)

    monkeypatch.setattr(AdaKDTrainer, "training_step", failing)


def test_nan_ends_with_one_line(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at_step(monkeypatch, 1, FloatingPointError("step 1, record 'x':\nthe loss is nan"))
    line = error_line(capsys, *run_flags(workspace, tmp_path), code=1)
    assert line == (
        "adakd train: error: step 1, record 'x': the loss is nan; "
        f"the last checkpoint is {tmp_path / 'out' / 'checkpoint-1'}"
    )


def test_memory_that_is_not_there_is_one_line(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at_step(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    line = error_line(capsys, *run_flags(workspace, tmp_path))
    assert "the device has no memory left: lower per_device_train_batch_size" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a full disk")
def test_a_full_disk_keeps_the_former_checkpoint(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    (out / "checkpoint-2" / "optimizer.pt").symlink_to("/dev/full")
    line = error_line(capsys, *run_flags(workspace, tmp_path))
    assert line.startswith(f"adakd train: error: no space left on the disk of {out}: ")
    assert line.endswith(f"; '--resume_from_checkpoint last' goes on from {out / 'checkpoint-1'}")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert train(workspace, tmp_path, "--resume_from_checkpoint", "last") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 3


def test_a_full_disk_at_the_end(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save = AdaKDTrainer.save_model
    monkeypatch.setattr(AdaKDTrainer, "save_model", lambda *args, **kwargs: save(*args, **kwargs) if kwargs else full())
    line = error_line(capsys, *run_flags(workspace, tmp_path))
    assert line.endswith(f"goes on from {tmp_path / 'out' / 'checkpoint-3'}") and ": no space left on" in line


def test_help_begins_with_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as exit_:
            main(["train", flag])
        assert exit_.value.code == 0
        texts[flag] = capsys.readouterr().out
    for text in texts.values():
        places = [text.index(f"\n  --{name}") for name in ("divergence ", "focus_min_ratio", "student ", "max_steps")]
        assert places == sorted(places)
    assert texts["--help"].splitlines()[5].startswith("the method") and len(texts["--help"].splitlines()) < 180
    # Every option of the trainer is in one of the two.
    for option in fields(AdaKDConfig):
        assert f"--{option.name} " in texts["--help-all"]
    assert "--adam_beta1" in texts["--help-all"] and "--adam_beta1" not in texts["--help"]


@contextmanager
def hub(status: int, headers: dict[str, str]) -> Iterator[str]:
    """A hub that answers every request alike; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no such folder, and no such model on the hub"),
        (403, "GatedRepo", "the hub gives it to those who accepted its terms"),
        (503, "", "no such folder, not in the hub's cache on this machine, and the hub answers 503"),
    ],
)
def test_what_the_hub_refuses(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    no_models: None, status: int, code: str, message: str,
) -> None:  # fmt: skip
    with hub(status, {"X-Error-Code": code}) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        line = error_line(capsys, *run_flags(workspace, tmp_path), "--student", "models/student")
    assert line.startswith(f"adakd train: error: student models/student: {message}")


def test_no_hub_is_known_at_once(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    no_models: None,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    line = error_line(capsys, *run_flags(workspace, tmp_path), "--teacher", "models/teacher")
    assert time.monotonic() - start < 10
    assert "teacher models/teacher: no such folder, not in the hub's cache on this machine, and the hub cannot" in line


def test_without_a_hub_its_cache_is_taken_at_once(workspace: Path, tmp_path: Path) -> None:
    repo = tmp_path / "home" / "hub" / "models--someone--tiny"
    shutil.copytree(workspace / "student", repo / "snapshots" / "0123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "adakd_kernels.cli", *run_flags(workspace, tmp_path)]
    process = subprocess.run(
        [*command, "--student", "someone/tiny", "--max_steps", "1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "Retrying" not in process.stderr
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "someone/tiny"


def test_a_logger_that_is_not_installed(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    no_models: None,
) -> None:  # fmt: skip
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    line = error_line(capsys, *run_flags(workspace, tmp_path), "--report_to", "wandb")
    assert line.startswith("adakd train: error: report_to: WandbCallback requires wandb to be installed.")
    assert "report_to: abacus is not supported, only azure_ml" in error_line(
        capsys, *run_flags(workspace, tmp_path), "--report_to", "abacus"
    )


def test_evaluations_that_cannot_be(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_models: None
) -> None:
    flags = [*run_flags(workspace, tmp_path), "--eval_strategy", "steps"]
    line = error_line(capsys, *flags, "--eval_file=")
    assert line.startswith("adakd train: error: eval_strategy needs records to evaluate on: give --eval_file, or")
    line = error_line(capsys, *flags, "--load_best_model_at_end", "true", "--metric_for_best_model", "eval_kl")
    assert line == (
        "adakd train: error: metric_for_best_model must be one of loss, forward_kl, reverse_kl, cross_entropy, "
        "agreement, got 'eval_kl'"
    )


def test_an_output_folder_that_cannot_be_made(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_models: None
) -> None:
    (tmp_path / "out").write_text("a file")
    for folder, reason in ((tmp_path / "out", "File exists"), (tmp_path / "out" / "a", "Not a directory")):
        line = error_line(capsys, *run_flags(workspace, tmp_path), "--output_dir", str(folder))
        assert line == f"adakd train: error: output_dir {folder}: cannot be written to: {reason}"


def test_a_template_that_refuses_a_system_prompt(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_models: None
) -> None:
    student = shutil.copytree(workspace / "student", tmp_path / "student")
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (student / "chat_template.jinja").write_text(template + CHAT_TEMPLATE)
    messages = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages[1:]}, {"messages": messages}])
    flags = ["--student", str(student), "--train_file", str(data)]
    line = error_line(capsys, *run_flags(workspace, tmp_path), *flags)
    assert line == (
        f"adakd train: error: {data}:2: the tokenizer's chat template refuses the messages: System role not supported"
    )


def test_flags_override_the_file(workspace: Path) -> None:
    options, config = parse(
        ["--config", str(workspace / "run.yaml"), "--max-steps", "7", "--divergence=skew_forward_kl",
         "--divergence_kwargs", '{"alpha": 0.2}', "--focus_ratio", "0.5", "--max_length", "99"]
    )  # fmt: skip
    assert (config.max_steps, config.divergence, config.divergence_kwargs) == (7, "skew_forward_kl", {"alpha": 0.2})
    assert (config.focus_ratio, config.learning_rate, config.save_steps, config.use_cpu) == (0.5, 0.01, 1, True)
    assert (config.max_length, options.student, options.eval_file) == (
        99, str(workspace / "student"), str(workspace / "train.jsonl"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--divergence", "kl"], "divergence must be one of forward_kl, "),
        (["--divergence_kwargs", "{"], "divergence_kwargs must be JSON, got '{'"),
        (["--difficulty", "x"], "difficulty must be one of hellinger, "),
        (["--focus_ratio", "2"], "focus_ratio must be in (0, 1], got 2.0"),
        (["--focus_beta", "1"], "focus_beta must lie in [0, 1), got 1.0"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (
            ["--lr_scheduler_type", "spiral"],
            "argument --lr_scheduler_type/--lr-scheduler-type: invalid choice: 'spiral'",
        ),
        (["--max_length", "1"], "max_length must be 2 or more, got 1"),
        (["--teacher_dtype", "int8"], "teacher_dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        (["--divergense", "kl"], "unknown option '--divergense'; did you mean --divergence?"),
        (["--diverg", "hellinger"], "unknown option '--diverg'; did you mean --divergence?"),
        (["--max-step=3"], "unknown option '--max-step=3'; did you mean --max_steps?"),
        (["--zzzzzz"], "unknown option '--zzzzzz'; see adakd train --help"),
        (["--divergence_kwargs", "[" * 100_000], "the JSON of an option is nested too deeply"),
        (["--student", "/no/such/folder"], "student /no/such/folder: no such folder"),
        (["--teacher", "./none"], "teacher ./none: no such folder"),
        (["--train_file", "none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["--eval_file", "none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["--resume_from_checkpoint", "last"], "has no complete checkpoint to resume from"),
        (["--resume_from_checkpoint", "/none"], "checkpoint /none: no checkpoint of a trainer: trainer_state.json is"),
        (["--config", "none.yaml"], "none.yaml: cannot be read: No such file or directory"),
        (
            ["--max_length", "3"],
            "none of its 8 records has anything to learn within max_length=3; raise it",
        ),
    ],
)
def test_wrong_flags(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    argv = ["train", "--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path / "out"), *flags]
    line = error_line(capsys, *argv)
    assert line.startswith("adakd train: error: ") and message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("studend: a\n", "unknown option 'studend'; did you mean student?"),
        ("max_steps: many\n", "argument --max_steps/--max-steps: invalid int value: 'many'"),
        ("- a\n", "expected options as 'name: value', got list"),
        ("a: [1\n", "not YAML: "),
        ("", "expected options as 'name: value', got NoneType"),
    ],
)
def test_wrong_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    line = error_line(capsys, "train", "--config", str(tmp_path / "run.yaml"))
    assert line.startswith(f"adakd train: error: {tmp_path / 'run.yaml'}: {message}")


def test_missing_options(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "train", "--teacher", "a")
    assert line == "adakd train: error: student is missing: give --student, or student in the --config file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n', ":2: field 'output' is missing"),
        ("\n", ": nothing to train on: it has no records"),
        (
            '{"instruction": "a", "output": "b\\ud83d"}\n',
            ":1: field 'output' has half of a surrogate pair, '\\ud83d', as",
        ),
        ('{"messages": ' + "[" * 100_000, ":1: not JSON: "),
    ],
)
def test_wrong_data(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    flags = ["--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path), "--train_file"]
    line = error_line(capsys, "train", *flags, str(tmp_path / "bad.jsonl"))
    assert line.startswith(f"adakd train: error: {tmp_path / 'bad.jsonl'}{message}")


def test_a_student_that_is_its_teacher(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = f"{workspace / 'student'}/../student"
    line = error_line(capsys, *run_flags(workspace, tmp_path), "--teacher", teacher)
    assert f"student and teacher are the same model, {workspace / 'student'}: " in line


def test_mismatched_tokenizers(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(workspace / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    flags = ["--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    line = error_line(capsys, "train", *flags, "--teacher", str(tmp_path / "teacher"))
    assert "student and teacher must share one tokenizer, but token 'a' is" in line


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("student/model.safetensors", "student {}/student: cannot be loaded: SafetensorError"),
        ("student/tokenizer.json", "student {}/student: cannot be loaded: "),
        ("teacher/config.json", "teacher {}/teacher: cannot be loaded: "),
    ],
)
def test_unreadable_models(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str, message: str
) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(workspace / name, tmp_path / name)
    (tmp_path / broken).write_bytes(b"{broken")
    flags = ["--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    line = error_line(
        capsys, "train", *flags, "--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")
    )
    assert line.startswith("adakd train: error: " + message.format(tmp_path))


@pytest.mark.parametrize("broken", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_unreadable_checkpoint(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    assert train(workspace, tmp_path, "--max_steps", "1") == 0
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / broken).write_bytes(b"broken")
    capsys.readouterr()
    flags = ["--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    line = error_line(capsys, "train", *flags, "--resume_from_checkpoint", str(checkpoint))
    assert line.startswith(f"adakd train: error: checkpoint {checkpoint}: cannot be resumed from: ")


def test_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = ", ".join(COMMANDS)
    assert error_line(capsys, "trian") == f"adakd: error: unknown command 'trian'; expected one of {known}"
    assert error_line(capsys, "doctor", "--fast") == "adakd doctor: error: unrecognized arguments: --fast"
    assert error_line(capsys, "doctor", "--hepl").endswith("unrecognized arguments: --hepl; did you mean --help?")
    assert main([]) == 2 and capsys.readouterr().err.startswith("usage: adakd COMMAND")
    assert main(["--help"]) == 0 and capsys.readouterr().out.startswith("usage: adakd COMMAND")
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"adakd-kernels {version('adakd-kernels')}\n"
    demo, seen = ModuleType("adakd_kernels.demo"), []
    demo.main = lambda argv: seen.append(argv) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "adakd_kernels.demo", demo)
    assert main(["demo", "--steps", "2"]) == 3 and seen == [["--steps", "2"]]

    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "main", interrupted)
    assert main(["demo"]) == 130 and capsys.readouterr().err == "adakd demo: interrupted\n"


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    taken = ops.backend("cpu")
    assert f"cpu: {taken.name}, because {taken.reason}" in out and "all checks passed" in out
    assert f"torch          {torch.__version__}" in out and "python         3." in out
    for op in doctor.CHECKS:
        line = next(line for line in out.splitlines() if line.split()[:1] == [op])
        assert line.split()[1] == taken.name and line.split()[2].startswith("ok")

    stats = ops.token_stats

    def off_by_a_little(*args: Any) -> Any:
        difficulty, normalizers_1 = stats(*args)
        return difficulty * 1.0001, normalizers_1

    def broken(*args: Any) -> Any:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(ops, "token_stats", off_by_a_little)
    monkeypatch.setattr(ops, "token_divergence", broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    failed = {line.split()[0]: line for line in out.splitlines() if "failed: " in line}
    assert set(failed) == {"token_stats", "token_divergence", "token_divergence_backward", "token_divergence_backward_"}
    assert "failed: error 9.3e-05, allowed " in failed["token_stats"]  # 1e-4 of the largest value
    assert failed["token_divergence"].endswith("failed: RuntimeError: no such kernel")
    assert "4 of the checks failed" in out


def test_transformers_is_imported_when_needed_only() -> None:
    script = """
import sys
import adakd_kernels, adakd_kernels.cli, adakd_kernels.trainer.records, adakd_kernels.commands.doctor
assert not {"transformers", "datasets", "yaml"} & set(sys.modules)
sys.modules["transformers"] = None
try:
    import adakd_kernels.integrations.transformers
except ImportError as error:
    print(error)
print(adakd_kernels.cli.main(["train", "--student", "a"]))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message, code = process.stdout.splitlines()
    assert message.startswith(
        "AdaKDTrainer needs transformers, accelerate and datasets: pip install 'adakd-kernels[train]'"
    )
    assert code == "2" and process.stderr == f"adakd train: error: {message}\n"


def test_a_missing_pyyaml_is_one_line() -> None:
    script = """
import sys
sys.modules["yaml"] = sys.modules["transformers"] = None  # as after `pip install .`
import adakd_kernels.cli
sys.exit(adakd_kernels.cli.main(["train", "--student", "a"]))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 2 and process.stdout == "" and len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith(
        "adakd train: error: a training run needs pyyaml: pip install 'adakd-kernels[train]'"
    )
