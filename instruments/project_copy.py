"""A copy of the project that may be changed and broken: what the tests of missing places and `planted_faults` work on.

Finds an edit whose place is gone: `replace` fails there, so that no test passes because nothing was changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .devices import ROOT

# What a copy needs so that its tests run and its C++ kernels can be built.
COPIED = [
    "adakd_kernels", "benchmarks", "docs", "instruments", "python_bindings", "tests",
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py",
]  # fmt: skip


def copy_project(folder: Path, with_library: bool = False) -> None:
    """Into an existing folder, `with_library` with the C++ library that is built."""
    left_out = ("__pycache__",) if with_library else ("__pycache__", "*.so")
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*left_out))
        else:
            shutil.copy(source, target)


def replace(path: Path, old: str, new: str) -> None:
    """The first occurrence, which has to be there."""
    text = path.read_text()
    if old not in text:
        raise LookupError(f"{path.name} no longer has {old!r}, which was to be replaced")
    path.write_text(text.replace(old, new, 1))
