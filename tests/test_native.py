"""What only the C++ kernels have: instruction sets, threads, alignment, memory, their polynomials and their build.

That they compute the right thing is the contract's matter (`test_contract.py`, `test_losses.py`, `test_ops.py`), which
runs on them too; the fuzzing here looks for inputs that the contract did not think of.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adakd_kernels import adakd_loss, ops, reference, token_difficulty, token_divergence
from adakd_kernels import divergences as registry
from adakd_kernels.divergences import JensenShannon
from adakd_kernels.ops import native
from adakd_kernels.ops.with_gradient import token_divergence_with_gradient, token_divergence_with_gradient_

from .cases import DIVERGENCES, DTYPES, ONE_OF_EACH, assert_close_as_eager, gradient, logits, name_of, temperatures
from .conftest import SANITIZED

pytestmark = pytest.mark.native
ROOT = Path(__file__).parent.parent
INF = float("inf")


def mapped(function: str, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    getattr(native.library(), function)(
        ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(len(x))
    )
    return y


def bound(name: str) -> float:
    source = (ROOT / "python_bindings" / "core" / "exp_log.h").read_text()
    return float(re.search(rf"{name} = ([0-9.e-]+)f", source)[1])


@pytest.mark.parametrize("function", ["adakd_exp2", "adakd_mass"])
def test_exp2_keeps_its_error_bound(function):
    octave = np.arange(np.float32(1.0).view(np.int32), np.float32(2.0).view(np.int32), dtype=np.int32).view(np.float32)
    spread = np.linspace(-125.0, 127.0, 1_000_003).astype(np.float32)
    for x in (octave - 1.5, octave * 2**-6, -octave * 2**-6, spread):
        error = np.abs(mapped(function, x) / np.exp2(x.astype(np.float64)) - 1.0)
        assert error.max() <= bound("kExp2Error"), (x[error.argmax()], error.max())
    special = mapped(function, np.array([-INF, -1e30, -0.0, 0.0, 1.0, -3.0, math.nan], np.float32))
    assert np.array_equal(special, np.array([0.0, 0.0, 1.0, 1.0, 2.0, 0.125, math.nan], np.float32), equal_nan=True)
    assert 0.0 <= mapped(function, np.array([-128.0], np.float32))[0] < 2.0**-126  # subnormal or flushed


def test_the_error_of_exp2_vanishes_at_0():
    """Mixtures of nearly equal p and q take 1 - 2^x of a small x."""
    x = -np.geomspace(1e-6, 0.05, 100_001).astype(np.float32)
    error = np.abs(mapped("adakd_exp2", x) - np.exp2(x.astype(np.float64)))
    assert error.max() <= 1.2 * 2.0**-25  # 2**-25 is half of a last place below 1: the rounding of the result


def test_log2_keeps_its_error_bound():
    octaves = np.arange(np.float32(0.5).view(np.int32), np.float32(2.0).view(np.int32), dtype=np.int32).view(np.float32)
    for x in (octaves, octaves * 2**-40, octaves * 2**90):
        exact = np.log2(x.astype(np.float64))
        error = np.abs(mapped("adakd_log2", x) - exact) / np.where(exact == 0.0, 1.0, np.abs(exact))
        assert error.max() <= bound("kLog2Error"), (x[error.argmax()], error.max())
    assert mapped("adakd_log2", np.ones(3, np.float32)).tolist() == [0.0, 0.0, 0.0]


def test_every_half_is_read_exactly():
    """Subnormal ones too, although the kernels flush subnormal results."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()].view(1, -1, 1)
    mask = torch.ones(finite.shape[:2], dtype=torch.bool)
    for entries in (1, 64):  # one by one, and by pairs of vectors
        rows = finite.expand(-1, -1, entries).contiguous()
        assert torch.equal(ops.token_stats(rows, rows.flip(1), mask)[1][0], finite[..., 0].float())


@pytest.mark.parametrize("divergence", [d for d in ONE_OF_EACH if d.sweeps == 2], ids=name_of)
def test_rows_that_nearly_agree(divergence):
    """Their D is small, and an error that all entries of a row have in common shows in it: 2^x next to 0, say."""
    student = logits(2, 3, 20_000, seed=80, scale=2.0)
    teacher = student + logits(2, 3, 20_000, seed=81, scale=0.02)
    exact = reference.token_divergence(student.double(), teacher.double(), 0.9, divergence)
    eager = reference.token_divergence(student, teacher, 0.9, divergence)
    assert_close_as_eager(token_divergence(student, teacher, 0.9, divergence), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_threads_do_not_change_a_bit(divergence, dtype):
    student, teacher = logits(4, 8, 4099, dtype=dtype, seed=1), logits(4, 8, 4111, dtype=dtype, seed=2)
    labels = torch.randint(4099, (4, 8), generator=torch.Generator().manual_seed(3))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            leaf = student.clone().requires_grad_()
            out = adakd_loss(leaf, teacher, labels, divergence=divergence, focus_ratio=0.6, ce_weight=0.1)
            out.loss.backward()
            found.append((*(x.detach() for x in out), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_where_a_row_lies_in_memory_does_not_change_a_bit(divergence, dtype):
    """Streaming stores need whole lines, so the ends of a row take another path: they must give the same numbers."""
    student, teacher = logits(1, 1, 4500, dtype=dtype, seed=4), logits(1, 1, 4500, dtype=dtype, seed=5)
    expected = gradient(lambda s: token_divergence(s, teacher, 0.8, divergence), student)
    args = (divergence.name, *divergence.parameters)
    tau, one = torch.full((1, 1), 0.8), torch.ones(1, 1)
    for offset in (1, 3, 7, 31):
        room = torch.full((1, 1, 4500 + 64), 7.0, dtype=dtype)
        inside = room[..., offset : offset + 4500]
        inside.copy_(student)
        d, *saved = ops.token_divergence(inside, teacher, tau, one.bool(), *args)
        assert torch.equal(d, token_divergence(student, teacher, 0.8, divergence))
        ops.token_divergence_backward_(inside, teacher, tau, one, *saved, None, None, None, *args)
        assert torch.equal(inside, expected)
        assert (room[..., :offset] == 7.0).all() and (room[..., offset + 4500 :] == 7.0).all()


@pytest.mark.parametrize("types", [(a, b) for a in DTYPES[:3] for b in DTYPES[:3] if a != b], ids=str)
@pytest.mark.parametrize("divergence", [*ONE_OF_EACH, JensenShannon(beta=0.001)], ids=name_of)
def test_unlike_types_give_what_their_logits_give_in_fp32(divergence, types):
    """They are taken from copies in fp32, which hold every 16-bit number; the gradient alone has the student's type."""
    student, teacher = rows_of_every_kind(*types, skew=0)
    narrow, wide = [], []
    for found, s, t in ((narrow, student, teacher), (wide, student.float(), teacher.float())):
        args, one = (divergence.name, *divergence.parameters), torch.ones(3, 4)
        mask, tau = one.bool(), temperatures(3, 4, seed=75)
        found.extend(ops.token_stats(s, t, mask))
        found.extend(token_divergence_with_gradient(s, t, tau, mask, *args, 0.01 * one, None, None, None))
    wide[-1] = wide[-1].to(student.dtype)
    for x, y in zip(narrow, wide, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=0.0, equal_nan=True)


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def rows_of_every_kind(student_type, teacher_type, skew):
    """(3, 4, 4500) and (3, 4, 4511) logits that take every way through the kernels; rows begin `skew` entries apart."""
    student = logits(3, 4, 4500 + skew, dtype=student_type, seed=70)[..., skew:]
    teacher = logits(3, 4, 4511, dtype=teacher_type, seed=71)
    student[0, 1, ::9], teacher[0, 2, 5:700] = -INF, -INF  # guards
    student[0, 3, 4300] += 40.0  # a late peak
    student[1, 0, 17] = torch.finfo(student_type).max  # leaves the range of fp32, or comes near that of fp16
    teacher[1, 1] = -INF  # a row without mass
    student[1, 2, 3] = math.nan
    teacher[2, 0, :4500] = student[2, 0].to(teacher_type)  # the same row twice
    return student, teacher


@pytest.mark.parametrize(
    "types",
    [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_divergence_and_gradient_in_one_go_have_the_bits_of_the_two_operators(divergence, types):
    args = (divergence.name, *divergence.parameters)
    for skew, with_ce in ((0, False), (3, True)):
        student, teacher = rows_of_every_kind(*types, skew)
        tau, weight = temperatures(3, 4, seed=72), logits(3, 4, seed=73)
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[2, 1:] = False
        weight[2, 1], weight[2, 2], weight[2, 3], weight[0, 0] = 0.0, 0.0, math.nan, math.nan
        ce = (None, None, None)
        if with_ce:
            of_ce = torch.full((3, 4), 0.25)
            of_ce[2, 1] = 0.0
            labels = torch.randint(4500, (3, 4), generator=torch.Generator().manual_seed(74))
            ce = (labels, of_ce, ops.token_stats(student, teacher, mask | (of_ce != 0))[1])
        found = ops.token_divergence(student, teacher, tau, mask, *args)
        grad = ops.token_divergence_backward(student, teacher, tau, weight, *found[1:], *ce, *args)
        expected = [bits(x) for x in (*found, grad)]

        *sums, beside = token_divergence_with_gradient(student, teacher, tau, mask, *args, weight, *ce)
        assert all(torch.equal(bits(x), y) for x, y in zip((*sums, beside), expected, strict=True))
        over = torch.empty(3, 4, 4500 + skew, dtype=student.dtype)[..., skew:].copy_(student)
        sums = token_divergence_with_gradient_(over, teacher, tau, mask, *args, weight, *ce)
        assert all(torch.equal(bits(x), y) for x, y in zip((*sums, over), expected, strict=True))


def test_divergence_and_gradient_in_one_go_is_one_kernel():
    """By the operators' default body it would be two, each of which reads all rows."""
    z, one = logits(1, 2, 9), torch.ones(1, 2)
    args = (z, z.flip(2), one, one.bool(), "reverse_kl", 0.0, 0.0, one, None, None, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        token_divergence_with_gradient(*args)
        token_divergence_with_gradient_(*args)
    called = {event.key for event in profile.key_averages() if event.key.startswith("adakd::")}
    assert called == {"adakd::token_divergence_with_gradient", "adakd::token_divergence_with_gradient_"}


@pytest.mark.parametrize("place", [0, 1, 700, 4096, 4499])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_one_masked_entry_changes_its_own_gradient_only(divergence, place):
    """It sends its block through the guards; in place, what was stored before it must not be read again."""
    student, teacher = logits(1, 2, 4500, seed=6), logits(1, 2, 4500, seed=7)
    student[0, 0, place], teacher[0, 1, place] = -INF, -INF
    exact_value = reference.token_divergence(student.double(), teacher.double(), 0.8, divergence)
    eager_value = reference.token_divergence(student, teacher, 0.8, divergence)
    assert_close_as_eager(token_divergence(student, teacher, 0.8, divergence), eager_value, exact_value)
    exact = reference.token_divergence_grad(student.double(), teacher.double(), 0.8, divergence)
    eager = gradient(lambda s: reference.token_divergence(s, teacher, 0.8, divergence), student)
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        token_divergence(leaf * 1.0, teacher, 0.8, divergence, inplace=inplace).sum().backward()
        assert_close_as_eager(leaf.grad, eager, exact, ulps=16)
        assert (leaf.grad[..., place] == 0.0).all()


@st.composite
def problems(draw):
    """Any call of the ops: shapes, types, strides, masked entries and rows, temperatures, weights."""
    dtype = st.sampled_from(DTYPES)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    vocabularies = [draw(st.integers(1, 70) | st.integers(4050, 4200)) for _ in range(2)]
    sides = []
    for vocab in vocabularies:
        pad, seed = draw(st.integers(0, 5)), draw(st.integers(0, 10**6))
        z = logits(*shape, vocab + pad, seed=seed, scale=draw(st.sampled_from([0.1, 3.0, 20.0])), dtype=draw(dtype))
        z += draw(st.sampled_from([0.0, 0.0, 100.0, -1000.0]))
        z = z[..., pad:] if draw(st.booleans()) else z[..., :vocab]
        if draw(st.booleans()):
            z = z.transpose(0, 1).contiguous().transpose(0, 1)
        share = draw(st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]))
        if share:
            z.masked_fill_(logits(*shape, vocab, seed=seed + 1, scale=1.0).erf().abs() < share, -INF)
        sides.append(z)
    tau = temperatures(*shape, seed=draw(st.integers(0, 99)))
    weight = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, -0.5, 3.0]), min_size=9, max_size=9)))
    weight = weight[: shape[0] * shape[1]].view(shape)
    return *sides, tau, weight, draw(st.sampled_from(DIVERGENCES)), draw(st.booleans())


@given(problems())
def test_any_input_gives_what_the_reference_gives(problem):
    student, teacher, tau, weight, divergence, inplace = problem

    def exact(s):
        return reference.token_divergence(s, teacher.double(), tau, divergence)

    def eager(s):
        return reference.token_divergence(s, teacher, tau, divergence)

    def close(ours, eager, exact, ulps=4.0):
        """By the rule, but where everything is next to 0, rounding next to 1 is no error."""
        assert_close_as_eager(
            *(torch.cat((x.flatten(), torch.ones_like(x.flatten()[:1]))) for x in (ours, eager, exact)), ulps
        )

    # exp2 may be off by 2.0e-7. In a row of equal logits every mass is off by the same, so that these errors do not
    # average out as eager's do, and alpha_beta multiplies them by 1/(αβ) = 7: 1.4e-6, or 12 ulp.
    close(token_divergence(student, teacher, tau, divergence), eager(student), exact(student.double()), ulps=12)
    close(
        token_difficulty(student, teacher),
        reference.squared_hellinger(student, teacher),
        reference.squared_hellinger(student.double(), teacher.double()),
    )

    def grad(function, s):
        """Into a leaf through a copy, so that what is overwritten in place is the copy."""
        leaf = s.detach().clone().requires_grad_()
        (function(leaf * 1.0) * weight.to(leaf.dtype)).sum().backward()
        return leaf.grad

    ours = grad(lambda s: token_divergence(s, teacher, tau, divergence, inplace=inplace), student)
    close(ours, grad(eager, student), grad(exact, student.double()), ulps=16)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps freed memory")
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])  # the second keeps a row for each thread
def test_memory_beside_logits_and_gradient_is_small(divergence):
    """At the size where it matters: under 4 MB, however long the rows."""
    code = """
import sys
import torch
from adakd_kernels import adakd_loss
from instruments.devices import forget_peak, produced, resident
student, teacher = torch.randn(96, 151_936), torch.randn(96, 151_936)
labels = torch.arange(96)
def run():
    leaf = produced(student.detach().requires_grad_())
    options = dict(divergence=sys.argv[1], focus_ratio=0.5, ce_weight=0.1, inplace=True)
    adakd_loss(leaf, teacher, labels, **options).loss.backward()
torch.set_num_threads(2)
run()
forget_peak()
before, _ = resident()
run()
print(resident()[1] - before)
"""
    command = [sys.executable, "-c", code, divergence]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(result.stdout) < 4096 * 1024, f"{result.stdout.strip()} bytes"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=env)


def test_the_library_has_every_divergence():
    assert native.divergences() == set(registry.DIVERGENCES), "build it anew: python setup.py build_ext --inplace"


def test_a_divergence_that_the_library_lacks_is_an_error_at_the_op():
    """An older library has fewer names; no order of names can make it take one for another."""
    student, mask = logits(1, 2, 9), torch.ones(1, 2, dtype=torch.bool)
    one = torch.ones(1, 2)
    saved = ops.token_divergence(student, student, one, mask, "forward_kl", 0.0, 0.0)[1:]
    with pytest.raises(RuntimeError, match="kernels for the CPU have no divergence 'tenth': build them anew"):
        ops.token_divergence(student, student, one, mask, "tenth", 0.0, 0.0)
    inputs = (student, student, one, one, *saved, None, None, None, "tenth", 0.0, 0.0)
    with pytest.raises(RuntimeError, match="kernels for the CPU have no divergence 'tenth': build them anew"):
        ops.token_divergence_backward(*inputs)


def test_the_environment_decides():
    show = "from adakd_kernels.ops import backend; print(*backend('cpu'), sep=': ')"
    for isa in native.instruction_sets():
        assert python(show, ADAKD_ISA=isa).stdout == f"native: the C++ kernels are built; they use {isa} here\n"
    assert python(show, ADAKD_NATIVE="0").stdout == "reference: ADAKD_NATIVE=0 leaves the C++ kernels out\n"
    assert python(show, TRITON_INTERPRET="1").stdout.startswith("triton-interpreter: ")


@pytest.mark.parametrize("wanted", ["", "1"], ids=["optional", "forced"])
def test_without_a_compiler_the_package_still_builds_and_says_so(tmp_path, wanted):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("python_bindings", "adakd_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    env = {**os.environ, "CXX": "no-such-compiler", "ADAKD_NATIVE": wanted, "LD_PRELOAD": ""}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build"], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    why = "there is no C++ compiler (no-such-compiler)"
    if wanted:
        assert result.returncode != 0
        assert f"ADAKD_NATIVE=1, but the C++ kernels for the CPU cannot be built: {why}" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"adakd_kernels: installed without the C++ kernels for the CPU, because {why}\n"
    built = {path.name for path in (tmp_path / "build").rglob("*") if path.is_file()}
    assert "functional.py" in built and "_native.so" not in built


@pytest.mark.parametrize("divergence", ["reverse_kl", "hellinger", "jensen_shannon"])
@pytest.mark.parametrize("places", [(1, 6), (5, 700), (4100, 5000)], ids=str)
def test_several_infinite_logits_are_loud_and_do_not_loop(divergence, places):
    """An entry equal to the peak asks for no new peak, wherever they stand."""
    student, teacher = logits(1, 6000, seed=60), logits(1, 6000, seed=61)
    student[0, list(places)] = torch.inf
    assert token_divergence(student, teacher, 1.0, divergence).isnan().all()
