"""Inputs and the tolerance rule that the tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adakd_kernels.divergences import DIVERGENCES as REGISTRY
from adakd_kernels.divergences import Divergence, JensenShannon

# From the registry, so that every tier tests a new divergence without a change here.
ONE_OF_EACH: list[Divergence] = [cls() for cls in REGISTRY.values()]
DIVERGENCES: list[Divergence] = [*ONE_OF_EACH, JensenShannon(beta=0.1)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
VOCABULARIES = [7, 1003, 4097, 50257]


def name_of(value: object) -> str:
    """A readable test id."""
    if isinstance(value, Divergence):
        return repr(value).replace(" ", "")
    return str(value).replace("torch.", "")


def logits(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0, grad: bool = False
) -> Tensor:
    """Random logits, the same numbers in every type and on every device."""
    numbers = torch.randn(*shape, generator=_generator(seed), dtype=torch.float64, device="cpu") * scale
    return numbers.to(torch.get_default_device(), dtype).requires_grad_(grad)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Random fp64 numbers in [0, 1)."""
    numbers = torch.rand(*shape, generator=_generator(seed), dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


def tokens(vocab: int, *shape: int, seed: int = 0) -> Tensor:
    """Random token ids below `vocab`."""
    ids = torch.randint(vocab, shape, generator=_generator(seed), device="cpu")
    return ids.to(torch.get_default_device())


def temperatures(*shape: int, seed: int = 0) -> Tensor:
    """Random temperatures in [0.5, 2)."""
    return uniform(*shape, seed=seed) * 1.5 + 0.5


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def gradient(function: Callable[[Tensor], Tensor], student: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Gradient of Σ weight·function(student) in the student."""
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf)
    (value * torch.as_tensor(weight).to(value.dtype)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def assert_close_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, ulps: float = 4.0) -> None:
    """At most twice the error of eager torch in the same type plus a floor of a few units in the last place.

    Both errors are the largest over the tensor, against fp64. The unit is that of the accumulation type at the largest
    exact value, so a result of 16 bits has to be rounded as eager rounds it. For fp64 the yardstick itself rounds, so
    the floor is higher.
    """
    ulps = 64.0 if ours.dtype == torch.float64 else ulps
    assert ours.shape == exact.shape
    assert not ours.isnan().any(), "NaN, or a lane that was never written"
    scale = exact.abs().max().item()
    unit = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps * max(scale, torch.finfo(ours.dtype).tiny)
    error = (ours.double() - exact).abs().max().item()
    allowed = 2.0 * (eager.double() - exact).abs().max().item() + ulps * unit
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} at scale {scale:.3e}"
