"""A divergence cannot be half there: a tenth is added to a copy of the project, and each place left out is reported.

The copy's own tests and its own build report it. What has to be computed runs at the divergence's own test cases, which
the copy's tests make from its registry.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adakd_kernels.ops import native
from instruments.devices import ROOT
from instruments.project_copy import replace

from .conftest import SANITIZED
from .tenth_divergence import (
    CLASS,
    CPP_GRADIENT,
    CPP_LIST,
    CPP_SWEEPS,
    CPP_TERMS,
    EDITS,
    NAME,
    write_project,
)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; it has wheels for Linux only"
)


def python(folder: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process in the copy, where nothing is left of the tier that this one runs in."""
    own = ("ADAKD_NATIVE", "ADAKD_ISA", "TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    env = {name: value for name, value in os.environ.items() if name not in own} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, check=False, cwd=folder, env=env | environment
    )


def run_tests(folder: Path, tier: str, chosen: str, *files: str, **environment: str) -> tuple[int, str]:
    """(exit code of pytest, what it printed); the backend is plain torch unless the environment says otherwise."""
    options = ("-p", "no:benchmark", "-p", "no:cacheprovider", "-q", "--thorough", "-m", tier, "-k", chosen)
    paths = [f"tests/test_{name}.py" for name in files]
    result = python(folder, "-m", "pytest", *options, *paths, **({"ADAKD_NATIVE": "0"} | environment))
    return result.returncode, result.stdout + result.stderr


def run_place_tests(folder: Path) -> tuple[int, str]:
    """The tests that read the places, without those that compute."""
    chosen = "every_divergence or native_kernels or closed_form"
    return run_tests(folder, "fast", chosen, "architecture", "reference")


# What the report has to say beside the divergence's name.
REPORTS = {
    "equation": "missing in docs/maths.md",
    "class": f"NameError: name '{CLASS}' is not defined",
    "registry": "missing in DIVERGENCES of adakd_kernels/divergences.py",
    "names of the module": "missing in adakd_kernels.divergences or its __all__",
    "export": "missing in adakd_kernels or its __all__",
    "public names": "missing in adakd_kernels or its __all__",
    "summand": "missing in adakd_kernels/reference.py, SUMMANDS",
    "gradient": "missing in adakd_kernels/reference.py, GRADIENTS",
    "Triton terms": "missing in adakd_kernels/kernels/divergence_terms.py",
    "C++ list": "test_the_list_of_the_native_kernels_is_the_registry",
    "closed form": "test_every_divergence_has_a_closed_form",
    "list of the README": "missing in README.md",
    "line of the changelog": "missing in CHANGELOG.md",
}


@pytest.mark.fast
@pytest.mark.parametrize("place", REPORTS)
def test_a_place_left_out_is_reported(tmp_path, place):
    code, output = run_place_tests(write_project(tmp_path, place))
    assert code != 0 and REPORTS[place] in output, output[-3000:]
    assert NAME in output or CLASS in output


@pytest.mark.fast
def test_every_place_is_left_out_once():
    elsewhere = {"C++ class", "tables of the kernels"}
    assert EDITS.keys() == REPORTS.keys() | elsewhere


@pytest.mark.fast
def test_contributing_names_every_place():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a divergence\n")[1].split("\n## ")[0]
    named = re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)
    assert named == list(dict.fromkeys(edit.path for edit in EDITS.values()))
    assert all((ROOT / path).is_file() for path in re.findall(r"`([\w/]+/[\w/]+\.\w+)`", section))


@pytest.mark.fast
def test_with_every_place_it_passes(tmp_path):
    write_project(tmp_path)
    code, output = run_place_tests(tmp_path)
    assert code == 0, output[-3000:]
    chosen = f"{CLASS} or {NAME} or check_passes"
    code, output = run_tests(tmp_path, "fast", chosen, "contract", "losses", "reference", "doctor")
    assert code == 0 and f"{CLASS}" not in output, output[-3000:]


@needs_triton
@pytest.mark.fast
def test_the_triton_kernels_do_not_compile_without_a_branch(tmp_path):
    write_project(tmp_path, "Triton terms")
    code, output = run_tests(tmp_path, "interpret", f"{CLASS} and negative", "contract", TRITON_INTERPRET="1")
    assert code == 1 and "a divergence without a branch in divergence_terms" in output, output[-3000:]
    # One sweep by its class, and no fold: it must not pass as one of two sweeps with D = 0.
    replace(tmp_path / "adakd_kernels" / "divergences.py", f'"{NAME}"\n    sweeps: ClassVar[int] = 2', f'"{NAME}"')
    code, output = run_tests(tmp_path, "interpret", f"{CLASS} and negative", "contract", TRITON_INTERPRET="1")
    assert code == 1 and "a divergence of one sweep needs a fold of its own" in output, output[-3000:]


@needs_triton
@pytest.mark.fast
def test_the_triton_kernels_compute_it(tmp_path):
    write_project(tmp_path)
    chosen = f"{CLASS} and (float32-1003 or negative or bit_for_bit)"
    code, output = run_tests(tmp_path, "interpret", chosen, "contract", TRITON_INTERPRET="1")
    assert code == 0, output[-3000:]


@needs_triton
@pytest.mark.fast
def test_rows_missing_in_the_tables_of_the_kernels_are_reported(tmp_path):
    write_project(tmp_path, "tables of the kernels")
    code, output = run_tests(tmp_path, "compile", "every_kernel_has_a_row", "kernel_table")
    assert code == 1 and f"| forward | `{NAME}` |" in output, output[-3000:]


@pytest.fixture
def compiler() -> None:
    """The tests below build; once is enough, whatever the instruction sets that the tier goes through."""
    if SANITIZED:
        pytest.skip("a sanitizer is loaded into every process")
    if native.library().adakd_isa().decode() != native.instruction_sets()[0]:
        pytest.skip("runs with the widest instruction set, and builds the portable one itself")


def build(folder: Path, flags: str) -> subprocess.CompletedProcess[str]:
    """setup.py as users run it, but for one instruction set."""
    return python(
        folder, "setup.py", "-q", "build_ext", "--inplace",
        ADAKD_NATIVE="1", ADAKD_INSTRUCTION_SETS="portable", CXXFLAGS=flags,
    )  # fmt: skip


def omit_class(folder: Path) -> None:
    edit = EDITS["C++ class"]
    replace(folder / edit.path, edit.text, "")


def omit_from_class(part: str) -> None:
    def omit(folder: Path) -> None:
        edit = EDITS["C++ class"]
        replace(folder / edit.path, edit.text, edit.text.replace(part, ""))

    return omit


def enumerator_beside_the_list(folder: Path) -> None:
    path = folder / EDITS["C++ list"].path
    replace(path, CPP_LIST, "")
    replace(path, "  ADAKD_DIVERGENCES(ADAKD_ENUMERATOR)\n", f"  ADAKD_DIVERGENCES(ADAKD_ENUMERATOR) k{CLASS},\n")


OMITTED = {
    "class": (omit_class, f"{CLASS}.* was not declared|undeclared identifier '{CLASS}'"),
    "terms": (omit_from_class(CPP_TERMS), "terms"),
    "gradient": (omit_from_class(CPP_GRADIENT), "gradient"),
    "sweeps": (
        omit_from_class(CPP_SWEEPS),
        "a divergence of one sweep needs a fold in OneSweep",
    ),
    "case": (enumerator_beside_the_list, f"k{CLASS}.* not handled in switch"),
}


@pytest.mark.native
@pytest.mark.parametrize("omitted", OMITTED)
def test_what_the_native_kernels_lack_does_not_compile(tmp_path, compiler, omitted):
    edit, report = OMITTED[omitted]
    edit(write_project(tmp_path))
    result = build(tmp_path, "-fsyntax-only")
    errors = "\n".join(line for line in result.stderr.splitlines() if "error: " in line)
    assert result.returncode != 0 and re.search(report, errors), result.stderr[-3000:]
    assert CLASS in result.stderr


@pytest.mark.native
def test_the_native_kernels_compute_it(tmp_path, compiler):
    write_project(tmp_path)
    result = build(tmp_path, "-O0")
    assert result.returncode == 0, result.stderr[-3000:]
    chosen = f"{CLASS} or check_passes or library"
    code, output = run_tests(tmp_path, "native", chosen, "contract", "native", "doctor", ADAKD_NATIVE="1")
    assert code == 0 and " passed" in output and "skipped" not in output, output[-3000:]


@pytest.mark.native
def test_a_library_built_before_it_is_an_error_at_the_op(tmp_path, compiler):
    write_project(tmp_path)
    old = {"ADAKD_NATIVE": str(native.path().resolve())}
    code, output = run_tests(tmp_path, "native", f"{CLASS} and negative or has_every", "contract", "native", **old)
    assert code == 1 and "test_the_library_has_every_divergence" in output, output[-3000:]
    assert f"the C++ kernels for the CPU have no divergence '{NAME}': build them anew" in output


@pytest.mark.native
def test_a_row_that_a_native_kernel_does_not_write_is_seen(tmp_path, compiler):
    """The second row of a call: by the forward at one vocabulary, by the backward at another."""
    write_project(tmp_path)
    for call, vocab in (("DivergenceCall", 7), ("GradientCall", 1003)):
        head = f"(const {call}& call, int64_t n) {{\n"
        skip = f"if (call.divergence == Divergence::k{CLASS} && n == 1 && call.rows.vocab == {vocab}) return;\n"
        replace(tmp_path / "python_bindings" / "core" / "isa.h", head, f"{head}  {skip}")
    result = build(tmp_path, "-O0")
    assert result.returncode == 0, result.stderr[-3000:]
    chosen = f"as_exact and {CLASS} and float32"
    code, output = run_tests(tmp_path, "native", chosen, "contract", ADAKD_NATIVE="1")
    failed = re.findall(r"^FAILED .*-float32-(\d+)\]", output, re.MULTILINE)
    assert code == 1 and sorted(failed) == ["1003", "7"], output[-3000:]
    assert len(re.findall(r"^E +AssertionError: NaN, or a lane that was never written$", output, re.MULTILINE)) == 2
