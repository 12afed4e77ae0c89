"""The package imports and computes without its C++ kernels, with broken ones, and without numpy."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from adakd_kernels import ops, token_difficulty, token_divergence
from adakd_kernels.ops import backends, native

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
    """torch itself warns of it while it is imported, and would stop there under -W error."""
    absent = "import sys; sys.modules['numpy'] = None\n"
    for filters in ((), ("-W", "error")):
        result = python(absent + LOSSES, *filters, ADAKD_NATIVE="0")
        assert result.returncode == 0 and result.stderr == "", (filters, result.stderr)
        assert result.stdout.splitlines()[1].endswith("; True")


@pytest.mark.native
@pytest.mark.parametrize("broken", ["truncated", "another library", "wrong ADAKD_ISA", "wrong path"])
def test_a_library_that_cannot_be_used_leaves_plain_torch_and_one_warning(tmp_path, broken):
    whole = native.path().read_bytes()
    library = tmp_path / "library.so"
    environment = {"ADAKD_NATIVE": str(library)}
    if broken == "truncated":  # to load it kills the process
        library.write_bytes(whole[: len(whole) // 2])
        why = f"{library}: the file has {len(whole) // 2} bytes, and its program "
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
