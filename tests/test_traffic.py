"""What the kernels ask of memory, counted in the interpreter: the formula of the README, byte for byte.

U is one pass over the (B, L, V) logits. The statistics read 2U of the valid rows, the divergence 2U of the selected
rows (4U where it takes two sweeps), the backward 2U of the selected rows, and it writes the gradient, 1U, where
unselected rows are zeros. A divergence reads again what one lane met of a row, 1/LANES of it: of the student once for
its peak, and of both rows for the sums beside the peak, once a sweep; and the teacher's logit there, once a sweep.

Divergence and backward are one kernel here, so that of the looks at a row only the first has to come from memory:
(2r + 3)·U, where the cache holds the rows of the programs that run at a time.
"""

from __future__ import annotations

import pytest
import torch

from adakd_kernels import adakd_loss, ops, token_divergence
from instruments.devices import produced

from .cases import ONE_OF_EACH, TWO_SWEEPS, logits, name_of, temperatures, tokens
from .conftest import INTERPRETING

if not INTERPRETING:
    pytest.skip("counts in Triton's interpreter: start with TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from adakd_kernels.divergences import get_divergence
from adakd_kernels.kernels.launch import launch_config
from instruments.memory import guarded
from instruments.traffic import counting

pytestmark = pytest.mark.interpret

each_divergence = pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
new_or_inplace = pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
BF16 = torch.bfloat16


def fresh(student):
    """A student whose gradient can take its place: the result of an operator, not a leaf."""
    return produced(student.detach().requires_grad_())


def entries_of_a_lane(student, teacher, peak, divergence):
    """How many entries of a row the lane meets that meets the entry `peak`."""
    vocab = min(student.shape[-1], teacher.shape[-1])
    config = launch_config("forward", divergence.name, vocab, student, teacher)
    lanes, width = config["LANES"], config["WIDTH"]
    return int((torch.arange(vocab) // width % lanes == peak // width % lanes).sum())


def read_again(student, teacher, rows, divergence):
    """Bytes that a divergence reads of some rows beside its sweeps; the rows are short, so that no lane is skewed."""
    sweeps = divergence.sweeps
    size_s, size_t = student.element_size(), teacher.element_size()
    total = 0
    for peak in student[rows].double().nan_to_num(-torch.inf).argmax(-1).tolist():
        entries = entries_of_a_lane(student, teacher, peak, divergence)
        total += (sweeps + 1) * entries * size_s + sweeps * (entries * size_t + size_t)
    return total


def loss_and_gradient(student, teacher, labels, share, divergence, inplace=False, ce_weight=0.0):
    """(result, gradient in the student, traffic) of a forward and a backward."""
    student = fresh(student)
    with counting() as traffic:
        out = adakd_loss(
            student, teacher, labels, focus_ratio=share, divergence=divergence, inplace=inplace, ce_weight=ce_weight
        )
        (grad,) = torch.autograd.grad(out.loss, student)
    return out, grad, traffic


@each_divergence
@new_or_inplace
@pytest.mark.parametrize("vocab", [1003, 4112])
def test_bytes_are_those_of_the_formula(divergence, inplace, vocab):
    student, teacher = logits(2, 4, vocab, dtype=BF16, seed=1), logits(2, 4, vocab, dtype=BF16, seed=2)
    unit = student.numel() * student.element_size()
    for share in (0.25, 1.0):
        out, _, traffic = loss_and_gradient(student.clone(), teacher, tokens(vocab, 2, 4), share, divergence, inplace)
        assert out.selected.sum() == 8 * share
        again = read_again(student, teacher, out.selected, divergence)
        assert again < 0.1 * share * unit
        assert sum(traffic.passes()) == (2 + 2 * divergence.sweeps) * share * unit + 3 * unit + again
        assert traffic.first_looks() + traffic.passes()[1] == (2 * share + 3) * unit
        # Between two looks at an entry, a program touches its two rows, and the new one of the gradient up to there.
        row = vocab * student.element_size()
        (both,) = (launch for launch in traffic if launch.kernel == "token_divergence_with_gradient_kernel")
        assert row < both.distance < (2 if inplace else 3) * row
        assert not traffic.faults()


@new_or_inplace
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_backward_reads_the_gradient_only_if_it_changes_it(inplace, factor):
    """And then only the rows that are no zeros."""
    student, teacher = logits(2, 4, 1003, dtype=BF16, seed=1), logits(2, 4, 1003, dtype=BF16, seed=2)
    leaf = fresh(student)
    loss = adakd_loss(leaf, teacher, tokens(1003, 2, 4), focus_ratio=0.5, inplace=inplace).loss
    with counting() as traffic:
        (loss * factor).backward()
    rows = 0 if factor == 1.0 else 4
    assert [launch.kernel for launch in traffic] == ["scale_gradient_kernel"]
    assert traffic.passes() == (rows * 1003 * 2, rows * 1003 * 2)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_numbers_of_a_token_do_not_grow_with_the_vocabulary(divergence):
    found = []
    for vocab in (301, 1003):
        student, teacher = logits(2, 4, vocab, seed=1), logits(2, 4, vocab, seed=2)
        *_, traffic = loss_and_gradient(student, teacher, tokens(301, 2, 4), 0.5, divergence)
        found.append(traffic.per_token())
    assert found[0] == found[1] > 0


@each_divergence
@new_or_inplace
def test_ignored_and_unselected_rows_cost_their_zeros(divergence, inplace):
    """They are not read: NaN in an ignored row is not seen, and the bytes are those of the other rows."""
    vocab = 1003
    student, teacher = logits(2, 4, vocab, dtype=BF16, seed=1), logits(2, 4, vocab, dtype=BF16, seed=2)
    labels = tokens(vocab, 2, 4)
    labels[0, 1], labels[1, 3] = -100, -100
    student[labels == -100], teacher[labels == -100] = torch.nan, torch.nan
    row = vocab * student.element_size()
    out, grad, traffic = loss_and_gradient(student, teacher, labels, 0.5, divergence, inplace)
    assert out.selected.sum() == 3 and not (out.selected & (labels == -100)).any()
    statistics, forward = 2 * 6, 2 * divergence.sweeps * 3
    again = read_again(student, teacher, out.selected, divergence)
    assert traffic.passes() == ((statistics + forward + 2 * 3) * row + again, 8 * row)
    assert torch.equal(grad[~out.selected], torch.zeros(5, vocab, dtype=BF16))
    assert grad[out.selected].any(-1).all() and not traffic.faults()


@new_or_inplace
def test_cross_entropy_reads_the_valid_rows_in_the_backward_only(inplace):
    """In the forward, one logit of a token is read for it: that of the label."""
    vocab = 1003
    student, teacher, labels = logits(2, 4, vocab, seed=1), logits(2, 4, vocab, seed=2), tokens(vocab, 2, 4)
    labels[0, 1], labels[1, 3] = -100, -100
    out, grad, traffic = loss_and_gradient(student, teacher, labels, 0.5, "reverse_kl", inplace, ce_weight=0.3)
    assert out.selected.sum() == 3
    again = read_again(student, teacher, out.selected, get_divergence("reverse_kl"))
    labels_logits = 6 * 4
    assert traffic.passes() == ((2 * 6 + 2 * 3 + 2 * 6) * vocab * 4 + again + labels_logits, 8 * vocab * 4)
    assert grad[labels != -100].any(-1).all() and not traffic.faults()


@each_divergence
@pytest.mark.parametrize("teacher_vocab", [1003, 1019, 517])
def test_nothing_outside_a_tensor_is_touched(divergence, teacher_vocab):
    """Rows and columns of NaN around every row change no bit of a result, and stay what they are."""
    student, teacher = logits(2, 3, 1003, dtype=BF16, seed=3), logits(2, 3, teacher_vocab, dtype=BF16, seed=4)
    labels = tokens(500, 2, 3)
    labels[1, 0] = -100
    expected, expected_grad, _ = loss_and_gradient(student, teacher, labels, 0.6, divergence, ce_weight=0.2)
    for inplace in (False, True):
        inside = guarded(student)
        out, grad, traffic = loss_and_gradient(inside, guarded(teacher), labels, 0.6, divergence, inplace, 0.2)
        assert not traffic.faults()
        for result, value in zip((*out, grad), (*expected, expected_grad), strict=True):
            assert torch.equal(result, value)
        around = inside._base.isnan()
        inside.fill_(torch.nan)
        assert around.sum() == inside._base.numel() - inside.numel() and inside._base.isnan().all()


def test_both_kls_read_a_row_once():
    student, teacher = guarded(logits(1, 3, 1003, dtype=BF16)), guarded(logits(1, 3, 1019, dtype=BF16, seed=1))
    mask = torch.tensor([[True, False, True]])
    student[~mask], teacher[~mask] = torch.nan, torch.nan
    with counting() as traffic:
        found = ops.token_kl(student, teacher, temperatures(1, 3), mask)
    assert not any(x.isnan().any() for x in found)
    again = read_again(student, teacher, mask, get_divergence("jeffreys"))
    assert traffic.passes() == (2 * 2 * 1003 * 2 + again, 0) and not traffic.faults()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=name_of)
def test_other_types_and_the_operators_alone(dtype):
    student, teacher = guarded(logits(1, 3, 133, dtype=dtype)), guarded(logits(1, 3, 133, dtype=dtype, seed=1))
    mask = torch.tensor([[True, False, True]])
    with counting() as traffic:
        ops.token_stats(student, teacher, mask)
        leaf = fresh(student)
        token_divergence(leaf, teacher, temperatures(1, 3), "skew_reverse_kl", mask).sum().backward()
    row = 133 * student.element_size()
    again = read_again(student, teacher, mask, get_divergence("skew_reverse_kl"))
    assert traffic.passes() == ((2 * 2 + 4 * 2 + 2 * 2) * row + again, 3 * row)
    assert not traffic.faults()


@pytest.mark.parametrize("divergence", TWO_SWEEPS, ids=name_of)
@pytest.mark.parametrize("teacher_vocab", [1003, 517])
def test_a_part_is_read_once(divergence, teacher_vocab):
    """Of the rows that are neither masked nor empty as a whole, wherever the peak is."""
    student, teacher = guarded(logits(2, 3, 1003, dtype=BF16)), guarded(logits(2, 3, teacher_vocab, dtype=BF16, seed=1))
    mask, of = torch.tensor([[True, False, True], [True, True, True]]), torch.ones(4, 2, 3)
    of[1, 0, 2], of[3, 1, 0] = 0.0, 0.0
    number, peak = torch.ones(2, 3), torch.tensor([[7, 0, -1], [3, -1, 516]])
    with counting() as traffic:
        f, g = ops.token_terms(
            student, teacher, number, mask, of, number, peak, divergence.name, *divergence.parameters
        )
    read = torch.tensor([[True, False, False], [False, True, True]])
    assert traffic.passes() == (3 * 2 * min(1003, teacher_vocab) * 2, 0) and not traffic.faults()
    assert not f[~read].any() and not g[~read].any() and f[read].all() and g[read].all()


def test_instrument_tells_first_looks_from_repeated_ones():
    """Two passes over a row, of which the second writes: between its looks at an entry lie the others of the row."""
    x, y = torch.randn(1, 2, 512), torch.empty(1, 2, 512)
    with counting() as traffic:
        sum_then_divide[(2,)](x, y, V=512, BLOCK_V=128)
        sum_then_divide[(2,)](x, x, V=512, BLOCK_V=128)
    assert traffic.passes() == (4 * 2 * 512 * 4, 2 * 2 * 512 * 4)
    assert traffic.first_looks() == 2 * 2 * 512 * 4
    row, block = 512 * 4, 128 * 4
    assert [launch.distance for launch in traffic] == [row - block + 3 * block, row - block]


@triton.jit
def sum_then_divide(X, Y, V: tl.constexpr, BLOCK_V: tl.constexpr):
    n = tl.program_id(0)
    total = 0.0
    for start in tl.static_range(0, V, BLOCK_V):
        total += tl.sum(tl.load(X + n * V + start + tl.arange(0, BLOCK_V)), 0)
    for start in tl.static_range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        tl.store(Y + n * V + offs_v, tl.load(X + n * V + offs_v) / total)


# The counts above mean something only if the instrument sees what it looks for.


@triton.jit
def copy_rows(X, Y, V: tl.constexpr, BLOCK_V: tl.constexpr, FAULT: tl.constexpr):
    n = tl.program_id(0)
    offs_v = tl.arange(0, BLOCK_V)
    x = tl.load(X + n * V + offs_v, mask=offs_v < (V + 1 if FAULT == "load" else V), other=0.0)
    if FAULT != "hole":
        tl.store(Y + n * V + offs_v, x, mask=offs_v < V)
    if FAULT == "twice":
        tl.store(Y + n * V + offs_v, x, mask=offs_v < 4)
    if FAULT == "hole":
        tl.store(Y + n * V + offs_v, x, mask=(offs_v < V) & (offs_v != 3))
    if FAULT == "store":
        tl.store(Y + n * V + offs_v + V, x, mask=offs_v < V)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load", "1 lanes read outside every argument, the first 1 bytes from X"),
        ("store", "33 lanes written outside every argument, the first 1 bytes from Y"),
        ("twice", "of 264 bytes of Y, 0 are never written and 32 more than once"),
        ("hole", "of 264 bytes of Y, 8 are never written and 0 more than once"),
        ("none", None),
    ],
)
def test_instrument_sees_a_fault(fault, message):
    x = torch.randn(2, 33)
    with counting() as traffic:
        copy_rows[(2,)](x, torch.empty(2, 33), V=33, BLOCK_V=64, FAULT=fault)
    found = traffic.faults()
    assert (message is None and not found) or any(message in line for line in found), found
    assert traffic[0].argument("X").read == 2 * 33 * 4 + (4 if fault == "load" else 0)


@pytest.mark.parametrize("fault", ["load", "none"])
def test_instrument_sees_a_row_reading_into_the_next(fault):
    """Inside one tensor it is no stray, so it is the rows further apart that show it."""
    x, y = guarded(torch.randn(1, 1, 33))[0], torch.empty(1, 33)
    with counting() as traffic:
        copy_rows[(1,)](x, y, V=33, BLOCK_V=64, FAULT=fault)
    assert bool(traffic.faults()) == (fault == "load")


@triton.jit
def sum_selected_rows(X, Selected, Y, V: tl.constexpr, BLOCK_V: tl.constexpr, READS_FIRST: tl.constexpr):
    n = tl.program_id(0)
    offs_v = tl.arange(0, BLOCK_V)
    total = 0.0
    if READS_FIRST:
        total = tl.sum(tl.load(X + n * V + offs_v, mask=offs_v < V, other=0.0), 0)
    if tl.load(Selected + n) == 0:
        tl.store(Y + n, 0.0)
        return
    if not READS_FIRST:
        total = tl.sum(tl.load(X + n * V + offs_v, mask=offs_v < V, other=0.0), 0)
    tl.store(Y + n, total)


@pytest.mark.parametrize("reads_first", [False, True])
def test_instrument_sees_the_reading_of_an_unselected_row(reads_first):
    """The result is right either way, so it is the bytes that show it."""
    x, y = torch.randn(1, 4, 33), torch.empty(4)
    selected = torch.tensor([True, False, False, True])
    with counting() as traffic:
        sum_selected_rows[(4,)](x, selected, y, V=33, BLOCK_V=64, READS_FIRST=reads_first)
    assert torch.allclose(y, x[0].sum(-1).where(selected, 0.0), atol=1e-5)
    assert traffic.passes() == ((4 if reads_first else 2) * 33 * 4, 0) and not traffic.faults()
