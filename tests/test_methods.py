"""`adakd train --method`: what each sets, what wins over it, and runs whose student samples completions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from adakd_kernels.checks import DIFFICULTIES
from adakd_kernels.cli import main
from adakd_kernels.commands import CommandError
from adakd_kernels.commands.options import parse
from adakd_kernels.integrations.transformers import METHODS, AdaKDConfig
from adakd_kernels.trainer.config import AdaKDOptions
from adakd_kernels.trainer.loading import load_prompts_for

from .test_cli import error_line
from .tiny_models import INSTRUCTIONS, save_pair, tiny_tokenizer, write_jsonl
from .trainer_process import config

pytest.importorskip("trl", reason="trl is not installed: pip install 'adakd-kernels[trl]'")

from adakd_kernels.integrations.trl import AdaKDDistillationConfig, AdaKDDistillationTrainer, AdaKDSFTConfig

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "methods.md").read_text()
RUN = ["--student", "a", "--teacher", "b", "--train_file", "c", "--eval_file", "d", "--use_cpu"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    student, teacher = save_pair(folder, "llama", chat_template=True)
    options = {
        "student": str(student), "teacher": str(teacher), "train_file": str(write_jsonl(folder / "train.jsonl")),
        "eval_file": str(folder / "train.jsonl"), "output_dir": str(folder / "unused"), "max_steps": 4, "save_steps": 1,
        "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": "1e-2", "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return folder


def flags(workspace: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--config", str(workspace / "run.yaml"), "--output_dir", str(out), *more]


def of(config: Any, *names: str) -> list[Any]:
    return [getattr(config, name) for name in names]


def rows(section: str) -> list[list[str]]:
    """The cells of the table of a section of docs/methods.md, without its head."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)[2:]]


def test_the_page_shows_what_the_methods_set() -> None:
    found = [
        [f"`{name}`", method.title, "the data" if not method.on_policy else "the data and the student", f"{c.value}"]
        for name, method in METHODS.items()
        for c in [method.temperature_scale]
    ]
    found[-1][2] = "the student"  # on_policy: λ = 1
    assert rows("The methods") == found
    expected = [
        [f"`{name}`", f"`{option}`", f"`{setting.value}`", setting.source]
        for name, method in METHODS.items()
        for option, setting in [*method.settings.items(), ("temperature_scale", method.temperature_scale)]
    ]
    assert rows("What each sets, and its source") == expected


def test_every_ablation_of_the_page_is_an_option() -> None:
    """The options of a row, and nothing else, are changed by it, with every method."""
    listed = [re.findall(r"`(--[^`]*)`", options)[0].split() for _, options in rows("Ablations")]
    measures = [flags[1] for flags in listed if flags[0] == "--difficulty"]
    assert sorted(measures) == sorted(DIFFICULTIES) and len(listed) == 9 + len(DIFFICULTIES)
    for method in (None, "rkd", "gkd"):
        given = RUN if method is None else [*RUN, "--method", method, "--adakd", "true"]
        plain = vars(parse(given)[1])
        for flags in listed:
            made = vars(parse([*given, *flags])[1])
            changed = {option.name for option in fields(AdaKDOptions) if made[option.name] != plain[option.name]}
            named = {flag[2:] for flag in flags[::2]}
            expected = {"temperature_scale", "focus_ratio"} if named == {"adakd"} else named
            assert changed <= expected and (changed == expected or flags[1] in ("hellinger", "loss")), flags
            for name, value in zip(flags[::2], flags[1::2], strict=True):
                assert name == "--adakd" or str(made[name[2:]]) in (value, f"{value}.0")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("adakd", [False, True])
def test_a_method_sets_what_it_says(name: str, adakd: bool) -> None:
    options, made = parse([*RUN, "--method", name, *(["--adakd", "true"] if adakd else [])])
    method = METHODS[name]
    assert options.method == name and options.adakd is adakd and options.on_policy is method.on_policy
    for option, setting in method.settings.items():
        assert getattr(made, option) == setting.value
    assert made.focus_ratio == (None if adakd else 1.0)
    assert made.temperature_scale == (method.temperature_scale.value if adakd else 0.0)
    # Two runs differ in their method alone.
    names = ("learning_rate", "bf16", "activation_checkpointing", "weight_decay", "logging_steps")
    plain = parse(RUN)[1]
    assert of(made, *names) == of(plain, *names)


def test_the_paper_s_settings() -> None:
    """Written down once more, from the paper's scripts: a typing mistake in the table is seen."""
    kinds = {"fkd": "ForwardKL()", "rkd": "ReverseKL()", "abkd": "AlphaBeta(alpha=0.2, beta=0.7)",
             "gkd": "JensenShannon(beta=0.1)", "distillm": "SkewReverseKL(alpha=0.1)",
             "on_policy": "ReverseKL()"}  # fmt: skip
    scales = {"fkd": 0.5, "rkd": 0.5, "abkd": 0.5, "gkd": 0.3, "distillm": 0.3, "on_policy": 0.5}
    mixes = {"gkd": [0.5, 0, False], "distillm": [0.0, 1000, True], "on_policy": [1.0, 0, False]}
    for name in METHODS:
        made = parse([*RUN, "--method", name, "--adakd", "true"])[1]
        assert repr(made.make_divergence()) == kinds[name] and made.temperature_scale == scales[name]
        if name in mixes:
            assert of(made, "lmbda", "replay_capacity", "adaptive_lmbda") == mixes[name]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_python(name: str, tmp_path: Path) -> None:
    """What the page says of `options`: those of the class that goes with the method, as the command has them."""
    of_data = (AdaKDConfig, AdaKDSFTConfig)
    for config_class in (AdaKDDistillationConfig,) if METHODS[name].on_policy else of_data:
        made = config_class(output_dir=str(tmp_path), use_cpu=True, bf16=False, **METHODS[name].options(adakd=True))
        command = parse([*RUN, "--method", name, "--adakd", "true"])[1]
        assert made.make_divergence() == command.make_divergence()
        assert of(made, "temperature_scale", "focus_ratio") == of(command, "temperature_scale", "focus_ratio")


def test_without_a_method_all_is_as_before() -> None:
    options, made = parse(RUN)
    assert type(made) is AdaKDConfig and options.adakd is True and options.method is None
    default = AdaKDConfig(output_dir="x", use_cpu=True)
    names = ("divergence", "divergence_kwargs", "focus_ratio", "temperature_scale", "learning_rate")
    assert of(made, *names) == of(default, *names)
    assert of(parse([*RUN, "--adakd", "false"])[1], "focus_ratio", "temperature_scale") == [1.0, 0.0]


def test_what_the_user_gives_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: abkd\nadakd: true\ntemperature_scale: 0.7\n")
    run = [*RUN, "--config", str(file)]
    assert of(parse(run)[1], "divergence", "temperature_scale", "focus_ratio") == ["alpha_beta", 0.7, None]
    # A flag wins over the file, the method included.
    made = parse([*run, "--method", "rkd", "--adakd", "false", "--focus-ratio", "0.5"])[1]
    assert of(made, "divergence", "divergence_kwargs", "temperature_scale", "focus_ratio") == [
        "reverse_kl", None, 0.7, 0.5,
    ]  # fmt: skip
    # The parameters of a method's divergence go with it.
    made = parse([*run, "--divergence", "forward_kl"])[1]
    assert of(made, "divergence", "divergence_kwargs") == ["forward_kl", None]
    made = parse([*run, "--divergence_kwargs", '{"alpha": 0.3, "beta": 0.4}'])[1]
    assert repr(made.make_divergence()) == "AlphaBeta(alpha=0.3, beta=0.4)"
    for name, given, kind in (
        ("distillm", ["--beta", "0.4"], "JensenShannon(beta=0.4)"),
        ("gkd", ["--beta=0"], "ForwardKL()"),
        ("gkd", ["--divergence", "total_variation"], "TotalVariation()"),
    ):
        assert repr(parse([*RUN, "--method", name, *given])[1].make_divergence()) == kind


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "fdk"], "unknown method 'fdk'; expected one of fkd, rkd, abkd, .*; did you mean fkd?"),
        (["--method", "gdk"], "did you mean gkd?"),
        (["--method"], "argument --method: expected one argument"),
        (["--method", "rkd", "--adakd", "perhaps"], "argument --adakd: "),
        (["--method", "rkd", "--lmbda", "0.5"], "option 'lmbda' needs a method whose student samples: gkd, distillm"),
        (["--method", "gkd", "--selection", "step"], "option 'selection' does not go with methods whose student sam"),
        (["--method", "gkd", "--lmdba", "0.5"], "unknown option '--lmdba'; did you mean --lmbda"),
        (["--method", "rkd", "--generation", "vllm"], "generation vllm needs a method that samples: gkd, distillm"),
        (["--method", "gkd", "--generation", "vlm"], "generation must be one of transformers, vllm, got 'vlm'"),
        (["--method", "gkd", "--lmbda", "2"], r"lmbda must be in \[0, 1\], got 2.0"),
    ],
)
def test_wrong_methods(given: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse([*RUN, *given])


def test_wrong_methods_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, message in (
        ("method: [gkd]", r"unknown method \['gkd'\]; expected one of"),
        ("method: gkd\nadakd: perhaps", r"run.yaml: argument --adakd: "),
        ("method: gkd\nmax_length: 9", "run.yaml: option 'max_length' does not go with methods whose student samples"),
    ):
        file.write_text(text)
        with pytest.raises(CommandError, match=message):
            parse([*RUN, "--config", str(file)])


def test_vllm_is_refused_by_name_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*RUN, "--method", "gkd", "--generation", "vllm", "--vllm_mode", "server", "--vllm_server_port", "8123"]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(CommandError, match="generation vllm needs a GPU, and torch finds none on this machine"):
        parse(given)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("adakd_kernels.commands.on_policy.find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"generation vllm needs vllm: pip install 'trl\[vllm\]'"):
        parse(given)
    # With both, TRL's trainer gets its options.
    monkeypatch.setattr("adakd_kernels.commands.on_policy.find_spec", lambda name: name)
    assert of(parse(given)[1], "use_vllm", "vllm_mode", "vllm_server_port") == [True, "server", 8123]


def test_without_trl_one_line_says_what_to_install(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if re.match(r"trl\b|adakd_kernels\.integrations\.trl\b|adakd_kernels\.commands\.on_policy", name):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)

    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model is loaded")

    with monkeypatch.context() as context:
        context.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
        line = error_line(capsys, *flags(workspace, tmp_path / "out", "--method", "gkd"))
    assert line.startswith("adakd train: error: method gkd: the student samples completions, and adakd_kernels.integ")
    assert "pip install 'adakd-kernels[trl]'" in line
    # A method that learns from the data alone does not need it.
    assert main(flags(workspace, tmp_path / "out", "--method", "fkd", "--adakd", "true", "--max_steps", "1")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with fkd (forward KL on the data) and token-adaptive knowledge distillation (AdaKD" in card
    assert "- method: `fkd`\n- adakd: True\n- divergence: `forward_kl`" in card


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in log if "loss" in line]


def test_an_on_policy_run(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the records to the model card; stopped by Ctrl-C and resumed, it is the run that was not stopped."""
    given = ["--method", "gkd", "--adakd", "--max_completion_length", "6"]
    assert main(flags(workspace, tmp_path / "whole", *given)) == 0
    captured = capsys.readouterr()
    metrics = json.loads(captured.out.splitlines()[-1])
    assert metrics["steps"] == 4 and metrics["eval_loss"] > 0
    assert f"{workspace / 'train.jsonl'}: 8 records\n" in captured.err
    assert f"the model is in {tmp_path / 'whole'}. To try it:" in captured.err
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "8 prompts, with completions of at most 6 tokens" in card and "- lmbda: 0.5" in card
    assert "- beta: 0.1\n- temperature_scale: 0.3" in card and "- divergence:" not in card

    step = AdaKDDistillationTrainer.training_step

    def stopped(trainer: Any, *args: Any) -> Any:
        if trainer.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, *args)

    with monkeypatch.context() as context:
        context.setattr(AdaKDDistillationTrainer, "training_step", stopped)
        assert main(flags(workspace, tmp_path / "out", *given)) == 130
    assert f"goes on from {tmp_path / 'out' / 'checkpoint-2'}\n" in capsys.readouterr().err
    assert main(flags(workspace, tmp_path / "out", *given, "--resume_from_checkpoint", "last")) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_distillm_on_an_adapter(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Untrained, its loss of evaluation is that of a run without TRL on the same records."""
    records = [{"prompt": row["instruction"], "completion": " " + row["output"]} for row in INSTRUCTIONS]
    file = str(write_jsonl(tmp_path / "texts.jsonl", records))
    same = ["--lora_r", "2", "--max_steps", "1", "--learning_rate", "0", "--train_file", file, "--eval_file", file]
    given = ["--method", "distillm", "--max_completion_length", "64", *same]
    assert main(flags(workspace, tmp_path / "out", *given)) == 0
    captured = capsys.readouterr()
    assert "the adapter is in" in captured.err and (tmp_path / "out" / "adapter_model.safetensors").exists()
    ours = ["--adakd", "false", "--divergence", "skew_reverse_kl", "--divergence_kwargs", '{"alpha": 0.1}', *same]
    assert main(flags(workspace, tmp_path / "own", *ours)) == 0
    found, expected = (json.loads(out.splitlines()[-1])["eval_loss"] for out in (captured.out, capsys.readouterr().out))
    assert found == pytest.approx(expected, rel=1e-5)
    line = error_line(
        capsys, *flags(workspace, tmp_path / "self", "--method", "gkd", "--lora_r", "2"),
        "--teacher", str(workspace / "student"),
    )  # fmt: skip
    assert "method gkd: a model cannot teach its own adapter: give another --teacher" in line


def test_the_data_of_an_on_policy_run(tmp_path: Path) -> None:
    """Each shape of a record gives its prompt and its last answer."""
    args = config(tmp_path)
    chat, plain = tiny_tokenizer(chat_template=True), tiny_tokenizer()
    user, answer = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}
    records: list[tuple[dict[str, Any], list[Any], str]] = [
        ({"messages": [user, answer]}, [user], "### User:\nA?\n\n### Assistant:\n"),
        (
            {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]},
            [user],
            "### User:\nA?\n\n### Assistant:\n",
        ),
        (
            {"messages": [user, answer, user, answer]},
            [user, answer, user],
            "### User:\nA?\n\n### Assistant:\nB.<eos>\n\n### User:\nA?\n\n### Assistant:\n",
        ),
        ({"instruction": "A?", "output": "B."}, [user], "### User:\nA?\n\n### Assistant:\n"),
        ({"prompt": [user], "completion": [answer]}, [user], "### User:\nA?\n\n### Assistant:\n"),
    ]
    file = str(write_jsonl(tmp_path / "all.jsonl", [record for record, _, _ in records]))
    loaded = load_prompts_for(args, file, chat, "train_file")
    assert [*loaded.records] == [{"prompt": prompt, "completion": [answer]} for _, prompt, _ in records]
    assert str(loaded) == f"{file}: 5 records"
    loaded = load_prompts_for(args, file, plain, "train_file")
    assert [*loaded.records] == [{"prompt": text, "completion": "B."} for _, _, text in records]
    for bad, message in (
        ([{"text": "A"}], "bad.jsonl:1: field 'text' has no prompt that the student could complete"),
        ([{"input_ids": [1], "labels": [1]}], "bad.jsonl: holds token ids"),
        ([{"prompt": "A", "completion": "B"}, records[0][0]], "bad.jsonl: has prompts that are texts beside prompts"),
        ([{"prompt": "", "completion": "B"}], "bad.jsonl:1: field 'prompt' is empty: a student that samples needs"),
        ([{**records[0][0], "tools": [{}]}], "bad.jsonl:1: field 'tools' goes with methods that learn from the data"),
        ([records[0][0], {"prompt": "A", "completion": ""}], "bad.jsonl:2: field 'completion', which is to be learnt"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompts_for(args, str(write_jsonl(tmp_path / "bad.jsonl", bad)), chat, "train_file")


def test_distillm_needs_an_evaluation(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(workspace, tmp_path / "out", "--method", "distillm")
    line = error_line(capsys, *given, "--eval_file", "")
    assert line.endswith("adaptive_lmbda follows the loss of evaluations, which need records: give --eval_file")
    line = error_line(capsys, *given, "--metric_for_best_model", "eval_agreement")
    assert line.endswith("metric_for_best_model must be one of loss, got 'eval_agreement'")


def test_fewer_records_than_a_step_takes(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(
        capsys, *flags(workspace, tmp_path / "out", "--method", "gkd", "--per_device_train_batch_size", "9")
    )
    assert f"has {len(INSTRUCTIONS)} records, but a step takes 9: lower per_device_train_batch_size" in line


TELEMETRY = """
import os, sys
from adakd_kernels.cli import main
assert "huggingface_hub" not in sys.modules
assert main(["--version"]) == 0
from huggingface_hub import constants
print(constants.HF_HUB_DISABLE_TELEMETRY, os.environ["VLLM_NO_USAGE_STATS"])
"""


@pytest.mark.parametrize(("given", "off"), [({}, "True 1"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False 1")])
def test_telemetry_is_off_unless_the_user_turns_it_on(given: dict[str, str], off: str) -> None:
    """The hub's library reads the variable as it is imported, which no part of the command has done before."""
    others = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in others} | given
    command = [sys.executable, "-c", TELEMETRY]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == off
    assert re.search(r"^export HF_HUB_DISABLE_TELEMETRY \?= 1$", (ROOT / "Makefile").read_text(), re.M)
