"""The package's launches, compiled for each supported GPU without one: no spill, no atomics, no promotion, wide access,
few exponentials, no reduction or barrier in a loop, and half of an SM's warps resident.

Every kernel, divergence and type is compiled for every target at the vocabulary of Qwen, in bf16 also at the odd one of
GPT-2, and a subset of the kernels at others; fp16, which differs from bf16 in the cast alone, once. `left_out.py` says
what of this `make test` leaves to `make test-all`.
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

from adakd_kernels.divergences import AlphaBeta, JensenShannon, SkewReverseKL
from adakd_kernels.kernels import launch as launches
from adakd_kernels.kernels import loss_sums, spread_statistics, token_choice, token_stats
from adakd_kernels.kernels.launch import Machine, divergence_class, warps_that_fit
from instruments.compiled import (
    AT_ONCE,
    KERNELS,
    MACHINES,
    TARGETS,
    Code,
    compiled,
    compiling_for,
    launch,
    logits,
    read_code,
)
from instruments.devices import ROOT

from .cases import name_of

pytestmark = pytest.mark.compile

QWEN, QWEN_ODD, QWEN_PADDED, LLAMA_3, LLAMA_2, GPT2 = 151_936, 151_669, 152_064, 128_256, 32_000, 50_257
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# One divergence of one sweep, and the one of two sweeps that takes the most registers.
SOME_KERNELS = [
    (kernel, div) for kernel, div in KERNELS if kernel == "stats" or div in ("reverse_kl", "skew_reverse_kl")
]

each_kernel = pytest.mark.parametrize(("kernel", "divergence"), KERNELS)
some_kernels = pytest.mark.parametrize(("kernel", "divergence"), SOME_KERNELS)
each_target = pytest.mark.parametrize("target", TARGETS)


# The counts below are of the Triton that constraints.txt names. Of 3.5 to 3.9, some kernels take up to 6 % more
# instructions, guards spill up to 80 instead of 72 times, and Hellinger's forward on sm_100 does nine times a row.
PINNED = f"\ntriton=={triton.__version__.split('+')[0]}\n" in (ROOT / "constraints.txt").read_text()
ROOM = 1.0 if PINNED else 1.06


def once_a_row(code: Code) -> bool:
    """Whether all that is kept in memory is a few numbers outside of loops."""
    return code.spills <= 10 and not code.spills_in_loops


def faults(code: Code, student: Tensor, teacher: Tensor) -> list[str]:
    """What is wrong with a kernel, whatever it computes."""
    found = []
    little = code.spills_for_guards() if PINNED else code.spills_for_guards(80) or once_a_row(code)
    if (code.local_bytes or code.spills) and not little:
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


def narrow_access(code: Code, student: Tensor, teacher: Tensor) -> list[str]:
    """What is not 128 bits wide in the loops over whole steps; the narrower of two types may be narrower."""
    wide = {128} if student.dtype == teacher.dtype else {128, 64}
    found = [f"access by bits in a loop: loads {dict(x.loads)}, stores {dict(x.stores)}" for x in code.sweeps
             if not (set(x.loads) <= wide and set(x.stores) <= wide)]  # fmt: skip
    return found if any(128 in x.loads for x in code.sweeps) else ["no loop reads 128 bits", *found]


# Exponentials, logarithms and roots of an entry of both rows, over all sweeps: two exponentials, or 6 where a second
# sweep takes more, 5 in that sweep alone, and what a step pays for its lane.
MOST_MUFU = {"one_sweep": 2.2, "both_kls": 2.3, "two_sweeps": 6.2, "terms": 5.0}


def slow_loops(code: Code, kernel: str, divergence: str) -> list[str]:
    """For bf16: more exponentials than the formulas need, and anything that a thread waits for another one for."""
    found = []
    mufu = sum(loop.pipes["mufu"] * 4 / loop.load_bytes for loop in code.sweeps)
    most = MOST_MUFU["terms" if kernel == "terms" else divergence_class(divergence)]
    if not kernel.startswith("backward") and mufu > most:
        found.append(f"{mufu:.2f} exponentials an entry")
    waits = [(loop.shuffles, loop.barriers) for loop in code.sweeps if loop.shuffles or loop.barriers]
    return found + ([f"(shuffles, barriers) in loops: {waits}"] if waits else [])


def per_entry(code: Code) -> float:
    """Instructions for an entry of both rows in bf16, over all sweeps."""
    return sum(loop.instructions * 4 / loop.load_bytes for loop in code.sweeps)


# The most instructions of an entry of both rows on sm_90 at Qwen's vocabulary.
MOST_INSTRUCTIONS = {
    ("stats", "hellinger"): 17.9, ("kl", "jeffreys"): 21.0,
    ("forward", "forward_kl"): 17.0, ("forward", "reverse_kl"): 17.0, ("forward", "jeffreys"): 21.0,
    ("forward", "jensen_shannon"): 48.0, ("forward", "skew_forward_kl"): 41.0, ("forward", "skew_reverse_kl"): 42.0,
    ("forward", "total_variation"): 34.0, ("forward", "alpha_beta"): 42.0, ("forward", "hellinger"): 19.2,
    ("backward", "forward_kl"): 20.5, ("backward", "reverse_kl"): 16.0, ("backward", "jeffreys"): 21.7,
    ("backward", "jensen_shannon"): 28.0, ("backward", "skew_forward_kl"): 23.0, ("backward", "skew_reverse_kl"): 31.0,
    ("backward", "total_variation"): 20.0, ("backward", "alpha_beta"): 27.0, ("backward", "hellinger"): 23.3,
    ("terms", "jensen_shannon"): 50.0, ("terms", "skew_forward_kl"): 48.0, ("terms", "skew_reverse_kl"): 48.0,
    ("terms", "total_variation"): 37.0, ("terms", "alpha_beta"): 43.0,
}  # fmt: skip


def many_instructions(code: Code, target: str, kernel: str, divergence: str) -> list[str]:
    """More than the bound, which is what was reached, for sm_90."""
    most = MOST_INSTRUCTIONS.get((kernel, divergence), float("inf")) if target == "sm_90" else float("inf")
    return [f"{per_entry(code):.1f} instructions an entry"] if per_entry(code) > ROOM * most else []


def many_registers(code: Code, target: str) -> list[str]:
    """More than half of an SM's warps leave room for."""
    few = TARGETS[target].backend != "cuda" or code.registers <= 64
    return [] if few else [f"{code.registers} registers"]


def crowded(code: Code, target: str) -> list[str]:
    """Less than half of an SM's warps resident; counted for sm_90."""
    few = target == "sm_90" and code.occupancy() < 0.5
    return [f"occupancy {code.occupancy():.3f} at {code.registers} registers"] if few else []


@each_kernel
@each_target
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(BF16, BF16), (FP32, FP32), (BF16, FP32), (FP64, FP64)],
    ids=["bf16", "fp32", "bf16_and_fp32", "fp64"],
)
def test_kernel_compiles_clean(kernel, divergence, student_dtype, teacher_dtype, target):
    student, teacher = logits(QWEN, student_dtype), logits(QWEN, teacher_dtype)
    code = compiled(target, kernel, divergence, student, teacher)
    found = faults(code, student, teacher)
    if student_dtype != FP64:
        found += narrow_access(code, student, teacher)
    if student_dtype == teacher_dtype == BF16:
        found += slow_loops(code, kernel, divergence) + crowded(code, target)
        found += many_instructions(code, target, kernel, divergence)
        found += many_registers(code, target) if kernel != "terms" else []
    assert not found


@each_kernel
@each_target
def test_odd_vocabulary_compiles_clean(kernel, divergence, target):
    """One row right after the other, so that seven of eight rows start off a multiple of 16 bytes."""
    x = logits(GPT2, BF16)
    code = compiled(target, kernel, divergence, x, x)
    found = faults(code, x, x) + narrow_access(code, x, x) + slow_loops(code, kernel, divergence)
    assert not found + crowded(code, target)


@each_kernel
@each_target
def test_rows_that_do_not_start_alike_compile_clean(kernel, divergence, target):
    """Beside a vocabulary of 50,264, no tile is aligned in both rows."""
    student, teacher, whole = logits(GPT2, BF16), logits(GPT2 + 7, BF16), logits(QWEN, BF16)
    code = compiled(target, kernel, divergence, student, teacher)
    found = faults(code, student, teacher) + slow_loops(code, kernel, divergence)
    found += many_registers(code, target) + crowded(code, target)
    assert not found
    if target in ("sm_80", "sm_90"):
        aligned = per_entry(compiled(target, kernel, divergence, whole, whole))
        # An entry's two loads and its store are instructions of their own, 3 for 3/8, and so is taking apart half the
        # pairs that the gradient is rounded in: more than 15 % where an entry takes fewer than 22 instructions.
        more = 3.6 if kernel.startswith("backward") else 0.0
        assert per_entry(code) < ROOM * max(1.15 * aligned, aligned + more)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (logits(GPT2, BF16, length=513)[:, 1:], logits(GPT2, BF16)),
        (logits(GPT2, BF16), logits(GPT2, BF16, batch=1, length=1).expand(2, 512, GPT2)),
        (logits(QWEN_ODD, BF16), logits(QWEN, BF16)),
        (logits(1003, BF16), logits(1003, BF16)),
    ],
    ids=["a view", "one row", "aligned teacher", "short"],
)
@each_target
@pytest.mark.parametrize("kernel", ["stats", "forward", "backward"])
def test_rows_that_cannot_be_read_wide_are_read_together(kernel, student, teacher, target, divergence="reverse_kl"):
    """A wide load of the one row that allows it would spread each lane's entries of the other one."""
    code = compiled(target, kernel, divergence, student, teacher)
    found = faults(code, student, teacher) + slow_loops(code, kernel, divergence) + many_registers(code, target)
    assert not found and all(set(x.loads) == {16} and set(x.stores) <= {16} for x in code.sweeps)


@pytest.mark.parametrize(("kernel", "divergence"), [*SOME_KERNELS, ("kl", "jeffreys")])
@each_target
@pytest.mark.parametrize("vocab", [GPT2, QWEN_ODD])
def test_views_that_start_alike_are_read_wide(kernel, divergence, vocab, target):
    """Without the first token, all rows are shifted by the same number of entries; so is a gradient in place.

    For AMD, the entries are read one by one.
    """
    view = logits(vocab, BF16, length=513)[:, 1:]
    for inplace in (True, False) if kernel.startswith("backward") else (False,):
        code = compiled(target, kernel, divergence, view, view, inplace)
        found = faults(code, view, view) + slow_loops(code, kernel, divergence)
        found += many_registers(code, target) + crowded(code, target)
        if TARGETS[target].backend == "cuda":
            found += narrow_access(code, view, view)
        assert not found


@pytest.mark.parametrize(("kernel", "divergence"), [x for x in KERNELS if x[0] in ("backward", "backward_ce", "terms")])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_views_that_start_alike_take_no_more_than_whole_rows(kernel, divergence, target):
    """At most 4 % more, and total variation beside cross-entropy 7 %."""
    view, whole = logits(GPT2, BF16, length=513)[:, 1:], logits(QWEN, BF16)
    of_view, of_whole = (per_entry(compiled(target, kernel, divergence, x, x)) for x in (view, whole))
    more = 1.07 if (kernel, divergence) == ("backward_ce", "total_variation") else 1.04
    assert of_view <= ROOM * more * of_whole


@some_kernels
@each_target
@pytest.mark.parametrize(("vocab", "dtype"), [(GPT2, FP32), (1003, BF16), (17, FP32)], ids=name_of)
def test_other_vocabularies_compile_clean(kernel, divergence, vocab, dtype, target):
    """An odd one, one shorter than a block, and one for a single warp."""
    x = logits(vocab, dtype)
    assert not faults(compiled(target, kernel, divergence, x, x), x, x)


@some_kernels
@each_target
def test_padded_student_compiles_clean(kernel, divergence, target):
    """A student whose vocabulary is longer than its teacher's has a tail of zero gradients."""
    student, teacher = logits(QWEN_PADDED, FP16), logits(QWEN, FP16)
    assert not faults(compiled(target, kernel, divergence, student, teacher), student, teacher)


@each_target
@pytest.mark.parametrize("kernel", ["stats", "forward", "backward"])
@pytest.mark.parametrize(("vocab", "pad"), [(LLAMA_3, 0), (LLAMA_2, 0), (GPT2, 15), (GPT2, 3), (QWEN, 8)])
def test_every_vocabulary_and_padding_is_read_wide(kernel, vocab, pad, target, divergence="skew_reverse_kl"):
    """Rows a multiple of 32, 16 and 8 bytes apart; the gradient's are contiguous only where the student's are."""
    x = logits(vocab, BF16, pad=pad)
    code = compiled(target, kernel, divergence, x, x)
    assert not faults(code, x, x) + narrow_access(code, x, x)


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
    """Nor does, where rows are aligned, a view without the last token or writing the gradient over the logits.

    Rows of an odd vocabulary have one kernel where all tensors' rows start alike, one where the tensors themselves
    start off an aligned entry, and one where the rows do not start alike, as beside a view of another shape. No batch
    size adds a fourth, nor does the number of tokens that a view leaves out.
    """
    alike, mixed, shifted = [], [], []
    with compiling_for(TARGETS[target]) as launched, mock.patch.object(launches, "wanted_parts", lambda *_: 1):
        for batch, length in [(2, 512), (1, 512), (3, 77), (16, 17), (4, 2), (1, 1)]:
            whole = logits(vocab, BF16, batch, length)
            launch(kernel, divergence, whole, whole)
            launch(kernel, divergence, whole, whole, inplace=True)
            alike += launched
            launched.clear()
            view = logits(vocab, BF16, batch, length + 1)[:, :-1]
            launch(kernel, divergence, view, view)
            launch(kernel, divergence, view, view, inplace=True)
            launch(kernel, divergence, view, whole)
            mixed += launched
            launched.clear()
            for left_out in (1, 3):
                view = logits(vocab, BF16, batch, length + left_out)[:, left_out:]
                launch(kernel, divergence, view, view, inplace=True)
                if batch == 1 or length >= 16 * left_out:  # shorter sequences of a new gradient are not laid out alike
                    launch(kernel, divergence, view, view)
            shifted += launched
            launched.clear()
    assert len({id(k) for k in alike}) == len({id(k) for k in shifted}) == 1
    assert len({id(k) for k in alike + mixed}) == (1 if vocab == QWEN else 2)
    assert len({id(k) for k in alike + mixed + shifted}) == (1 if vocab == QWEN else 3)


# The largest vocabulary of a model whose rows fit the last cache, by the itemsize of both rows together.
FITS = {"sm_80": GPT2, "sm_90": GPT2, "sm_100": QWEN, "gfx942": QWEN}


def resident_warps(code: Code, target: str) -> int:
    """Warps that the registers leave room for on a multiprocessor, whole programs of them."""
    registers = -(-code.registers // 8) * 8
    room = min(64, 65_536 // (32 * registers)) if TARGETS[target].backend == "cuda" else min(32, 4 * (512 // registers))
    return room // code.warps * code.warps


@pytest.mark.parametrize(("kernel", "divergence"), AT_ONCE)
@each_target
@pytest.mark.parametrize("rows", ["whole", "shorter", "odd", "not alike", "fp32"])
def test_divergence_and_gradient_at_once_compile_clean(kernel, divergence, target, rows):
    """And with so many registers that the rows which they leave room for fit three quarters of the cache."""
    vocab = {"whole": FITS[target] // 8 * 8, "shorter": LLAMA_2, "odd": GPT2}.get(rows, LLAMA_2 - 1)
    student, teacher = (logits(vocab + i, FP32 if rows == "fp32" else BF16) for i in (0, rows == "not alike"))
    code = compiled(target, kernel, divergence, student, teacher)
    found = faults(code, student, teacher)
    waits = [(loop.shuffles, loop.barriers) for loop in code.sweeps if loop.shuffles or loop.barriers]
    if rows not in ("not alike", "fp32"):
        found += narrow_access(code, student, teacher)
    assert not found + waits + many_registers(code, target)
    entry_bytes = student.element_size() + teacher.element_size()
    rows_begun = MACHINES[target].processors * resident_warps(code, target) // code.warps
    assert rows_begun * student.shape[-1] * entry_bytes <= 0.75 * MACHINES[target].cache


@each_target
@pytest.mark.parametrize("vocab", [QWEN, GPT2])
def test_scaling_the_gradient_compiles_clean(target, vocab):
    x = logits(vocab, BF16)
    code = compiled(target, "scale", "reverse_kl", x, x)
    assert not faults(code, x, x) + narrow_access(code, x, x) + many_registers(code, target)
    assert not any(loop.shuffles or loop.barriers for loop in code.sweeps)


@each_target
def test_one_kernel_is_launched_where_the_rows_fit_the_cache(target):
    """Each line: the vocabulary, bytes of an entry of both rows, and the warps or None for two kernels."""
    family = TARGETS[target].backend
    expected = {
        "sm_80": [
            (12_800, 4, 8),
            (LLAMA_2, 4, 16),
            (GPT2, 4, 32),
            (LLAMA_2, 8, 32),
            (LLAMA_3, 4, None),
            (GPT2, 8, None),
        ],
        "sm_90": [
            (12_800, 4, 8),
            (LLAMA_2, 4, 16),
            (GPT2, 4, 32),
            (LLAMA_2, 8, 32),
            (LLAMA_3, 4, None),
            (QWEN, 4, None),
        ],
        "sm_100": [(LLAMA_2, 4, 8), (GPT2, 4, 16), (QWEN, 4, 32), (QWEN_PADDED, 4, 32), (LLAMA_3, 8, None)],
        "gfx942": [(12_800, 4, 4), (LLAMA_2, 4, 8), (GPT2, 4, 16), (QWEN, 4, 16), (LLAMA_3, 6, None)],
    }[target]
    for vocab, entry_bytes, warps in expected:
        fewest = 8 if family == "cuda" else 4
        assert warps_that_fit(MACHINES[target], family, vocab * entry_bytes, fewest) == warps, vocab


@pytest.mark.parametrize(("target", "vocab", "kernels"), [("sm_90", GPT2, 1), ("sm_90", QWEN, 2), ("gfx942", QWEN, 1)])
def test_the_launcher_asks_what_fits(target, vocab, kernels):
    x = logits(vocab, BF16)
    with compiling_for(TARGETS[target]) as launched:
        launch("with_gradient", "reverse_kl", x, x)
    assert len(launched) == kernels


def test_a_larger_cache_takes_longer_rows():
    row = QWEN * 4
    for processors, cache, warps in ((132, 50, None), (132, 110, 32), (66, 60, 32), (20, 1000, 8)):
        assert warps_that_fit(Machine(processors, cache * 2**20), "cuda", row, 8) == warps


SCHEDULES = {  # a weight next to 0 has a kernel of its own, on each side
    "jensen_shannon": [JensenShannon(beta) for beta in (1e-3, 0.999, 0.1, 0.3, 0.5, 0.625, 0.9)],
    "skew_reverse_kl": [SkewReverseKL(alpha) for alpha in (0.999, 1e-3, 0.1, 0.3, 0.5, 0.625, 0.9)],
    "alpha_beta": [AlphaBeta(alpha, beta) for alpha in (1e-3, 0.5, 1.0) for beta in (0.3, 1.0)],
}


@pytest.mark.parametrize("kernel", ["forward", "backward", "terms"])
@pytest.mark.parametrize("divergence", SCHEDULES)
def test_a_schedule_of_a_parameter_does_not_recompile(kernel, divergence):
    x = logits(1003, BF16)
    with compiling_for(TARGETS["sm_90"]) as launched:
        for step in SCHEDULES[divergence]:
            launch(kernel, step, x, x)
    assert len({id(k) for k in launched}) == (1 if divergence == "alpha_beta" else 3)
    assert len({id(k) for k in launched[2:]}) == 1


SPLIT = [
    ("stats", "hellinger"),
    ("forward", "jeffreys"),
    ("forward", "skew_reverse_kl"),
    ("backward", "skew_reverse_kl"),
]


@pytest.mark.parametrize(("kernel", "divergence"), SPLIT)
@each_target
@pytest.mark.parametrize("vocab", [QWEN, GPT2])
def test_rows_that_are_split_compile_clean(kernel, divergence, vocab, target):
    """What sweeps a part is as wide as for whole rows, and one kernel for any batch and number of parts.

    The merges compute in fp64, once a row.
    """
    with compiling_for(TARGETS[target]) as launched:
        for parts, length in ((8, 64), (3, 100), (7, 1)):
            x = logits(vocab, BF16, 1, length)
            with mock.patch.object(launches, "wanted_parts", lambda *_, parts=parts: parts):
                launch(kernel, divergence, x, x)
        once = {id(one): one for one in launched}
        codes = {one.metadata.name: read_code(one) for one in once.values()}
    assert len(once) == len(codes) == {"stats": 2, "backward": 1}.get(kernel, 4 if divergence != "jeffreys" else 2)
    for name, code in codes.items():
        found = faults(code, x, x)
        if name.startswith("merge"):
            found = [fault for fault in found if not fault.endswith("in fp64")]
            assert not code.sweeps and not found and code.fp64
        else:
            found += narrow_access(code, x, x) + slow_loops(code, "backward", divergence)
            assert not found + many_registers(code, target) + crowded(code, target), name


def launch_small_kernels(tokens: int, acc: torch.dtype) -> None:
    """The launchers of what takes a few numbers a token: with tensors and numbers, cross-entropy and without."""
    number, mask = torch.empty(1, tokens, dtype=acc, device="meta"), torch.empty(1, tokens, device="meta").bool()
    scalar, exact = torch.empty((), dtype=acc, device="meta"), torch.empty((), dtype=FP64, device="meta")
    steps, rows = torch.empty((), dtype=torch.int64, device="meta"), logits(1003, BF16, 1, tokens)
    token_choice.choose_tokens_fwd(number, mask, exact, 0.5, 1.0, steps)
    token_choice.choose_tokens_fwd(number, mask, 0.5, 0.5, 1.0, None)
    token_choice.focus_step_over(scalar, exact, exact, exact, steps, 10, 0.9, 0.05, 0.05, 0.1)
    loss_sums.token_cross_entropy_fwd(rows, rows, mask.long(), mask, number.expand(4, 1, tokens))
    places = torch.empty(tokens, dtype=torch.int64, device="meta")
    for of_labels in ((rows[..., 0].contiguous(), mask.long()), (None, None)):
        spread_statistics.spread_statistics_fwd(number, number.expand(4, 1, tokens), places, 3 * tokens, *of_labels, 9)
    for ce, ce_mask, n in ((number, mask, scalar), (None, None, None)):
        loss_sums.loss_sums_fwd(number, number, scalar, ce, n, 0.3)
        loss_sums.loss_sums_fwd(number, number, scalar, ce, n, 0.3, places, 3 * tokens)
        loss_sums.loss_weights_fwd(None, scalar, number, mask, scalar, ce, ce_mask, n, 0.3)


@each_target
@pytest.mark.parametrize("acc", [FP32, FP64], ids=name_of)
def test_small_kernels_compile_clean_and_for_every_batch(target, acc):
    with compiling_for(TARGETS[target]) as launched:
        launch_small_kernels(8192, acc)
        once = {id(kernel) for kernel in launched}
        for tokens in (2050, 4112, 65536):
            launch_small_kernels(tokens, acc)
        codes = [read_code(kernel) for kernel in launched[: len(once)]]
    assert len(codes) == 12 and not any(code.spills or code.local_bytes or code.atomics for code in codes)
    assert {id(kernel) for kernel in launched} == once


def test_every_launch_fuses_multiply_adds_whatever_the_default(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    x = logits(1003, BF16)
    with compiling_for(TARGETS["sm_90"]) as launched:
        launch_small_kernels(2050, FP32)
        for kernel in ("stats", "kl", "forward", "terms", "backward"):
            launch(kernel, "jensen_shannon", x, x)
        assert all(kernel.metadata.enable_fp_fusion for kernel in launched) and len(launched) == 17
        add_atomically[(1,)](torch.empty(32, device="meta"))
    assert not launched[-1].metadata.enable_fp_fusion


# The checks above mean something only if the helper sees what they look for.


@each_target
def test_helper_sees_a_spill(target):
    """128 entries of each row for a thread do not fit into its registers."""
    x = logits(65_536, FP32)
    warps = 128 // TARGETS[target].warp_size
    too_much = {"TILES": 2, "LANES": 128, "VEC": 128, "WIDTH": 128, "SKEWED": False, "lead": None, "num_warps": warps}
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
    """The rows of an odd vocabulary, apart in one tensor and one after the other in the next, do not start alike."""
    student, teacher = logits(GPT2, BF16), logits(GPT2, BF16, pad=15)
    code = compiled(target, "backward", "hellinger", student, teacher)
    assert code.loads[16]
    assert code.stores[16]
    assert narrow_access(code, student, teacher)


@triton.jit
def sum_block_by_block(X, Y, N: tl.constexpr):
    total = 0.0
    for start in range(0, N, 1024):
        x = tl.load(X + start + tl.arange(0, 1024))
        total += tl.sum(tl.exp2(x) + tl.exp2(0.5 * x) + tl.exp2(0.25 * x), 0)
    tl.store(Y, total)


@each_target
def test_helper_sees_what_a_loop_waits_for_and_its_exponentials(target):
    x = torch.empty(65_536, device="meta")
    with compiling_for(TARGETS[target]) as launched:
        sum_block_by_block[(1,)](x, x, N=65_536)
    code = read_code(launched[0])
    (loop,) = code.sweeps
    assert loop.barriers and loop.shuffles
    assert loop.pipes["mufu"] * 4 / loop.load_bytes == 3
    assert len(slow_loops(code, "forward", "reverse_kl")) == 2


def test_helper_sees_few_resident_warps():
    x = logits(GPT2, FP64)
    code = compiled("sm_90", "forward", "skew_reverse_kl", x, x)
    assert crowded(code, "sm_90")


@each_target
def test_helper_sees_a_recompilation(target):
    with compiling_for(TARGETS[target]) as launched:
        for vocab in (QWEN, QWEN, 32_000):
            launch("stats", "hellinger", logits(vocab, BF16), logits(vocab, BF16))
    assert launched[0] is launched[1]
    assert launched[1] is not launched[2]
