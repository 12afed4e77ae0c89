"""The package's launches, compiled for each supported GPU without one: no spill, no atomics, no promotion, wide loads.

Every kernel, divergence and type is compiled for every target at the vocabulary of Qwen, and a subset of the kernels at
others; fp16, which differs from bf16 in the cast alone, once.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from .conftest import INTERPRETING

pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")
if INTERPRETING:
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled in this process", allow_module_level=True)

import triton
import triton.language as tl

from adakd_kernels.divergences import DIVERGENCES
from adakd_kernels.kernels import token_stats

from .cases import name_of
from .compiled import TARGETS, Code, compiling_for, launch, logits, read_code

pytestmark = pytest.mark.compile

QWEN, QWEN_PADDED, GPT2 = 151_936, 152_064, 50_257
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# The difficulty is one kernel whatever the divergence; its name here is that of the sum it folds.
STATS = [("stats", "hellinger")]
KERNELS = STATS + [(kernel, div) for kernel in ("forward", "backward", "backward_ce") for div in DIVERGENCES]
# One divergence of one sweep, and the one of two sweeps that takes the most registers.
SOME_KERNELS = [
    (kernel, div) for kernel, div in KERNELS if kernel == "stats" or div in ("reverse_kl", "skew_reverse_kl")
]

each_kernel = pytest.mark.parametrize(("kernel", "divergence"), KERNELS)
some_kernels = pytest.mark.parametrize(("kernel", "divergence"), SOME_KERNELS)
each_target = pytest.mark.parametrize("target", TARGETS)


def compiled(target: str, kernel: str, divergence: str, student: Tensor, teacher: Tensor) -> Code:
    """What one launch compiles to."""
    with compiling_for(TARGETS[target]) as launched:
        launch(kernel, divergence, student, teacher)
    (only,) = launched
    return read_code(only)


def faults(code: Code, student: Tensor, teacher: Tensor) -> list[str]:
    """What is wrong with a kernel, whatever it computes."""
    found = []
    if code.local_bytes or code.spills:
        found.append(
            f"{code.local_bytes} bytes spilled in {code.spills} instructions, {code.spills_in_loops} of them in loops, "
            f"at {code.registers} registers"
        )
    if code.atomics:
        found.append(f"{code.atomics} atomics")
    if FP64 in (student.dtype, teacher.dtype):
        if not code.fp64:
            found.append("fp64 logits are not computed in fp64")
    elif code.fp64:
        found.append(f"{code.fp64} instructions in fp64")
    return found


# A warp of AMD has 64 lanes, so a lane takes half as many entries of a block: 64 bits of a 16-bit type.
WIDE = {target: (128, 64) if target == "gfx942" else (128,) for target in TARGETS}


def narrow_access(code: Code, kernel: str, target: str) -> list[str]:
    """For a vocabulary that permits 128 bits. In 16 bits nothing is read but logits, nothing written but gradients."""
    bits = WIDE[target]
    wide = any(code.loads[n] for n in bits)
    wide = wide and (any(code.stores[n] for n in bits) or not kernel.startswith("backward"))
    if wide and not code.loads[16] and not code.stores[16]:
        return []
    return [f"access by bits: loads {dict(code.loads)}, stores {dict(code.stores)}"]


@each_kernel
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(BF16, BF16), (FP32, FP32), (BF16, FP32), (FP64, FP64)],
    ids=["bf16", "fp32", "bf16_and_fp32", "fp64"],
)
def test_kernel_compiles_clean(kernel, divergence, student_dtype, teacher_dtype):
    student, teacher = logits(QWEN, student_dtype), logits(QWEN, teacher_dtype)
    found = {}
    for target in TARGETS:
        code = compiled(target, kernel, divergence, student, teacher)
        found[target] = faults(code, student, teacher) + narrow_access(code, kernel, target)
    assert not any(found.values()), found


@some_kernels
@pytest.mark.parametrize(("vocab", "dtype"), [(GPT2, BF16), (GPT2, FP32), (1003, BF16), (17, FP32)], ids=name_of)
def test_other_vocabularies_compile_clean(kernel, divergence, vocab, dtype):
    """An odd one, one shorter than a block, and one for a single warp."""
    x = logits(vocab, dtype)
    found = {target: faults(compiled(target, kernel, divergence, x, x), x, x) for target in TARGETS}
    assert not any(found.values()), found


@some_kernels
def test_padded_student_compiles_clean(kernel, divergence):
    """A student whose vocabulary is longer than its teacher's has a tail of zero gradients."""
    student, teacher = logits(QWEN_PADDED, FP16), logits(QWEN, FP16)
    found = {t: faults(compiled(t, kernel, divergence, student, teacher), student, teacher) for t in TARGETS}
    assert not any(found.values()), found


@some_kernels
@each_target
def test_odd_vocabulary_in_padded_rows_compiles_clean(kernel, divergence, target):
    """Whole blocks carry no mask, so it is the distance of the rows, not the vocabulary, that permits 128 bits."""
    x = logits(GPT2, BF16, pad=15)
    code = compiled(target, kernel, divergence, x, x)
    assert not faults(code, x, x)
    assert any(code.loads[bits] for bits in WIDE[target])


@some_kernels
def test_logits_beyond_2_gib_compile_clean_for_amd(kernel, divergence):
    """Triton addresses what is smaller with 32 bits on AMD; the first batch beyond is one more compilation there."""
    small, large = logits(QWEN, BF16), logits(QWEN, BF16, batch=8, length=4096)
    with compiling_for(TARGETS["gfx942"]) as launched:
        launch(kernel, divergence, small, small)
        launch(kernel, divergence, large, large)
    assert launched[0] is not launched[1]
    assert not faults(read_code(launched[1]), large, large)


@some_kernels
@pytest.mark.parametrize("vocab", [QWEN, GPT2])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_batch_does_not_recompile(kernel, divergence, vocab, target):
    """Nor does a view without the last token, nor writing the gradient over the student's logits."""
    with compiling_for(TARGETS[target]) as launched:
        for batch, length in [(2, 512), (1, 512), (3, 77), (16, 17), (4, 2)]:
            whole = logits(vocab, BF16, batch, length)
            for x in (whole, whole[:, :-1]):
                launch(kernel, divergence, x, x)
                launch(kernel, divergence, x, logits(vocab, BF16, *x.shape[:2]))
                launch(kernel, divergence, x, x, inplace=True)
        x = logits(vocab, BF16, 1, 1)
        launch(kernel, divergence, x, x)
    assert len({id(k) for k in launched}) == 1


# The checks above mean something only if the helper sees what they look for.


@each_target
def test_helper_sees_a_spill(target):
    """256 entries for each of 128 threads do not fit into registers."""
    x = logits(65_536, FP32)
    too_much = {"BLOCK_V": 32_768, "num_warps": 128 // TARGETS[target].warp_size}
    with mock.patch.object(token_stats, "launch_config", lambda *_: too_much):
        code = compiled(target, "stats", "hellinger", x, x)
    assert code.local_bytes > 0
    assert code.spills_in_loops > 0
    assert "spilled" in faults(code, x, x)[0]


@triton.jit
def add_atomically(X):
    tl.atomic_add(X + tl.arange(0, 32), 1.0)


@each_target
def test_helper_sees_an_atomic(target):
    x = torch.empty(32, device="meta")
    with compiling_for(TARGETS[target]) as launched:
        add_atomically[(1,)](x)
    assert "atomics" in faults(read_code(launched[0]), x, x)[0]


@triton.jit
def multiply_in_fp64(X):
    X += tl.arange(0, 32)
    tl.store(X, tl.load(X).to(tl.float64) * 0.1)


@each_target
def test_helper_sees_a_promotion_to_fp64(target):
    x = torch.empty(32, device="meta")
    with compiling_for(TARGETS[target]) as launched:
        multiply_in_fp64[(1,)](x)
    assert "fp64" in faults(read_code(launched[0]), x, x)[0]


@each_target
def test_helper_sees_narrow_access(target):
    """The rows of an odd vocabulary, one right after the other, start at odd multiples of 2 bytes."""
    x = logits(GPT2, BF16)
    code = compiled(target, "backward", "hellinger", x, x)
    assert code.loads[16]
    assert code.stores[16]
    assert narrow_access(code, "backward", target)


@each_target
def test_helper_sees_a_recompilation(target):
    with compiling_for(TARGETS[target]) as launched:
        for vocab in (QWEN, QWEN, 32_000):
            launch("stats", "hellinger", logits(vocab, BF16), logits(vocab, BF16))
    assert launched[0] is launched[1]
    assert launched[1] is not launched[2]
