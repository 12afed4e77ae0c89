"""The command line: a training run, one line for every mistake, and the doctor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from adakd_kernels import ops
from adakd_kernels.cli import main
from adakd_kernels.commands import doctor
from adakd_kernels.commands.train import parse

from .tiny_models import save_pair, tiny_tokenizer, write_jsonl

pytestmark = pytest.mark.fast


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


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run the command line, and return its one line of error."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("adakd")]
    assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0]) and "Traceback" not in captured.err
    return lines[0]


def train(workspace: Path, tmp_path: Path, *flags: str) -> int:
    return main(["train", "--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path / "out"), *flags])


def test_train_and_resume(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(workspace, tmp_path) == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out.splitlines()[-1])
    assert metrics["steps"] == 3 and metrics["focus_ratio"] == 1.0  # a warm-up of 5 %, then a change below epsilon
    assert metrics["output_dir"] == str(tmp_path / "out")
    assert f"{workspace / 'train.jsonl'}: 8 records\n" in captured.err
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


def test_flags_override_the_file(workspace: Path) -> None:
    options, config = parse(
        ["--config", str(workspace / "run.yaml"), "--max-steps", "7", "--divergence=skew_forward_kl",
         "--divergence_kwargs", '{"alpha": 0.2}', "--focus_ratio", "0.5", "--max_length", "99"]
    )  # fmt: skip
    assert (config.max_steps, config.divergence, config.divergence_kwargs) == (7, "skew_forward_kl", {"alpha": 0.2})
    assert (config.focus_ratio, config.learning_rate, config.save_steps, config.use_cpu) == (0.5, 0.01, 1, True)
    assert (options.max_length, options.student, options.eval_file) == (
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
        (["--divergense", "kl"], "unknown option '--divergense'; see adakd train --help"),
        (["--diverg", "hellinger"], "unknown option '--diverg'; see adakd train --help"),
        (["--student", "/no/such/folder"], "student /no/such/folder: no such folder"),
        (["--teacher", "./none"], "teacher ./none: no such folder"),
        (["--train_file", "none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["--eval_file", "none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["--resume_from_checkpoint", "last"], "has no complete checkpoint to resume from"),
        (["--resume_from_checkpoint", "/none"], "checkpoint /none: no checkpoint of a trainer: trainer_state.json is"),
        (["--config", "none.yaml"], "none.yaml: cannot be read: No such file or directory"),
        (
            ["--max_length", "3"],
            "the prompts of all 8 records leave no room for an answer within max_length=3; raise it",
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
        ("studend: a\n", "unknown option 'studend'; see adakd train --help"),
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
    ],
)
def test_wrong_data(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    flags = ["--config", str(workspace / "run.yaml"), "--output_dir", str(tmp_path), "--train_file"]
    line = error_line(capsys, "train", *flags, str(tmp_path / "bad.jsonl"))
    assert line.startswith(f"adakd train: error: {tmp_path / 'bad.jsonl'}{message}")


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
    assert error_line(capsys, "trian") == "adakd: error: unknown command 'trian'; expected one of train, demo, doctor"
    assert error_line(capsys, "doctor", "--fast") == "adakd doctor: error: unrecognized arguments: --fast"
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
assert "transformers" not in sys.modules and "yaml" not in sys.modules
sys.modules["transformers"] = None
try:
    import adakd_kernels.integrations.transformers
except ImportError as error:
    print(error)
print(adakd_kernels.cli.main(["train", "--student", "a"]))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message, code = process.stdout.splitlines()
    assert message.startswith("AdaKDTrainer needs transformers and accelerate: pip install 'adakd-kernels[train]'")
    assert code == "2" and process.stderr == f"adakd train: error: {message}\n"
