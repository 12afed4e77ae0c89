"""The structure of the package, read from its source: imports go one way, and a divergence is written everywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adakd_kernels
from adakd_kernels.divergences import DIVERGENCES
from adakd_kernels.reference import GRADIENTS, SUMMANDS

pytestmark = pytest.mark.fast

PACKAGE = Path(adakd_kernels.__file__).parent
ROOT = PACKAGE.parent
LAYERS = [
    {"divergences"},
    {"checks"},
    {"reference", "adaptive"},
    {"kernels"},
    {"ops"},
    {"functional"},
    {"loss", "linear"},
    {"integrations"},
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


def test_import_is_cheap_and_works_without_triton_and_transformers():
    """Neither is imported, and hiding both changes nothing; nothing is printed."""
    code = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = None
import torch
before = set(sys.modules)
import adakd_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not {"triton", "transformers", "accelerate", "matplotlib"} & new, new
out = adakd_kernels.adakd_loss(torch.randn(3, 7, requires_grad=True), torch.randn(3, 7), torch.arange(3))
out.loss.backward()
assert adakd_kernels.ops.backend("cuda").name == "reference"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""


def test_every_divergence_stands_in_every_place():
    names = set(DIVERGENCES)
    assert set(SUMMANDS) == names and set(GRADIENTS) == names
    maths = (ROOT / "docs" / "maths.md").read_text()
    kernels = "".join(path.read_text() for path in (PACKAGE / "kernels").glob("*.py"))
    registered = (ROOT / "python_bindings" / "register.cpp").read_text()
    assert re.findall(r'"(\w+)"', re.search(r"names\[\] = \{(.*?)\}", registered, re.DOTALL)[1]) == list(DIVERGENCES)
    for name in names:
        assert f"`{name}`" in maths, f"{name} has no row in docs/maths.md"
        assert f'"{name}"' in kernels, f"{name} has no kernel"


def test_kernel_files_are_short_and_do_one_thing():
    for path in (PACKAGE / "kernels").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 200, f"{path.name} has {len(text.splitlines())} lines"
        assert not any(word in text for word in ("autograd", "torch.library", ".item(", "tl.atomic")), path.name
