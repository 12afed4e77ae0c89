"""Rows that start off a multiple of 16 bytes, read and written in aligned steps, and what only kernels have."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from adakd_kernels import adakd_loss, ops, reference, token_difficulty, token_divergence
from adakd_kernels.divergences import JensenShannon, with_parameters

from .cases import assert_close_as_eager, gradient, logits, temperatures
from .conftest import INTERPRETING

if not INTERPRETING:
    pytest.skip("runs in Triton's interpreter: start with TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from adakd_kernels.kernels.launch import launch_config, lead, skewed
from adakd_kernels.kernels.mixture import log2_of_mixture, reciprocal
from adakd_kernels.ops.token_divergence import empty_alike, empty_gradient

pytestmark = pytest.mark.interpret

# Whole steps between two edges; a last step that only the most skewed rows need; all whole steps but the first.
LONG_ODD = [8203, 3 * 4096 - 3, 2 * 4096 + 1]


@pytest.fixture(autouse=True)
def gradients_as_on_a_gpu(monkeypatch):
    """A new gradient is contiguous on a CPU only; elsewhere its rows start as the student's."""
    for module in ("token_divergence", "with_gradient"):
        monkeypatch.setattr(import_module(f"adakd_kernels.ops.{module}"), "empty_gradient", empty_alike)


def between_nans(z):
    """The six rows with NaN in the rows around each pair, all one right after the other, and which rows they are."""
    mask = torch.tensor([False, True, True] * 3)
    rows = torch.full((9, z.shape[-1]), torch.nan, dtype=z.dtype)
    rows[mask] = z
    return rows, mask


def as_view(z, before=1, apart=0):
    """The same rows as a view of NaN with rows before them, and with entries between them."""
    return torch.nn.functional.pad(z, (0, apart, before, 0), value=torch.nan)[before:, : z.shape[-1]]


def as_it_is(z):
    return z


# How student and teacher lie in memory.
PLACES = {
    "whole": (as_it_is, as_it_is),
    "shifted alike": (as_view, as_view),
    "a view beside a whole one": (as_view, as_it_is),
    "unaligned beside aligned": (as_it_is, lambda z: as_view(z, apart=-z.shape[-1] % 16)),
}
each_place = pytest.mark.parametrize(
    ("vocab", "places"), [*((vocab, "whole") for vocab in LONG_ODD), *((LONG_ODD[0], name) for name in [*PLACES][1:])]
)


def placed(places, student, teacher):
    """Both as they lie, where the kernels are what this asks of them."""
    student, teacher = (put(z) for put, z in zip(PLACES[places], (student, teacher), strict=True))
    config = launch_config("forward", "reverse_kl", student.shape[-1], student[None], teacher[None])
    assert config["SKEWED"] is (places in ("whole", "shifted alike"))
    assert (config["lead"] is not None) is (places == "shifted alike")
    assert config["WIDTH"] == (8 if config["SKEWED"] else 1)
    return student, teacher


@pytest.mark.parametrize("divergence", ["reverse_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@each_place
def test_rows_of_every_skew_between_rows_of_nan(vocab, places, inplace, divergence):
    plain = [logits(6, vocab, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    (student, mask), (teacher, _) = map(between_nans, plain)
    assert len({vocab * row % 8 for row in mask.nonzero().flatten().tolist()}) == 6
    leaf = student.requires_grad_()
    student, teacher = placed(places, leaf * 1.0, teacher)
    tau = temperatures(9)

    def exact(s):
        return reference.token_divergence(s, plain[1].double(), tau[mask], divergence)

    def eager(s):
        return reference.token_divergence(s, plain[1], tau[mask], divergence)

    assert_close_as_eager(
        token_difficulty(student, teacher, mask)[mask],
        reference.squared_hellinger(*plain),
        reference.squared_hellinger(*(z.double() for z in plain)),
    )
    value = token_divergence(student, teacher, tau, divergence, mask, inplace=inplace)
    assert_close_as_eager(value[mask], eager(plain[0]), exact(plain[0].double()))
    value.sum().backward()
    assert_close_as_eager(leaf.grad[mask], gradient(eager, plain[0]), gradient(exact, plain[0].double()))
    written = ops.token_divergence_backward(
        PLACES[places][0](leaf.detach())[None], teacher[None], tau[None].float(), mask[None].float(), torch.ones(1, 9),
        torch.ones(4, 1, 9), torch.zeros(1, 9, dtype=torch.int64), torch.ones(1, 9), None, None, None,
        divergence, 0.1, 0.0,
    )[0]  # fmt: skip
    assert torch.equal(written[~mask], torch.zeros(3, vocab, dtype=torch.bfloat16))


@each_place
def test_parts_of_rows_of_every_skew_between_rows_of_nan(vocab, places):
    """A peak that is looked for beside its place stays in the sums, of which it is a large part."""
    plain = [logits(6, vocab, dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    peaks = torch.tensor([0, 4096, vocab - 1, 77, 9, 3])
    for z in plain:
        z.scatter_(1, peaks.unsqueeze(1), 16.0)
    (student, mask), (teacher, _) = map(between_nans, plain)
    student, teacher = placed(places, student, teacher)
    peak, tau, divergence = torch.full((9,), -1), temperatures(9).float(), JensenShannon()
    peak[mask] = peaks.where(torch.arange(6) < 4, -1)
    of = torch.ones(4, 9)
    of[:, mask] = torch.stack(reference.token_sums(*plain, tau[mask], divergence).normalizers)
    c = torch.linspace(-0.5, 0.5, 9)

    def terms(s, t):
        given = [x[..., mask].to(reference.accumulation_dtype(s)) for x in (tau, of, c)]
        return reference.token_terms(
            s, t, given[0], reference.Normalizers.of(given[1]), given[2], peak[mask], divergence
        )

    found = ops.token_terms(
        student[None], teacher[None], tau[None], mask[None], of[:, None], c[None], peak[None], divergence.name,
        *divergence.parameters,
    )  # fmt: skip
    for x, eager, exact in zip(found, terms(*plain), terms(*(z.double() for z in plain)), strict=True):
        assert_close_as_eager(x[0, mask], eager, exact)
        assert not x[0, ~mask].any()


@pytest.mark.parametrize("divergence", ["jensen_shannon", "skew_reverse_kl", "total_variation"])
def test_terms_are_free_of_the_rounding_of_the_scale(divergence):
    """30 powers of e below the maximum it would move all masses alike by up to 2e-6, which does not average out."""
    tau = temperatures(1, 12).float()
    s, t = (logits(1, 12, 4500, seed=seed, scale=0.5) - 30.0 * tau.unsqueeze(-1) for seed in (1, 2))
    mask, of, c = torch.ones(1, 12, dtype=torch.bool), torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.full((1, 12), 0.6)
    of, nowhere = of.view(4, 1, 1).expand(4, 1, 12), torch.full((1, 12), -1)
    alpha, beta = 0.1, 0.5

    def terms(dtype):
        args = [x.to(dtype) for x in (s, t, tau)]
        of_rows, div = reference.Normalizers.of(of.to(dtype)), with_parameters(divergence, alpha, beta)
        return reference.token_terms(*args, of_rows, c.to(dtype), nowhere, div)

    found = ops.token_terms(s, t, tau, mask, of, c, nowhere, divergence, alpha, beta)
    for x, eager, exact in zip(found, terms(torch.float32), terms(torch.float64), strict=True):
        assert_close_as_eager((x / exact).float(), (eager / exact).float(), torch.ones_like(exact))


def test_rows_that_start_apart_are_not_skewed_together():
    odd = torch.empty(2, 5, 8203, dtype=torch.bfloat16)
    padded = torch.empty(2, 5, 8208, dtype=torch.bfloat16)[..., :8203]
    assert skewed(8203, odd, odd) and skewed(8203, padded[:, ::2, :], padded[:, ::2, :]) is False
    assert not skewed(8203, odd, padded)
    assert not skewed(8203, odd, odd[:, :1].expand(2, 5, 8203))
    assert not skewed(8203, odd[:, :-1], torch.empty(2, 4, 8203))
    assert skewed(8203, odd[:, :-1], odd[:, :-1])
    assert not skewed(1003, odd[..., :1003], odd[..., :1003])
    assert skewed(8203, odd[:1, 1:], odd[:1, 1:]) and not skewed(8203, odd[:1, 1:], odd[:1, :-1])
    assert skewed(8203, odd[:1, :1], odd[:1, 1:2]) is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_lead_is_that_of_the_address(dtype):
    memory = torch.empty(64, dtype=dtype)
    for first in range(16):
        view = memory[first:]
        assert lead(view) == first % 8 and (view.data_ptr() - lead(view) * dtype.itemsize) % 16 == 0


@pytest.mark.parametrize("apart", [8203, 8204, 8208, 8211])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_gradient_has_rows_that_start_as_the_students(apart, first):
    """Of whole tensors and of views without the first tokens; of short sequences, only inside each sequence."""
    for length in (48, 7):
        student = torch.empty(2, length + first, apart, dtype=torch.bfloat16, device="meta")[:, first:, :8203]
        grad = empty_gradient(student)
        assert grad.shape == student.shape
        assert grad.is_contiguous() is (apart in (8203, 8211) and (first == 0 or length == 7))
        assert (grad.storage_offset() - student.storage_offset()) % 8 == 0
        assert (grad.stride(1) - student.stride(1)) % 8 == 0
        assert (grad.stride(0) - student.stride(0)) % 8 == 0 or (length == 7 and first)
        assert grad.untyped_storage().nbytes() <= 2 * (8 + 2 * (length + length // 16) * (8203 + 8))


@triton.jit
def terms_kernel(X, Log2, Reciprocal, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(X + offs)
    tl.store(Log2 + offs, log2_of_mixture(x))
    tl.store(Reciprocal + offs, reciprocal(x, ROOT=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithm_and_reciprocal_of_a_mixture(dtype):
    """Close to 1 the logarithm is close to 0, and its error has to be, too."""
    x = torch.cat((torch.linspace(1e-6, 1.0, 4096), 1.0 - torch.logspace(-7, -0.3, 4096))).to(dtype)
    log2, rcp = torch.empty_like(x), torch.empty_like(x)
    terms_kernel[(1,)](x, log2, rcp, N=len(x))
    assert log2[x == 1.0].abs().sum() == 0
    exact = x.double().log2()
    some = exact != 0
    ours, eager = ((y[some] / exact[some]).to(dtype) for y in (log2, x.log2()))
    assert_close_as_eager(ours, eager, torch.ones_like(exact[some]), ulps=1.0)
    assert_close_as_eager(rcp * x, (1.0 / x) * x, torch.ones_like(exact))


@pytest.mark.parametrize("places", ["whole", "shifted alike", "a view beside a whole one"])
def test_labels_are_found_wherever_rows_start(places):
    """A cross-entropy whose labels stand at both ends of a row and on both sides of the first whole step."""
    vocab = LONG_ODD[0]
    student, teacher = (logits(6, vocab, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    labels = torch.tensor([0, vocab - 1, 4095, 4096, 2047, 17])

    def ours(s):
        s, t = placed(places, s * 1.0, teacher)
        return adakd_loss(s, t, labels, focus_ratio=0.5, ce_weight=0.9, inplace=places == "shifted alike").loss

    def eager(s):
        return reference.adakd_loss(s, teacher, labels, focus_ratio=0.5, ce_weight=0.9)

    def exact(s):
        return reference.adakd_loss(s, teacher.double(), labels, focus_ratio=0.5, ce_weight=0.9)

    grad = gradient(ours, student)
    assert_close_as_eager(grad, gradient(eager, student), gradient(exact, student.double()))
    assert (grad.gather(1, labels[:, None]) < 0).all()
