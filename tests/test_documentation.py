"""What the documentation shows is run: every snippet of the README and of docs/, and every docstring example."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adakd_kernels import adakd_loss
from adakd_kernels.cli import COMMANDS, main

from .tiny_models import save_pair, write_jsonl

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
MATHS = "docs/maths.md"
SEVERAL_PROCESSES = "docs/scale.md"
# Its commands: their start, a word of what they print, the environment that they are for.
MEASUREMENTS = [("TRITON_INTERPRET=1 python", "plain", {"TRITON_INTERPRET": "1"}), ("python", "eager", {})]
PUBLIC = ["evaluation", "integrations.transformers", "integrations.trl"]
MODULES = [
    "adaptive",
    "functional",
    "linear.function",
    "linear.token_divergence",
    "loss",
    "trainer.collator",
    "trainer.histogram",
    "vocab_parallel",
]


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def pages_with(language: str) -> list[str]:
    return [page for page, text in PAGES.items() if blocks(language, text)]


def test_every_block_is_of_a_language_that_is_run_here():
    for page, text in PAGES.items():
        languages = set(re.findall(r"^```(.*)\n(?:.*\n)*?```$", text, flags=re.MULTILINE))
        # Equations, and what the measurements print.
        run_here = {"python", "sh", "yaml", "json"} if page != MATHS else {"sh", "text"}
        assert languages <= run_here, page
    assert len(blocks("sh", PAGES[MATHS])) == len(MEASUREMENTS)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and data that the snippets name, as the working directory."""
    (tmp_path / "models").mkdir()
    (tmp_path / "data").mkdir()
    save_pair(tmp_path / "models", "llama")
    for name in ("train", "held_out"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The snippets of the page on several processes are run by two of them, in `test_scale.py`.
@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != SEVERAL_PROCESSES])
def test_python_snippets_of_a_page_run_in_order(page, project, capsys):
    if "integrations.trl" in PAGES[page]:
        pytest.importorskip("trl", reason="trl is not installed: pip install 'adakd-kernels[trl]'")
    names = {}
    for data in blocks("json", PAGES[page]):
        (project / "data" / "train.jsonl").write_text(data)
    for snippet in blocks("python", PAGES[page]):
        torch.manual_seed(0)
        exec(compile(snippet, page, "exec"), names)
        for shown in re.findall(r"^# (torch\.Size.*)$", snippet, flags=re.MULTILINE):
            assert shown in capsys.readouterr().out
    assert "trainer" not in names or names["trainer"].state.global_step == 4


@pytest.mark.parametrize("snippet", blocks("python", PAGES["README.md"]))
def test_each_snippet_of_the_readme_runs_alone(snippet, project):
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_readme_says_the_same_in_its_own_words_and_fused(project):
    """The eager formula is what the fused loss computes."""
    before = blocks("python", PAGES["README.md"])[0]
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(before, names)
    student, teacher, labels = (names[name] for name in ("student", "teacher", "labels"))
    expected, student.grad = student.grad, None
    loss = adakd_loss(student, teacher, labels, divergence="reverse_kl", focus_ratio=0.5).loss
    loss.backward()
    torch.testing.assert_close(loss, names["eager_adakd"](student, teacher, labels))
    torch.testing.assert_close(student.grad, expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("page", [page for page in pages_with("sh") if page != MATHS])
def test_commands_of_a_page_run(page, project):
    if "--method gkd" in PAGES[page]:
        pytest.importorskip("trl", reason="trl is not installed: pip install 'adakd-kernels[trl]'")
    for options in blocks("yaml", PAGES[page]):
        (project / "run.yaml").write_text(options)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in "".join(blocks("sh", PAGES[page])).splitlines():
        program, *argv = shlex.split(line, comments=True)
        if program == "make":
            assert argv[0] in targets
        else:
            assert program == "adakd" and argv[0] in COMMANDS
            assert main([*argv, *(["--use_cpu"] if argv[0] == "train" else [])]) == 0, line
            if argv[0] == "train":
                folder = argv[argv.index("--output_dir") + 1] if "--output_dir" in argv else "runs/*"
                assert len(list(project.glob(f"{folder}/*model.safetensors"))) == 1
            if argv[0] == "report":
                assert (project / "report" / "report.html").is_file()


def test_the_readme_has_the_numbers_of_the_demo():
    section = PAGES["docs/trainer.md"].split("## The demo\n")[1]
    (paragraph,) = [part for part in PAGES["README.md"].split("\n\n") if part.startswith("In [the demo]")]
    numbers = re.findall(r"\d[\d.]*", paragraph)
    assert len(numbers) == 12 and set(numbers) <= set(re.findall(r"\d[\d.]*", section))


def test_the_readme_shows_every_kind_of_snippet():
    pages = {"README.md", SEVERAL_PROCESSES}
    pages |= {f"docs/{name}.md" for name in ("evaluation", "losses", "methods", "reference", "trainer", "trl")}
    assert set(pages_with("python")) == pages
    assert {"README.md", "docs/methods.md", "docs/report.md", "docs/trainer.md"} == set(pages_with("yaml"))
    assert [line.split()[:2] for block in blocks("sh", PAGES["README.md"]) for line in block.splitlines()] == [
        ["make", "demo"], ["make", "test"], ["adakd", "train"],
    ]  # fmt: skip


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "python_bindings/README.md"])
def test_files_and_sections_that_a_page_links_to_exist(page):
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\(((?!https?:)[^)#]*)#?([^)]*)\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in headings}


def test_pages_that_the_code_names_exist():
    folders = ("adakd_kernels", "benchmarks", "instruments", "python_bindings", "tests")
    named = {
        (page, path.name)
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".md")
        for page in re.findall(r"docs/[\w-]+\.md", path.read_text())
    }
    assert {page for page, _ in named} <= PAGES.keys(), [place for place in named if place[0] not in PAGES]
    assert len(PAGES["README.md"].splitlines()) < 200


# What `make docs` makes of a docstring, by module and name.
REFERENCE = re.findall(r"^::: ([\w.]+)\.(\w+)$", PAGES["docs/reference.md"], flags=re.MULTILINE)


def test_the_reference_has_every_public_name_and_each_has_an_example():
    modules = {module for module, _ in REFERENCE}
    assert modules == {"adakd_kernels", *(f"adakd_kernels.{name}" for name in PUBLIC)}
    if importlib.util.find_spec("trl") is None:
        modules.remove("adakd_kernels.integrations.trl")
    for module in modules:
        names = sorted(name for of, name in REFERENCE if of == module)
        assert names == sorted(importlib.import_module(module).__all__)
    code = [block for page in pages_with("python") for block in blocks("python", PAGES[page])]
    examples = {
        ".".join(path.relative_to(ROOT / "adakd_kernels").with_suffix("").parts): "\n".join(lines)
        for path in (ROOT / "adakd_kernels").rglob("*.py")
        if (lines := re.findall(r"^ *(?:>>>|\.\.\.) (.*)$", path.read_text(), flags=re.MULTILINE))
    }
    assert examples.keys() == set(MODULES)  # the others would not be run
    nodes = [node for text in [*code, *examples.values()] for node in ast.walk(ast.parse(text))]
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {name for _, name in REFERENCE} <= used


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"adakd_kernels.{name}")
    torch.manual_seed(0)
    names = {**vars(module), "torch": torch}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and result.attempted > 0


@pytest.mark.parametrize("start, word, environment", MEASUREMENTS, ids=lambda x: str(x).split()[0])
def test_a_measurement_in_the_docs_gives_what_they_show(start, word, environment):
    (command,) = [block for block in blocks("sh", PAGES[MATHS]) if block.startswith(f"{start} - <<'EOF'")]
    (shown,) = [block for block in blocks("text", PAGES[MATHS]) if word in block]
    code = command.split("<<'EOF'\n")[1].split("\nEOF")[0]
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for measured, written in zip(result.stdout.splitlines(), shown.splitlines(), strict=True):
        numbers, documented = (re.findall(r"\d\S*e[+-]\d+", line) for line in (measured, written))
        assert measured.split()[0] == written.split()[0] and len(numbers) == len(documented) >= 3
        for number, other in zip(numbers, documented, strict=True):
            assert 0.1 < float(number) / float(other) < 10, (measured, written)
