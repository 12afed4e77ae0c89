"""`adakd doctor`: versions, the implementation each operator takes on each device here and why, and a check of each."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from .. import ops, reference
from ..divergences import DIVERGENCES
from ..functional import adakd_loss
from . import CommandParser

PACKAGES = ("adakd-kernels", "torch", "triton", "transformers", "accelerate", "datasets")

Check = Callable[[torch.device], Iterator[tuple[Tensor, Tensor, Tensor]]]
"""Yields (computed, plain torch in fp32, truth in fp64)."""


def run(argv: list[str]) -> int:
    """Print the report; 1 if an operator fails its check, else 0."""
    parser = CommandParser(
        prog="adakd doctor", description="Which implementation each operator takes here, and if it is right."
    )
    parser.parse_args(argv)
    print(f"{'python':<14} {platform.python_version()} on {platform.platform(terse=True)}")
    for package in PACKAGES:
        print(f"{package:<14} {_version(package)}")
    failed = 0
    warnings.filterwarnings("ignore", message="adakd_kernels computes on the CPU in plain torch")  # said below
    for device in _devices():
        taken = ops.backend(device.type)
        name = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        print(f"\n{device.type}{name}: {taken.name}, because {taken.reason}")
        for op, check in CHECKS.items():
            result = verdict(check, device)
            failed += not result.startswith("ok")
            print(f"  {op:<28} {taken.name:<20} {result}")
    print(f"\n{failed} of the checks failed" if failed else "\nall checks passed")
    return 1 if failed else 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [*devices, accelerator] if accelerator is not None else devices


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that a value that no kernel wrote is not taken for an earlier kernel's result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def verdict(check: Check, device: torch.device) -> str:
    """'ok', or 'failed' with the reason. An error may be twice that of plain torch in the same type, and a few ulp.

    It may also be no more than half of its own row's largest value. Otherwise zeros would pass for a row of small
    values beside a row of large ones.
    """
    worst = 0.0
    try:
        with _poisoned_memory():
            for computed, eager, truth in check(device):
                scale = truth.abs().max().item()
                errors = (computed.cpu().double() - truth).abs()  # some devices have no fp64
                error = errors.max().item()
                allowed = 2.0 * (eager.cpu().double() - truth).abs().max().item() + 64.0 * 2.0**-23 * scale
                if scale == 0.0:
                    return "failed: plain torch in fp64 gives nothing but zeros"
                if not error <= allowed:
                    return f"failed: error {error:.1e}, allowed {allowed:.1e}, largest value {scale:.1e}"
                rows = (-1, truth.shape[-1] if truth.ndim > 2 else 1)
                if not (errors.reshape(rows).amax(-1) <= 0.5 * truth.abs().reshape(rows).amax(-1)).all():
                    return "failed: a row is off by more than half of its largest value"
                worst = max(worst, error / scale)
    except Exception as error:  # a kernel that does not compile or launch is what this command is there to report
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"ok, error {worst:.0e}"


def _logits(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(1, 7, 1003) student and (1, 7, 1000) teacher logits, the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(1, 7, v, generator=generator) for v in (1003, 1000))
    return student.to(device, dtype), teacher.to(device, dtype)


def _inputs(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Logits, temperatures and weights in fp32 on the device, then in fp64 on the CPU."""
    for target, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        tau = torch.linspace(0.6, 1.6, 7, device=target, dtype=dtype).view(1, 7)
        yield *_logits(target, dtype), tau, tau.flip(1)


def _check_token_stats(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    (s, t, *_), (s64, t64, *_) = _inputs(device)
    difficulty, normalizers_1 = ops.token_stats(s, t, torch.ones(s.shape[:2], dtype=torch.bool, device=device))
    of = reference.Normalizers.of(normalizers_1)
    s, s64 = s[..., :1000], s64[..., :1000]
    yield difficulty, reference.squared_hellinger(s, t), reference.squared_hellinger(s64, t64)
    yield of.max_s + of.sum_s.log(), s.logsumexp(-1), s64.logsumexp(-1)
    yield of.max_t + of.sum_t.log(), t.logsumexp(-1), t64.logsumexp(-1)


def _check_token_divergence(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    (s, t, tau, _), (s64, t64, tau64, _) = _inputs(device)
    mask = torch.ones(tau.shape, dtype=torch.bool, device=device)
    for name, cls in DIVERGENCES.items():
        computed = ops.token_divergence(s, t, tau, mask, name, *cls().parameters)[0]
        yield computed, reference.token_divergence(s, t, tau, name), reference.token_divergence(s64, t64, tau64, name)


def _check_token_kl(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    (s, t, tau, _), (s64, t64, tau64, _) = _inputs(device)
    t[..., ::3], t64[..., ::3] = -math.inf, -math.inf
    mask = torch.ones(tau.shape, dtype=torch.bool, device=device)
    forward, kept, reverse, lost, _, peak, *peak_grads = ops.token_kl(s, t, tau, mask)
    eager, truth = reference.kl_sums(s, t, tau), reference.kl_sums(s64, t64, tau64)
    yield forward, eager.forward, truth.forward
    yield kept, eager.kept, truth.kept
    yield reverse, eager.reverse, truth.reverse
    yield lost, eager.lost, truth.lost
    for name, computed in zip(("forward_kl", "reverse_kl"), peak_grads, strict=True):

        def at_peak(student: Tensor, teacher: Tensor, tau: Tensor, name: str = name) -> Tensor:
            grad = tau.unsqueeze(-1) * reference.token_divergence_grad(student, teacher, tau, name)
            place = peak.to(grad.device)
            return grad.gather(-1, place.clamp_min(0).unsqueeze(-1)).squeeze(-1).where(place >= 0, 0.0)

        yield computed, at_peak(s, t, tau), at_peak(s64, t64, tau64)


def _check_backward(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield from _gradients(device, inplace=False)


def _check_backward_inplace(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield from _gradients(device, inplace=True)


def _gradients(device: torch.device, inplace: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    (s, t, tau, weight), (s64, t64, tau64, weight64) = _inputs(device)
    mask = torch.ones(tau.shape, dtype=torch.bool, device=device)
    for name, cls in DIVERGENCES.items():
        args = (name, *cls().parameters)
        saved = ops.token_divergence(s, t, tau, mask, *args)[1:]
        inputs = (t, tau, weight, *saved, None, None, None, *args)
        if inplace:
            computed = s.clone()
            ops.token_divergence_backward_(computed, *inputs)
        else:
            computed = ops.token_divergence_backward(s, *inputs)
        eager = reference.token_divergence_grad(s, t, tau, name, weight)
        truth = reference.token_divergence_grad(s64, t64, tau64, name, weight64)
        yield computed, eager, truth


def _check_adakd_loss(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    (s, t, *_), (s64, t64, *_) = _inputs(device)
    labels = torch.tensor([[3, -100, 5, 7, 11, 999, 0]], device=device)
    ours = s.clone().requires_grad_()
    loss = adakd_loss(ours, t, labels, focus_ratio=0.5, ce_weight=0.3).loss
    loss.backward()  # type: ignore[no-untyped-call]
    found = []
    for student, teacher, target in ((s[0], t[0], labels[0]), (s64[0], t64[0], labels[0].cpu())):
        student = student.clone().requires_grad_()
        value = reference.adakd_loss(student, teacher, target, focus_ratio=0.5, ce_weight=0.3)
        value.backward()  # type: ignore[no-untyped-call]
        found.append((value.detach(), student.grad))
    (eager, eager_grad), (truth, truth_grad) = found
    assert ours.grad is not None and eager_grad is not None and truth_grad is not None
    yield loss.detach(), eager, truth
    yield ours.grad[0], eager_grad, truth_grad


def _check_with_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    (s, t, tau, weight), (s64, t64, tau64, weight64) = _inputs(device)
    mask = torch.ones(tau.shape, dtype=torch.bool, device=device)
    for name, cls in DIVERGENCES.items():
        computed = s.clone()
        args = (t, tau, mask, name, *cls().parameters, weight, None, None, None)
        d = ops.token_divergence_with_gradient_(computed, *args)[0]
        yield d, reference.token_divergence(s, t, tau, name), reference.token_divergence(s64, t64, tau64, name)
        eager = reference.token_divergence_grad(s, t, tau, name, weight)
        yield computed, eager, reference.token_divergence_grad(s64, t64, tau64, name, weight64)


CHECKS: dict[str, Check] = {
    "token_stats": _check_token_stats,
    "token_divergence": _check_token_divergence,
    "token_kl": _check_token_kl,
    "token_divergence_backward": _check_backward,
    "token_divergence_backward_": _check_backward_inplace,
    "token_divergence_with_gradient_": _check_with_gradient,
    "adakd_loss": _check_adakd_loss,
}
