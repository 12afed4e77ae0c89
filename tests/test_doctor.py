"""`adakd doctor` checks the kernels that this process has, each divergence in turn, and memory that no kernel wrote,
zeros and a single wrong row do not pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adakd_kernels import ops
from adakd_kernels.commands import doctor
from adakd_kernels.divergences import DIVERGENCES

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.gpu]


def verdict(op: str) -> str:
    return doctor.verdict(doctor.CHECKS[op], torch.get_default_device())


@pytest.mark.interpret
@pytest.mark.parametrize("op", doctor.CHECKS)
def test_every_check_passes(op):
    assert verdict(op).startswith("ok, error ")


def test_every_divergence_is_checked(monkeypatch):
    forward, backward, seen = ops.token_divergence, ops.token_divergence_backward, []
    monkeypatch.setattr(ops, "token_divergence", lambda *args: seen.append(args[-3]) or forward(*args))
    assert verdict("token_divergence").startswith("ok") and seen == list(DIVERGENCES)
    seen.clear()
    monkeypatch.setattr(ops, "token_divergence", forward)
    monkeypatch.setattr(ops, "token_divergence_backward", lambda *args: seen.append(args[-3]) or backward(*args))
    assert verdict("token_divergence_backward").startswith("ok") and seen == list(DIVERGENCES)


def unwritten_row(grad: Tensor) -> Tensor:
    """The allocator gives the right gradient's memory again, and a row stays as it was: right by chance."""
    rows = grad.clone()
    del grad
    out = torch.ops.aten.new_empty(rows, rows.shape)  # not Python's `torch.empty`, which the tests poison themselves
    out[:, :3], out[:, 4:] = rows[:, :3], rows[:, 4:]
    return out


def row_of_zeros(grad: Tensor) -> Tensor:
    faint = grad.abs().amax(-1, keepdim=True)
    return grad.where(faint > faint.min(), 0.0)


FAULTS = {"a row that nobody wrote": unwritten_row, "zeros": torch.zeros_like, "a row of zeros": row_of_zeros}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_gradient_that_is_not_written_does_not_pass(monkeypatch, divergence, fault):
    backward = ops.token_divergence_backward

    def faulty(*args: Any) -> Tensor:
        return FAULTS[fault](backward(*args)) if args[-3] == divergence else backward(*args)

    monkeypatch.setattr(ops, "token_divergence_backward", faulty)
    assert verdict("token_divergence_backward").startswith("failed: ")


def test_a_truth_of_zeros_proves_nothing():
    def check(device):
        yield (torch.zeros(1, 7),) * 3

    assert doctor.verdict(check, torch.get_default_device()).startswith("failed: plain torch in fp64 gives nothing")


class WithoutFp64(Tensor):
    """As on an Apple GPU."""

    def double(self) -> Tensor:
        raise TypeError("this device has no float64")

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_a_device_without_fp64_is_checked():
    def check(device):
        values = torch.linspace(1.0, 2.0, 7, device=device).view(1, 7)
        there = values.as_subclass(WithoutFp64)
        yield there, there, values.double().cpu()

    assert doctor.verdict(check, torch.get_default_device()).startswith("ok")


def test_a_check_leaves_the_process_as_it_was():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    verdict("token_stats")
    after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert before == after
