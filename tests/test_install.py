"""The package imports and computes without its C++ kernels, with broken ones, and without numpy."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from adakd_kernels import ops, token_difficulty, token_divergence
from adakd_kernels.ops import backends, native
from instruments.project_copy import copy_project

from .conftest import SANITIZED

ROOT = Path(__file__).parent.parent
LOSSES = """
import warnings
import adakd_kernels, torch
print("imported")
student = torch.randn(4, 50, requires_grad=True)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        adakd_kernels.adakd_loss(student, torch.randn(4, 50), torch.randint(50, (4,))).loss.backward()
print(*adakd_kernels.ops.backend("cpu"), bool(student.grad.isfinite().all()), sep="; ")
for warning in seen:
    print(warning.category.__name__, warning.message)
"""


def python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"ADAKD_NATIVE": "", "ADAKD_ISA": "", "TRITON_INTERPRET": "0", "LD_PRELOAD": ""}
    env = {**os.environ, **own, **environment}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


@pytest.fixture
def not_built(monkeypatch, tmp_path):
    """The process as it is where the C++ kernels are not built, and nobody said anything about them."""
    monkeypatch.delenv("ADAKD_NATIVE", raising=False)
    monkeypatch.setattr(native, "BUILT", tmp_path / "_native.so")
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    backends.report_plain_torch.cache_clear()
    yield
    backends.report_plain_torch.cache_clear()


@pytest.mark.fast
@pytest.mark.parametrize("first", [token_difficulty, token_divergence], ids=lambda function: function.__name__)
def test_plain_torch_that_nobody_asked_for_is_said_once(not_built, first):
    logits = torch.randn(3, 50)
    with pytest.warns(UserWarning) as seen:
        first(logits, logits)
        token_divergence(logits.clone().requires_grad_(), logits).sum().backward()
    (said,) = (str(warning.message) for warning in seen)
    assert said == (
        "adakd_kernels computes on the CPU in plain torch, which takes many times as long as its C++ kernels: the C++ "
        f"kernels are not built: {native.CURE}. ADAKD_NATIVE=0 asks for plain torch, without this warning."
    )
    assert ops.backend("cpu") == ("reference", f"the C++ kernels are not built: {native.CURE}")


@pytest.mark.fast
def test_no_compiler_is_a_cure_on_windows(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert runpy.run_path(native.__file__)["CURE"] == "there are none for Windows"


@pytest.mark.fast
def test_plain_torch_that_was_asked_for_is_not_said(not_built, monkeypatch):
    monkeypatch.setenv("ADAKD_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_difficulty(torch.randn(3, 50), torch.randn(3, 50))


@pytest.mark.fast
def test_kernels_that_are_demanded_and_missing_are_an_error_of_each_loss(not_built, monkeypatch):
    monkeypatch.setenv("ADAKD_NATIVE", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"ADAKD_NATIVE=1, but the C\+\+ kernels are not built: install"):
            token_difficulty(torch.randn(3, 50), torch.randn(3, 50))


@pytest.mark.fast
def test_without_numpy_nothing_is_said_under_any_filter():
    """torch warns while it is imported, and would stop there under -W error. The package is not installed here."""
    absent = (
        "import sys, importlib.metadata as metadata; sys.modules['numpy'] = None\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
    )
    for filters in ((), ("-W", "error")):
        result = python(absent + LOSSES, *filters, ADAKD_NATIVE="0")
        assert result.returncode == 0 and result.stderr == "", (filters, result.stderr)
        assert result.stdout.splitlines()[1].endswith("; True")


@pytest.mark.native
@pytest.mark.skipif(SANITIZED, reason="the library of a sanitizer does not load in a plain process")
@pytest.mark.parametrize("broken", ["truncated", "a wrong header", "another library", "wrong ADAKD_ISA", "wrong path"])
def test_a_library_that_cannot_be_used_leaves_plain_torch_and_one_warning(tmp_path, broken):
    whole = native.path().read_bytes()
    library = tmp_path / "library.so"
    environment = {"ADAKD_NATIVE": str(library)}
    if broken == "truncated":  # to load it kills the process
        library.write_bytes(whole[: len(whole) // 2])
        why = f"{library}: the file has {len(whole) // 2} bytes, and its program "
    elif broken == "a wrong header":  # entries of 1 byte in the table of the program's parts
        library.write_bytes(struct.pack("<6s26xQ14x2H6x", b"\x7fELF\x02\x01", 60, 1, 4))
        why = f"cannot be loaded with torch {torch.__version__} ({library}: "
    elif broken == "another library":
        environment = {"ADAKD_NATIVE": str(Path(torch.__file__).parent / "lib" / "libc10.so")}
        why = "undefined symbol: adakd_isa"
    elif broken == "wrong ADAKD_ISA":
        environment = {"ADAKD_NATIVE": str(native.path().resolve()), "ADAKD_ISA": "mmx"}
        why = f"ADAKD_ISA must be one of {', '.join(native.instruction_sets())} on this processor, got 'mmx': unset it"
    else:
        why = f"ADAKD_NATIVE must be 0, 1 or the path of a library, and there is no {library}: unset it"
    result = python(LOSSES, **environment)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    imported, taken, *said = result.stdout.splitlines()
    assert imported == "imported" and taken.startswith("reference; ") and taken.endswith("; True") and why in taken
    assert len(said) == 1 and said[0].startswith("UserWarning adakd_kernels computes on the CPU in plain torch"), said
    assert why in said[0]


@pytest.mark.native
def test_a_wrong_instruction_set_where_the_kernels_are_demanded_is_an_error_after_the_import():
    result = python(LOSSES, ADAKD_NATIVE="1", ADAKD_ISA="mmx")
    assert result.returncode == 1 and result.stdout == "imported\n"
    assert result.stderr.splitlines()[-1].startswith("RuntimeError: ADAKD_NATIVE=1, but ADAKD_ISA must be one of ")


COMPILER = """#!/bin/sh
for argument; do
  [ "$last" = -o ] && echo "no code" > "$argument" && echo "$argument" >> calls
  last=$argument
done
"""


def built(folder: Path, *command: str, **environment: str) -> str:
    """What `setup.py` prints in a copy of the project."""
    env = {**os.environ, "ADAKD_NATIVE": "", "LD_PRELOAD": "", **environment}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], capture_output=True, text=True, check=False, cwd=folder, env=env
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.fast
@pytest.mark.skipif(os.name != "posix", reason="the C++ kernels are for POSIX systems")
@pytest.mark.parametrize("library", [True, False], ids=["with the C++ kernels", "without"])
def test_a_wheel_belongs_to_a_platform_or_to_none(tmp_path, library):
    project, compiler = tmp_path / "project", tmp_path / "compiler"
    project.mkdir()
    copy_project(project)
    compiler.write_text(COMPILER)  # that a real one builds the library is what `make setup` shows
    compiler.chmod(0o755)
    said = built(project, "bdist_wheel", CXX=str(compiler) if library else "no-such-compiler")
    (wheel,) = (project / "dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {"adakd_kernels/functional.py", "adakd_kernels/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "python_bindings")) or ".data/" in name]
    tag = wheel.stem.split("-", 2)[2]
    if library:
        calls = (project / "calls").read_text().splitlines()
        assert len(calls) == len(set(calls)) >= 4, calls
        assert "adakd_kernels/_native.so" in names and re.fullmatch(r"py3-none-(linux|macosx)_\w+", tag), tag
    else:
        assert not [name for name in names if name.endswith(".so")] and tag == "py3-none-any"
        assert "without the C++ kernels for the CPU, because there is no C++ compiler (no-such-compiler)" in said


# Tests of the sdist that are run, whole.
QUICK = [f"tests/test_{name}.py" for name in ("adaptive", "reference")]


@pytest.mark.fast
def test_the_sdist_holds_the_project_and_its_tests_run(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed: it lists the files that belong into the sdist")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT)
    if listed.returncode:
        pytest.skip("git does not know these files")
    built(ROOT, "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (project,) = (path for path in tmp_path.iterdir() if (path / "setup.py").exists())
    missing = [name for name in listed.stdout.splitlines() if (ROOT / name).exists() and not (project / name).exists()]
    assert not missing
    assert not [path for path in project.rglob("*") if path.suffix in (".so", ".pyc")]
    env = {**os.environ, "ADAKD_NATIVE": "0", "PYTHONPATH": ""}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-m", "fast", *QUICK]
    result = subprocess.run(run, capture_output=True, text=True, check=False, cwd=project, env=env)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.fast
def test_the_citation_is_that_of_the_model_cards():
    yaml = pytest.importorskip("yaml")
    # Not imported: the trainer brings transformers.
    ours = runpy.run_path(str(ROOT / "adakd_kernels" / "trainer" / "citation.py"))
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    authors = re.search(r"author  = \{(.*?)\},\n  journal", ours["CITATION"], re.DOTALL)[1]
    assert " ".join(authors.split()) == " and ".join(
        f"{author['given-names']} {author['family-names']}" for author in cited["authors"]
    )
    assert cited["title"] == ours["PAPER_TITLE"] and cited["identifiers"][0]["value"] == "arXiv:" + ours["PAPER_ID"]


@pytest.mark.fast
def test_the_workflows_run_what_is_here():
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    folder, ran = ROOT / ".github" / "workflows", []

    def commands(job):
        return [step["run"] for step in job["steps"] if "run" in step]

    for path in folder.glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            ran += commands(job)
    jobs = yaml.safe_load((folder / "release.yml").read_text())["jobs"]
    assert ".ci/run" in [command for name in jobs["publish"]["needs"] for command in commands(jobs[name])]
    for command in ran:
        program, *arguments = command.split()
        assert program in ("make", "grep") or os.access(ROOT / program, os.X_OK), command
        assert program != "make" or set(arguments) <= targets, command
    assert {"make wheels", "make docs", ".ci/run"} <= set(ran)
    configured = re.findall(r"\{project\}/(\.ci/\w+)", (ROOT / "pyproject.toml").read_text())
    assert len(configured) == 2 and all(os.access(ROOT / name, os.X_OK) for name in configured)


LOAD_AS_KERNELS_DOES = """
import importlib.util, json, sys
from pathlib import Path
folder = Path(sys.argv[1]) / "build" / "torch-cpu"
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
LOAD_BY_KERNELS = """
import sys
from pathlib import Path
from kernels import get_local_kernel
module = get_local_kernel(Path(sys.argv[1]), backend="cpu")
"""
USE_LOADED = """
import torch
student = torch.randn(4, 50, requires_grad=True)
module.adakd_loss(student, torch.randn(4, 50), torch.randint(50, (4,))).loss.backward()
hidden = [torch.randn(4, 8), torch.randn(50, 8)]
module.linear_adakd_loss(*hidden, *hidden, torch.randint(50, (4,)))
print(bool(student.grad.isfinite().all()), [name for name in sys.modules if name.startswith("adakd")])
"""


@pytest.mark.fast
@pytest.mark.parametrize("load", [LOAD_AS_KERNELS_DOES, LOAD_BY_KERNELS], ids=["as kernels does", "by kernels"])
def test_the_layout_of_the_kernel_hub_needs_no_installed_package(tmp_path, load):
    """It is loaded under a name of its own, from a folder that is on no path."""
    if load == LOAD_BY_KERNELS:
        pytest.importorskip("kernels", reason="kernels is not installed: pip install kernels")
    folder = tmp_path / "hub"
    subprocess.run([sys.executable, ROOT / ".ci" / "hub_layout", folder], check=True)
    variants = {path.name for path in (folder / "build").iterdir()}
    assert variants == {"torch-cpu", "torch-cuda", "torch-rocm"} and (folder / "build.toml").exists()
    env = {**os.environ, "ADAKD_NATIVE": "0", "TRITON_INTERPRET": "0", "LD_PRELOAD": "", "HF_HUB_OFFLINE": "1"}
    filters = ["-W", "error"] if load == LOAD_AS_KERNELS_DOES else []
    command = [sys.executable, *filters, "-c", load + USE_LOADED, folder]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert result.returncode == 0 and result.stdout == "True []\n", result.stderr
