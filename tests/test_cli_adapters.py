"""`adakd train` with adapters: from one copy of the weights, stopped and resumed, saved and merged, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adakd_kernels.cli import main
from adakd_kernels.commands import models
from adakd_kernels.integrations.transformers import AdaKDTrainer

from .test_cli import error_line, no_models, run_flags, train, workspace  # noqa: F401 (two of them are fixtures)

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.fast

LORA = ("--lora_r", "2", "--lora_alpha", "8", "--lora_dropout", "0.1", "--ce_weight", "0.5")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose weights are read."""
    names: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def counted(name: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(Path(name).name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    return names


def test_an_adapter_of_a_student_that_teaches_itself(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loaded: list[str],  # noqa: F811
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    out, student = tmp_path / "out", workspace / "student"
    own = ["--teacher", str(student)]
    assert train(workspace, tmp_path, *LORA, *own) == 0
    assert loaded == ["student"]
    assert not [w.message for w in recwarn.list if issubclass(w.category, FutureWarning)]
    captured = capsys.readouterr()
    metrics = json.loads(captured.out.splitlines()[-1])
    assert metrics["steps"] == 3 and metrics["eval_loss"] > 0
    assert not list(out.glob("**/model*.safetensors"))
    saved = load_file(out / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    linear = [name for name, module in base.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"]
    assert len(saved) == 2 * len(linear) and all(value.any() for value in saved.values())

    _, _, lines = captured.err.partition(f"adakd train: the adapter is in {out}. To try it:\n\n")
    exec(lines, {})
    answer = capsys.readouterr().out
    text = ModelCard.load(out / "README.md").text
    assert f"An adapter for `{student}`, distilled from `{student}` itself with token-adaptive" in text
    for line in ("lora_r: 2", "lora_alpha: 8", "lora_dropout: 0.1", "lora_target_modules: `['all-linear']`"):
        assert f"\n- {line}\n" in text
    assert ModelCard.load(out / "README.md").data.library_name == "peft"

    # Resumed to the same numbers.
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(out / name)
    resume = ["--resume_from_checkpoint", "last"]
    assert train(workspace, tmp_path, *LORA, *own, *resume) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["eval_loss"] == metrics["eval_loss"] and again["train_loss"] != metrics["train_loss"]
    for name, value in load_file(out / "adapter_model.safetensors").items():
        assert torch.equal(value, saved[name])
    assert train(workspace, tmp_path, *LORA, *own, *resume) == 0
    assert "nothing to do" in capsys.readouterr().err

    other = [*LORA, *own, *resume, "--lora_r", "3", "--max_steps", "4"]
    line = error_line(capsys, *run_flags(workspace, tmp_path), *other)
    assert line.startswith(f"adakd train: error: checkpoint {out}/checkpoint-3 holds an adapter with r=2, but this run")

    # Killed between the last checkpoint and the end.
    (out / "trainer_state.json").unlink()
    (out / "adapter_model.safetensors").write_bytes(b"cut off")
    assert train(workspace, tmp_path, *LORA, "--teacher", "", *resume) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval_loss"] == metrics["eval_loss"]
    for name, value in load_file(out / "adapter_model.safetensors").items():
        assert torch.equal(value, saved[name])

    # Merged later on.
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, out)(input_ids=ids).logits
    assert train(workspace, tmp_path, *LORA, *own, *resume, "--merge_adapter", "true") == 0
    captured = capsys.readouterr()
    assert not list(out.glob("adapter*"))
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(merged, "peft_config") and merged.dtype == torch.float32
    torch.testing.assert_close(merged(input_ids=ids).logits, expected)
    _, _, lines = captured.err.partition(f"adakd train: the model is in {out}. To try it:\n\n")
    exec(lines, {})
    assert capsys.readouterr().out == answer
    text = ModelCard.load(out / "README.md").text
    assert f"`{student}` with an adapter merged in, distilled from `{student}` itself with token-adaptive" in text
    assert "- eval_agreement: " in text and "preparation_time" not in text
    assert ModelCard.load(out / "README.md").data.library_name == "transformers"
    assert train(workspace, tmp_path, *LORA, *own, *resume, "--merge_adapter", "true") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert set(loaded) == {"student", "out"}


def test_an_adapter_of_another_teacher_is_trained_further(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loaded: list[str]  # noqa: F811
) -> None:  # fmt: skip
    flags = ["--max_steps", "1", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    assert train(workspace, tmp_path / "first", *flags) == 0
    assert loaded == ["student", "teacher"]
    adapter = tmp_path / "first" / "out"
    config = peft.PeftConfig.from_pretrained(adapter)
    assert (config.target_modules, config.lora_alpha, config.lora_dropout) == ({"q_proj", "v_proj"}, 4, 0.05)
    second = ["--student", str(adapter), "--max_steps", "1"]
    assert train(workspace, tmp_path / "second", *second) == 0
    assert loaded[2:] == ["student", "teacher"]
    before, after = (load_file(tmp_path / n / "out" / "adapter_model.safetensors") for n in ("first", "second"))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    text = ModelCard.load(tmp_path / "second" / "out" / "README.md").text
    assert f"An adapter for `{workspace / 'student'}` that began as `{adapter}`, distilled from `{workspace}" in text
    # With the base of the adapter as the teacher there is one copy, and merging gives a whole model.
    third = [*second, "--teacher", str(workspace / "student"), "--merge_adapter", "true"]
    assert train(workspace, tmp_path / "third", *third) == 0
    assert loaded[4:] == ["student"] and (tmp_path / "third" / "out" / "model.safetensors").exists()
    capsys.readouterr()
    line = error_line(capsys, *run_flags(workspace, tmp_path / "fourth"), *second, "--lora_r", "4")
    assert f"student {adapter} is an adapter already, and lora_r asks for another one: leave lora_r out" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_r", "0"], "lora_r must be 1 or more, got 0"),
        (["--lora_r", "2", "--lora_alpha", "0"], "lora_alpha must be 1 or more, got 0"),
        (["--lora_r", "2", "--lora_dropout", "1"], "lora_dropout must be in [0, 1), got 1.0"),
        (["--lora_alpha", "8"], "lora_alpha needs lora_r: without it no new adapter is made"),
        (["--lora_target_modules", "q_proj"], "lora_target_modules needs lora_r"),
        (["--merge_adapter", "true"], "merge_adapter needs an adapter: give lora_r too, or leave it out to train all"),
        (["--load_in_4bit", "true"], "load_in_4bit needs an adapter: give lora_r too"),
        (["--lora_r", "2", "--load_in_4bit", "true", "--load_in_8bit", "true"], "load_in_4bit and load_in_8bit excl"),
        (["--lora_r", "2", "--load_in_8bit", "true", "--merge_adapter", "true"], "merge_adapter does not go with load"),
        (["--lora_r", "2", "--load_in_4bit", "true"], "load_in_4bit needs bitsandbytes: pip install bitsandbytes"),
        (["--lora_r", "2", "--load_in_8bit", "true"], "load_in_8bit needs bitsandbytes: pip install bitsandbytes"),
        (["--teacher", ""], "teacher is missing: give --teacher, or teacher in the --config file"),
        (["--lora_alfa", "2"], "unknown option '--lora_alfa'; did you mean --lora_alpha?"),
    ],
)  # fmt: skip
def test_options_that_are_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,  # noqa: F811
    no_models: None, flags: list[str], message: str,  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
    assert message in error_line(capsys, *run_flags(workspace, tmp_path), *flags)


def test_a_missing_peft(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,  # noqa: F811
    no_models: None,  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    line = error_line(capsys, *run_flags(workspace, tmp_path), "--lora_r", "2")
    assert "lora_r needs peft: pip install peft" in line


def test_a_checkpoint_of_another_kind(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_models: None  # noqa: F811
) -> None:  # fmt: skip
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    flags = [*run_flags(workspace, tmp_path), "--resume_from_checkpoint", "last"]
    (checkpoint / "model.safetensors").touch()
    line = error_line(capsys, *flags, "--lora_r", "2")
    assert f"checkpoint {checkpoint} holds a whole model, but this run trains an adapter: leave out" in line
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").touch()
    line = error_line(capsys, *flags)
    assert f"checkpoint {checkpoint} holds an adapter alone, but this run trains a whole model: give" in line


@pytest.mark.parametrize("bits", ["4", "8"])
def test_few_bits_are_asked_for(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: str  # noqa: F811
) -> None:  # fmt: skip
    """What `from_pretrained` gets where bitsandbytes runs, as far as it can be seen where it does not."""
    seen: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: Any, **options: Any) -> Any:
        seen.append({key: options.pop(key, None) for key in ("quantization_config", "device_map")})
        model = load(name, **options)
        setattr(model, f"is_loaded_in_{bits}bit", seen[-1]["quantization_config"] is not None)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(
        "transformers.integrations.bitsandbytes.validate_bnb_backend_availability", lambda **kwargs: True
    )
    monkeypatch.setattr(BitsAndBytesConfig, "post_init", lambda self: None)  # asks for the version of bitsandbytes
    dtypes: list[set[torch.dtype]] = []
    monkeypatch.setattr(
        AdaKDTrainer, "train", lambda self, **kwargs: dtypes.append({p.dtype for p in self.model.parameters()}) or 1 / 0
    )
    flags = ["--lora_r", "2", f"--load_in_{bits}bit", "true", "--bf16", "--student_dtype", "bfloat16"]
    with pytest.raises(ZeroDivisionError):
        main([*run_flags(workspace, tmp_path), *flags])
    assert seen[1] == {"quantization_config": None, "device_map": None}  # the teacher
    assert seen[0]["device_map"] == {"": "cpu"} and dtypes == [{torch.float32}]
    quantized = seen[0]["quantization_config"]
    assert (quantized.load_in_4bit, quantized.load_in_8bit) == (bits == "4", bits == "8")
    if bits == "4":
        assert (quantized.bnb_4bit_quant_type, quantized.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
