"""What the documentation shows is run: every snippet of the README, every docstring example, the docs' command."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adakd_kernels.cli import COMMANDS, main

from .tiny_models import save_pair, write_jsonl

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = ["adaptive", "functional", "linear.function", "loss", "integrations.collator", "integrations.token_histogram"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the README's snippets name: models, data."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").mkdir()
    (folder / "data").mkdir()
    save_pair(folder / "models", "llama")
    write_jsonl(folder / "data" / "train.jsonl")
    return folder


def test_python_snippets_of_the_readme_run_in_order(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    snippets, names = blocks("python"), {}
    assert len(snippets) == 6
    for snippet in snippets:
        torch.manual_seed(0)
        exec(compile(snippet, "README.md", "exec"), names)
        for shown in re.findall(r"^# (torch\.Size.*)$", snippet, flags=re.MULTILINE):
            assert shown in capsys.readouterr().out
    assert names["trainer"].state.global_step == 4


def test_commands_of_the_readme_run(project, monkeypatch):
    monkeypatch.chdir(project)
    (project / "run.yaml").write_text(blocks("yaml")[0])
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    ran = []
    for line in "".join(blocks("sh")).splitlines():
        program, *argv = shlex.split(line, comments=True)
        if program == "make":
            assert argv[0] in targets
        else:
            assert program == "adakd" and argv[0] in COMMANDS
            extra = ["--use_cpu", "--save_steps", "2"] if argv[0] == "train" else []
            assert main([*argv, *extra]) == 0, line
        ran.append(argv[0])
    assert ran == ["demo", "test", "train", "train", "doctor"]
    assert (project / "runs" / "second" / "model.safetensors").is_file()


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", README):
        assert (ROOT / target).is_file(), target
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"adakd_kernels.{name}")
    torch.manual_seed(0)
    names = {**vars(module), "torch": torch}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted > 0


MATHS = (ROOT / "docs" / "maths.md").read_text()
# Start of the command, a word of what it prints, the environment that it is for.
MEASUREMENTS = [("TRITON_INTERPRET=1 python", "plain", {"TRITON_INTERPRET": "1"}), ("python", "eager", {})]


@pytest.mark.parametrize("start, word, environment", MEASUREMENTS, ids=lambda x: str(x).split()[0])
def test_a_measurement_in_the_docs_gives_what_they_show(start, word, environment):
    (command,) = [block for block in blocks("sh", MATHS) if block.startswith(f"{start} - <<'EOF'")]
    (shown,) = [block for block in blocks("text", MATHS) if word in block]
    code = command.split("<<'EOF'\n")[1].split("\nEOF")[0]
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for measured, written in zip(result.stdout.splitlines(), shown.splitlines(), strict=True):
        numbers, documented = (re.findall(r"\d\S*e[+-]\d+", line) for line in (measured, written))
        assert measured.split()[0] == written.split()[0] and len(numbers) == len(documented) >= 3
        for number, other in zip(numbers, documented, strict=True):
            assert 0.1 < float(number) / float(other) < 10, (measured, written)
