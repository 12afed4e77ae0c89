"""Means with bootstrap confidence intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["BOOTSTRAP", "Estimate", "estimate"]

DRAWS = 10_000
LEVEL = 0.95
SEED = 0
BOOTSTRAP: dict[str, Any] = {"method": "percentile", "unit": "prompt", "draws": DRAWS, "level": LEVEL, "seed": SEED}
"""How the intervals are made: prompts are drawn with replacement, and the mean is taken over those drawn."""
NUMBERS = 10**7
"""Random indices that exist at a time."""


class Estimate(NamedTuple):
    """A mean and the ends of its interval; None where there is one prompt alone, whose scatter is unknown."""

    mean: float
    low: float | None
    high: float | None


def estimate(totals: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Σ totals / Σ weights over prompts, with its percentile interval.

    A mean over tokens has as totals the sums over the tokens of each prompt, and as weights their numbers: the tokens
    of a prompt are drawn together, because they are not independent of each other.

    Args:
        totals: of each prompt.
        weights: of each prompt, above 0; None is 1 for each.

    Raises:
        ValueError: there is no prompt.
    """
    n = len(totals)
    if n == 0:
        raise ValueError("totals must have a prompt at least, got none")
    pairs = torch.tensor([list(totals), [1.0] * n if weights is None else list(weights)], dtype=torch.float64)
    mean = _ratio(pairs.sum(-1))
    if n == 1:
        return Estimate(float(mean), None, None)
    generator = torch.Generator().manual_seed(SEED)
    ratios, step = [], max(1, NUMBERS // n)
    for start in range(0, DRAWS, step):
        drawn = torch.randint(n, (min(step, DRAWS - start), n), generator=generator)
        ratios.append(_ratio(pairs[:, drawn].sum(-1)))
    tail = (1.0 - LEVEL) / 2.0
    low, high = torch.cat(ratios).quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Estimate(float(mean), low, high)


def _ratio(sums: Tensor) -> Tensor:
    return sums[0] / sums[1]
