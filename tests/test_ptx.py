"""The compiled kernels, executed: the PTX of each of the package's own launches for sm_90 gives the reference's values.

The launchers get CPU tensors; where a launch would go to the GPU, its PTX runs in `ptx_simulator`, which also reports
races, undefined values and accesses outside the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from .conftest import INTERPRETING

pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")
if INTERPRETING:
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled in this process", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from adakd_kernels import ops, reference
from adakd_kernels.adaptive import focus_step, token_choice
from adakd_kernels.divergences import AlphaBeta, JensenShannon, SkewReverseKL, TotalVariation, get_divergence
from adakd_kernels.kernels import launch
from adakd_kernels.kernels.loss_sums import loss_sums_fwd
from adakd_kernels.kernels.mixture import reciprocal_polynomial
from adakd_kernels.kernels.scale_gradient import scale_gradient
from adakd_kernels.kernels.spread_statistics import spread_statistics_fwd
from adakd_kernels.kernels.token_choice import choose_tokens_fwd, focus_step_over
from adakd_kernels.kernels.token_divergence import token_divergence_bwd, token_divergence_fwd
from adakd_kernels.kernels.token_kl import token_kl_fwd
from adakd_kernels.kernels.token_stats import token_stats_fwd
from adakd_kernels.kernels.token_terms import token_terms_fwd
from adakd_kernels.kernels.with_gradient import token_divergence_with_gradient_over
from adakd_kernels.reference import GradientCall, Normalizers
from instruments import ptx_simulator
from instruments.compiled import TARGETS, compiling_for
from instruments.memory import guarded
from instruments.ptx_simulator import PtxError

from .cases import ONE_OF_EACH, assert_close_as_eager, logits, name_of, temperatures, tokens

pytestmark = pytest.mark.compile

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Several whole blocks and a masked one, so that a block meets what the one before left in shared memory; and one short
# enough for a single warp.
LONG, SHORT = 8209, 33
# A mass is 2 to the power of some −16, so half a unit of rounding in the exponent is some 16 units of the mass. Eager
# rounds at other places, and over few rows its largest error is a matter of luck.
EXPONENT_ULPS = 16.0


def as_compiled(ptx: str) -> str:
    return ptx


@contextmanager
def executing(edit: Callable[[str], str] = as_compiled) -> Iterator[list[str]]:
    """Inside, a launch compiles for sm_90 and its PTX runs on the CPU, after `edit`; the list takes each PTX."""
    executed: list[str] = []
    with compiling_for(TARGETS["sm_90"]) as launched:
        compile_only = JITFunction.run

        def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compile_only(self, *args, grid=grid, warmup=warmup, **kwargs)
            kernel = launched[-1]
            named = dict(zip(self.arg_names, args, strict=False)) | kwargs
            arguments = [named[name] for name, type_ in kernel.src.signature.items() if type_ != "constexpr"]
            executed.append(kernel.asm["ptx"])
            ptx_simulator.run(edit(kernel.asm["ptx"]), grid, arguments, kernel.metadata.shared)

        with mock.patch.object(JITFunction, "run", run):
            yield executed


@triton.jit
def reciprocals(X, Y):
    at = tl.arange(0, 1024)
    tl.store(Y + at, reciprocal_polynomial(tl.load(X + at)))


def test_the_reciprocal_of_blackwell_is_one():
    """Of every power of two that a mixture can be, and of numbers between them."""
    x = torch.exp2(torch.linspace(-40.0, 101.0, 1024))
    x[:141] = torch.exp2(torch.arange(-40.0, 101.0))
    x[-1] = math.nan
    y = torch.empty(1024)
    with executing():
        reciprocals[(1,)](x, y)
    assert (y[:-1].double() * x[:-1] - 1.0).abs().max() < 2e-7 and y[-1].isnan()


@pytest.mark.parametrize("size", [150, 4500])
def test_the_choice_of_tokens_and_the_sums_of_the_loss_are_the_reference(size):
    """More tokens than a tile has, and fewer; many are as hard as others."""
    gen = torch.Generator().manual_seed(size)
    difficulty, d, ce = (torch.rand(1, size, generator=gen) for _ in range(3))
    difficulty[0, ::3] = 0.5
    valid, share = torch.rand(1, size, generator=gen) < 0.8, torch.tensor(0.3, dtype=FP64)
    with executing():
        selected, *numbers = choose_tokens_fwd(difficulty, valid, share, 0.5, 1.0, None)
        _, *of_numbers = choose_tokens_fwd(difficulty, valid, 0.29, 0.5, 1.0, 11)
        sums = loss_sums_fwd(d, numbers[0], numbers[2], ce, numbers[1], 0.3)
    chosen, *expected = token_choice(difficulty, valid, share, 0.5, 1.0, None)
    expected += token_choice(difficulty, valid, 0.29, 0.5, 1.0, 11)[1:]
    expected += ops.loss_sums(d, expected[0], expected[2], ce, expected[1], 0.3)
    assert torch.equal(selected, chosen)
    for found, exact in zip((*numbers, *of_numbers, *sums), expected, strict=True):
        assert torch.allclose(found, exact, rtol=1e-6)


@pytest.mark.parametrize("size, batch", [(1, 5), (1200, 2500)])
def test_spread_statistics_are_the_reference(size, batch):
    gen = torch.Generator().manual_seed(size)
    positions = torch.randperm(batch, generator=gen)[:size].sort().values
    difficulty, logit = torch.rand(2, 1, size, generator=gen)
    bundle, labels = torch.rand(4, 1, size, generator=gen), torch.randint(20, (1, size), generator=gen)
    bundle[1, :, ::5], labels[:, ::7] = 0.0, 20
    args = (difficulty, bundle, positions, batch, logit.bfloat16(), labels, 20)
    with executing():
        found = spread_statistics_fwd(*args)
    for ours, exact in zip(found, ops.spread_statistics(*args), strict=True):
        assert torch.allclose(ours.double(), exact.double(), rtol=1e-6, equal_nan=True)


def test_a_step_of_the_share_is_the_reference():
    state, options = [torch.tensor(x, dtype=FP64) for x in (0.9, 2.0, 3.0)], (3, 0.9, 0.05, 0.05, 0.1)
    expected = focus_step(torch.tensor(1.5), *state, torch.tensor(5), *options)
    steps = torch.tensor(5)
    with executing():
        focus_step_over(torch.tensor(1.5), *state, steps, *options)
    assert [x.item() for x in (*state, steps)] == pytest.approx([x.item() for x in expected], rel=1e-15)


def pair(vocab, dtype, teacher_dtype=None, teacher_vocab=None, batch=1, length=3):
    """Student and teacher in guard rows and columns, with an entry of −inf in each."""
    student = guarded(logits(batch, length, vocab, dtype=dtype, seed=1))
    teacher = guarded(logits(batch, length, teacher_vocab or vocab, dtype=teacher_dtype or dtype, seed=2))
    student[0, 0, 5], teacher[0, 0, 11] = -torch.inf, -torch.inf
    return student, teacher


def stats(student, teacher, mask):
    """Difficulty and the logarithms of both normalisers of the valid tokens: kernel, eager, exact."""
    difficulty, normalizers_1 = token_stats_fwd(student, teacher, mask)
    of = Normalizers.of(normalizers_1)
    assert torch.equal(difficulty[~mask], torch.zeros_like(difficulty[~mask]))
    s, t = student.to(difficulty.dtype), teacher.to(difficulty.dtype)
    vocab = min(s.shape[-1], t.shape[-1])
    s, t = s[..., :vocab], t[..., :vocab]
    return [
        (
            difficulty[mask],
            reference.squared_hellinger(s, t)[mask],
            reference.squared_hellinger(s.double(), t.double())[mask],
        ),
        ((of.max_s + of.sum_s.log())[mask], s.logsumexp(-1)[mask], s.double().logsumexp(-1)[mask]),
        ((of.max_t + of.sum_t.log())[mask], t.logsumexp(-1)[mask], t.double().logsumexp(-1)[mask]),
    ]


def forward_and_backward(student, teacher, mask, divergence, with_ce=False, inplace=False, at_once=False):
    """Divergence and gradient: kernel, eager, exact. The masked tokens have weight 0, but a weight of CE."""
    div = get_divergence(divergence)
    tau, weight = temperatures(*mask.shape), torch.linspace(-1.0, 2.0, mask.numel()).view(mask.shape) * mask
    s, t = student.clone(), teacher.clone()
    labels = tokens(min(s.shape[-1], t.shape[-1]), *mask.shape)
    ce_weight = torch.linspace(0.5, 1.5, mask.numel()).view(mask.shape)
    cross_entropy = (None,) * 3
    if with_ce:
        both = reference.common_vocabulary(s, t)
        normalizers_1 = torch.stack([x for z in both for x in reference.normalizer(z)])
        cross_entropy = (labels, ce_weight, normalizers_1)
    out = student if inplace else torch.full_like(student, torch.nan)
    of_forward = (student, teacher, tau, mask, div.name, *div.parameters)
    if at_once:
        d, *_ = token_divergence_with_gradient_over(out, *of_forward, weight, *cross_entropy)
    else:
        d, *saved = token_divergence_fwd(*of_forward)
        args = (tau, weight, *saved, *cross_entropy, div.name, *div.parameters)
        token_divergence_bwd(GradientCall(student, teacher, *args), out)

    def gradient(z_s, z_t):
        grad = torch.zeros_like(z_s, dtype=torch.promote_types(z_s.dtype, torch.float32))
        grad[mask] = reference.token_divergence_grad(
            z_s[mask].to(grad.dtype), z_t[mask], tau[mask].to(grad.dtype), div, weight[mask].to(grad.dtype)
        )
        if with_ce:
            grad += ce_weight.unsqueeze(-1) * reference.cross_entropy_grad(z_s, z_t, labels)
        return grad

    def value(z_s, z_t):
        return reference.token_divergence(z_s, z_t, tau, div)[mask]

    assert torch.equal(d[~mask], torch.zeros_like(d[~mask]))
    if not with_ce:
        assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
    return [
        (d[mask], value(s, t), value(s.double(), t.double())),
        (out.contiguous(), gradient(s, t).to(s.dtype), gradient(s.double(), t.double())),
    ]


MASK = torch.tensor([[True, False, True]])


@pytest.mark.parametrize("vocab", [LONG, SHORT])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=name_of)
def test_statistics_are_the_reference(vocab, dtype):
    with executing():
        results = stats(*pair(vocab, dtype), MASK)
    for result in results:
        assert_close_as_eager(*result)


@pytest.mark.parametrize(
    ("divergence", "dtype", "skewed"),
    [
        ("jeffreys", BF16, True),
        ("hellinger", FP32, False),
        ("skew_reverse_kl", BF16, True),
        ("jensen_shannon", FP64, False),
    ],
)
def test_split_rows_are_the_reference(divergence, dtype, skewed):
    """Rows in parts and their merges, of which each launch runs on what the one before has written."""
    vocab, mask = LONG if dtype == BF16 else 2501, torch.tensor([[True, False]])
    student, teacher = pair(vocab, dtype, length=2)
    if skewed:  # rows that lie one right after the other, and start alike
        student, teacher = student.clone(), teacher.clone()
    with executing() as executed, mock.patch.object(launch, "wanted_parts", lambda *_: 3):
        results = stats(student, teacher, mask)
        results += forward_and_backward(student, teacher, mask, divergence, inplace=True)
        config = launch.launch_config("forward", divergence, vocab, student, teacher)
    assert config["SKEWED"] == skewed and len(executed) == (5 if divergence in ("jeffreys", "hellinger") else 7)
    for result in results:
        assert_close_as_eager(*result, ulps=EXPONENT_ULPS)


@pytest.mark.parametrize(("vocab", "dtype"), [(LONG, BF16), (SHORT, FP64)], ids=name_of)
def test_both_kls_are_the_reference(vocab, dtype):
    student, teacher = pair(vocab, dtype)
    tau = temperatures(1, 3)
    with executing():
        *numbers, normalizers, peak, forward_grad, reverse_grad = token_kl_fwd(student, teacher, tau, MASK)
    acc = forward_grad.dtype
    eager, exact = (
        reference.kl_sums(student[MASK].to(x), teacher[MASK].to(x), tau[MASK]) for x in (acc, torch.float64)
    )
    assert torch.equal(peak, exact.peak.new_full((1, 3), -1).masked_scatter(MASK, exact.peak))
    found = [*numbers, *normalizers[1::2], forward_grad, reverse_grad]
    eager, exact = ([*x[:4], *x.normalizers[1::2], *x[6:]] for x in (eager, exact))
    for ours, other, truth in zip(found, eager, exact, strict=True):
        assert_close_as_eager(ours[MASK], other, truth, ulps=EXPONENT_ULPS)
    lost = numbers[3][MASK]
    assert lost[0] > 0.0 and lost[1] == 0.0


@pytest.mark.parametrize(
    ("vocab", "dtype", "teacher_dtype"),
    [(LONG, BF16, BF16), (2501, FP32, FP32), (SHORT, BF16, FP32), (600, FP64, FP64)],
    ids=name_of,
)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_divergence_and_gradient_are_the_reference(divergence, vocab, dtype, teacher_dtype):
    with executing():
        results = forward_and_backward(*pair(vocab, dtype, teacher_dtype), MASK, divergence)
    for result in results:
        assert_close_as_eager(*result, ulps=EXPONENT_ULPS)


@pytest.mark.parametrize(
    ("divergence", "vocab", "dtype", "teacher_dtype"),
    [(JensenShannon(), LONG, BF16, BF16), (SkewReverseKL(), 2501, FP32, FP32), (AlphaBeta(), SHORT, BF16, FP32),
     (TotalVariation(), 600, FP64, FP64)],
    ids=name_of,
)  # fmt: skip
def test_terms_of_a_part_are_the_reference(divergence, vocab, dtype, teacher_dtype):
    """With the normalisers and the c of longer rows; the last token's peak is in the part."""
    student, teacher = pair(vocab, dtype, teacher_dtype)
    acc = reference.accumulation_dtype(student, teacher)
    of = torch.stack(reference.token_sums(student.double(), teacher.double(), 0.8, divergence).normalizers)
    of[1::2] *= 1.5
    numbers = [temperatures(1, 3), of, torch.tensor([[0.3, 0.0, -0.4]], dtype=torch.float64)]
    tau, of, c = (x.to(acc) for x in numbers)
    peak = torch.tensor([[-1, 0, student[0, 2].argmax()]])
    with executing():
        found = token_terms_fwd(student, teacher, tau, MASK, of, c, peak, divergence.name, *divergence.parameters)

    def terms(dtype):
        s, t, *numbers = (x.to(dtype) for x in (student, teacher, tau, c))
        of_rows = Normalizers.of(of.to(dtype))
        return reference.token_terms(s, t, numbers[0], of_rows, numbers[1], peak, divergence)

    for x, eager, exact in zip(found, terms(acc), terms(FP64), strict=True):
        assert_close_as_eager(x[MASK], eager[MASK], exact[MASK], ulps=EXPONENT_ULPS)
        assert not x[~MASK].any()


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(LONG, LONG - 40), (301, 4501)])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_backward_with_cross_entropy_in_place_is_the_reference(divergence, vocab, teacher_vocab):
    """The vocabularies differ, so the gradient has a tail of zeros where the student's is the longer one."""
    student, teacher = pair(vocab, BF16, teacher_vocab=teacher_vocab)
    around = student._base.isnan()
    with executing():
        results = forward_and_backward(student, teacher, MASK, divergence, with_ce=True, inplace=True)
    for result in results:
        assert_close_as_eager(*result, ulps=EXPONENT_ULPS)
    assert torch.equal(student._base.isnan(), around)
    assert torch.equal(student[..., teacher_vocab:], torch.zeros_like(student[..., teacher_vocab:]))


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize(("vocab", "inplace"), [(LONG, True), (LONG, False), (SHORT, True)])
def test_divergence_and_gradient_at_once_are_the_reference(divergence, vocab, inplace):
    """One launch of one kernel, with cross-entropy."""
    student, teacher = pair(vocab, BF16)
    with executing() as executed:
        results = forward_and_backward(student, teacher, MASK, divergence, True, inplace, at_once=True)
        assert len(executed) == 1
    for result in results:
        assert_close_as_eager(*result, ulps=EXPONENT_ULPS)


@pytest.mark.parametrize("vocab", [LONG, SHORT])
def test_a_gradient_is_scaled(vocab):
    gradient, weights = guarded(logits(1, 3, vocab, dtype=BF16)), torch.tensor([[[1.0, 0.0, 2.0]], [[0.0, 0.0, 1.0]]])
    expected = torch.where(torch.tensor([[[True], [False], [True]]]), gradient.float() * 0.375, gradient.float())
    with executing():
        scale_gradient(gradient, weights, torch.tensor(1.5), torch.tensor(4.0))
        scale_gradient(gradient, weights, torch.tensor(4.0), torch.tensor(4.0))
    assert torch.equal(gradient, expected.to(BF16))


def test_two_runs_agree_bit_for_bit():
    """Nothing undefined reaches a result, whatever lies in memory that a kernel is about to write."""
    student, teacher = pair(LONG, BF16)
    with executing():
        first, second = (forward_and_backward(student, teacher, MASK, "skew_reverse_kl") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
def test_rows_beyond_two_to_the_31_entries_are_found(dtype):
    """Three rows, 2³⁰ entries apart in address space that no page backs."""
    far = 2**30
    rows = torch.empty(2 * far + LONG, dtype=dtype).as_strided((3, 1, LONG), (far, far, 1))
    teacher = logits(3, 1, LONG, dtype=dtype, seed=2)
    rows.copy_(logits(3, 1, LONG, dtype=dtype, seed=1))
    mask = torch.ones(3, 1, dtype=torch.bool)
    with executing():
        for one, other in ((rows, teacher), (teacher, rows)):
            for result in stats(one, other, mask):
                assert_close_as_eager(*result)
        for result in forward_and_backward(rows, teacher, mask, "jensen_shannon", inplace=True):
            assert_close_as_eager(*result)


# The results above mean something only if the simulator sees what it looks for.


def without_line(ptx: str, number: int, what: str) -> str:
    """The PTX without the n-th line that holds `what`."""
    lines = ptx.splitlines()
    del lines[[i for i, line in enumerate(lines) if what in line][number]]
    return "\n".join(lines)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_each_missing_barrier_is_a_race(divergence):
    div = get_divergence(divergence)
    student, teacher = pair(LONG, BF16, length=1)
    removed = []

    def edit(ptx):
        return without_line(ptx, removed[-1], "bar.sync") if removed else ptx

    def launch():
        one = torch.ones(1, 1)
        token_divergence_fwd(student, teacher, one, one.bool(), div.name, *div.parameters)

    with executing(edit) as executed:
        launch()
        barriers = executed[0].count("bar.sync")
        assert barriers > 10
        for number in range(barriers):
            removed.append(number)
            with pytest.raises(PtxError, match="race"):
                launch()


def test_shared_memory_that_nobody_wrote_is_found():
    with pytest.raises(PtxError, match="undefined"), executing(lambda ptx: without_line(ptx, 0, "st.shared")):
        stats(*pair(LONG, BF16), MASK)


def test_a_register_that_nobody_wrote_is_found():
    """The value that masked lanes take in place of a load."""
    with pytest.raises(PtxError, match="undefined"), executing(lambda ptx: without_line(ptx, 0, "mov.b16")):
        stats(*pair(SHORT, BF16), MASK)


@triton.jit
def row_maxima(X, Y, stride, V, BLOCK_V: tl.constexpr, FAULT: tl.constexpr):
    n = tl.program_id(0)
    if FAULT != "int32":
        n = n.to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    x = tl.load(X + n * stride + offs_v, mask=(offs_v <= V) if FAULT == "mask" else (offs_v < V), other=-float("inf"))
    tl.store(Y + n, tl.max(x, 0))


@pytest.mark.parametrize("fault", ["none", "mask", "int32"])
def test_out_of_bounds_and_int32_overflow_are_found(fault):
    far = 2**30 + 1
    x = torch.empty(2 * far + 301).as_strided((3, 301), (far, 1))
    x.copy_(logits(3, 301))
    y = torch.full((3,), torch.nan)

    def launch():
        with executing():
            row_maxima[(3,)](x, y, far, 301, BLOCK_V=512, FAULT=fault)

    if fault == "none":
        launch()
        assert torch.equal(y, x.amax(-1))
    else:
        with pytest.raises(PtxError, match="in 3 threads" if fault == "mask" else "first in block 2"):
            launch()


def test_a_barrier_that_some_threads_miss_is_found():
    """A branch around it, as a barrier inside a condition on the thread would be."""

    def edit(ptx):
        skip = "setp.lt.u32 %pskip, %rskip, 7;\n@%pskip bra $SKIP;\nbar.sync 0;\n$SKIP:\n"
        ptx = ptx.replace("bar.sync \t0;", skip, 1)
        return ptx.replace(
            "\t.reg .pred", "\t.reg .pred %pskip;\n.reg .b32 %rskip;\nmov.u32 %rskip, %tid.x;\n\t.reg .pred", 1
        )

    with pytest.raises(PtxError, match=r"never reach|race"), executing(edit):
        stats(*pair(LONG, BF16), MASK)


def test_an_unknown_instruction_is_no_guess():
    with pytest.raises(NotImplementedError, match="ex3"), executing(lambda ptx: ptx.replace("ex2.", "ex3.")):
        stats(*pair(SHORT, BF16), MASK)
