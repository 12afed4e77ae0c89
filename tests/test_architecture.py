"""The structure of the package, read from its source: imports go one way, and a divergence is written everywhere."""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import adakd_kernels
from adakd_kernels.divergences import DIVERGENCES, Divergence
from adakd_kernels.ops.shards import MERGES, PARTS
from adakd_kernels.reference import GRADIENTS, SUMMANDS

from . import left_out

pytestmark = pytest.mark.fast

PACKAGE = Path(adakd_kernels.__file__).parent
ROOT = PACKAGE.parent
LAYERS = [
    {"quiet_torch"},
    {"divergences"},
    {"checks"},
    {"reference", "adaptive"},
    {"kernels"},
    {"ops"},
    {"vocab_parallel"},
    {"functional"},
    {"linear"},
    {"loss"},
    {"trainer"},
    {"integrations", "report"},
    {"evaluation"},
    {"commands", "demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_layers(path: Path) -> set[str]:
    """Names of the package's modules that a file imports, inside functions too."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adakd_kernels."):
            found.add(node.module.split(".")[1])
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no place in the order of the modules"
    for name in imported_layers(path) - {own}:
        assert LEVEL[name] <= LEVEL[own], f"{path.name} imports {name}, which comes after {own}"


def imported_folders(path: Path) -> set[str]:
    """Names of the project's top-level folders that a file of another one imports, as text that it runs, too."""
    return set(re.findall(r"^ *(?:from|import) (adakd_kernels|benchmarks|instruments|tests)\b", path.read_text(), re.M))


# The tests of benchmarks themselves.
TESTS_OF_BENCHMARKS = {"test_bench.py", "test_kernel_table.py", "test_quality.py", "test_scale.py"}
FOLDERS = {
    "adakd_kernels": set(),
    "instruments": {"adakd_kernels"},
    "benchmarks": {"adakd_kernels", "instruments"},
    "tests": {"adakd_kernels", "instruments"},
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_one_another_in_no_circle(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        allowed = FOLDERS[folder] | {folder} | ({"benchmarks"} if path.name in TESTS_OF_BENCHMARKS else set())
        assert imported_folders(path) <= allowed, path.relative_to(ROOT)


def test_what_is_left_out_is_a_test_with_these_parameters():
    """A test that is renamed would otherwise run in full, and a parameter that is renamed fail in its tier alone."""
    rules = [left_out.IN_PLAIN_TORCH, left_out.IN_THE_INTERPRETER, left_out.COMPILED]
    rules += [left_out.WITH_ANOTHER_INSTRUCTION_SET, left_out.WITH_THE_WIDEST_INSTRUCTION_SET]
    for test, when in (item for of_tier in rules for item in of_tier.items()):
        file, name = test.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, test
        assert {*inspect.signature(when).parameters} <= {arg.arg for arg in functions[name].args.args}, test


def test_import_is_cheap_and_works_without_triton_and_transformers():
    """Neither is imported, and hiding both changes nothing; nothing is printed."""
    code = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = sys.modules["datasets"] = None
import torch
before = set(sys.modules)
import adakd_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not {"triton", "transformers", "accelerate", "datasets", "matplotlib"} & new, new
out = adakd_kernels.adakd_loss(torch.randn(3, 7, requires_grad=True), torch.randn(3, 7), torch.arange(3))
out.loss.backward()
assert adakd_kernels.ops.backend("cuda").name == "reference"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""


def section(path: str, begin: str, end: str) -> str:
    """What stands in a file of the project between two lines."""
    return (ROOT / path).read_text().split(begin, 1)[1].split(end, 1)[0]


def names_in(path: str, begin: str = "", end: str = "\0") -> set[str]:
    """The names in backticks in a file of the project, or between two of its lines."""
    return set(re.findall(r"`(\w+)`", section(path, begin, end) if begin else (ROOT / path).read_text()))


PLACES = {
    "adakd_kernels/reference.py, SUMMANDS": lambda: set(SUMMANDS),
    "adakd_kernels/reference.py, GRADIENTS": lambda: set(GRADIENTS),
    "adakd_kernels/kernels/divergence_terms.py": lambda: set(
        re.findall(r'DIVERGENCE == "(\w+)"', (PACKAGE / "kernels" / "divergence_terms.py").read_text())
    ),
    "docs/maths.md, the table of section 3": lambda: set(
        re.findall(r"^\| `(\w+)`", section("docs/maths.md", "## 3 ", "\n## "), re.MULTILINE)
    ),
    "README.md, the list of divergences": lambda: names_in("README.md", "\nDivergences: ", "\n\n"),
    "CHANGELOG.md": lambda: names_in("CHANGELOG.md"),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_divergence_stands_in(place):
    missing = [name for name in DIVERGENCES if name not in PLACES[place]()]
    assert not missing, f"missing in {place}: {missing}"


def test_every_divergence_of_one_sweep_is_merged_from_shards():
    one_sweep = {name for name, div in DIVERGENCES.items() if div.sweeps == 1}
    missing = one_sweep - (MERGES.keys() | PARTS.keys())
    assert not missing, f"missing in adakd_kernels/ops/shards.py, MERGES: {missing}"
    assert {part for parts in PARTS.values() for part in parts} <= MERGES.keys()


def test_every_divergence_is_registered_and_public():
    classes = {
        cls.__name__: cls for cls in Divergence.__subclasses__() if cls.__module__ == "adakd_kernels.divergences"
    }
    missing = classes.keys() - {cls.__name__ for cls in DIVERGENCES.values()}
    assert not missing, f"missing in DIVERGENCES of adakd_kernels/divergences.py: {missing}"
    for module in (adakd_kernels.divergences, adakd_kernels):
        missing = [name for name, cls in classes.items() if getattr(module, name, None) is not cls]
        missing += [name for name in classes if name not in module.__all__]
        assert not missing, f"missing in {module.__name__} or its __all__: {missing}"


def test_the_list_of_the_native_kernels_is_the_registry():
    source = (ROOT / "python_bindings" / "core" / "divergences.h").read_text()
    listed = re.findall(r'^  X\((\w+), "(\w+)"\)', source, re.MULTILINE)
    assert {name: cls for cls, name in listed} == {name: cls.__name__ for name, cls in DIVERGENCES.items()}
    assert len(listed) == len(DIVERGENCES)


def lines_of_code(text: str) -> int:
    """Lines that hold more than a comment or a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)]
    prose = {line for node in nodes for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in empty]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - prose)


def test_comments_and_docstrings_are_no_lines_of_code():
    text = '"""Two\nlines."""\n\n# One.\ndef f(\n    x,  # (N,)\n):\n    """Doc."""\n    # Why.\n    return """\na"""\n'
    assert lines_of_code(text) == 5


def test_kernel_files_are_short_and_do_one_thing():
    for path in (PACKAGE / "kernels").glob("*.py"):
        text = path.read_text()
        assert lines_of_code(text) < 200, f"{path.name} has {lines_of_code(text)} lines of code"
        assert not any(word in text for word in ("autograd", "torch.library", ".item(", "tl.atomic")), path.name
