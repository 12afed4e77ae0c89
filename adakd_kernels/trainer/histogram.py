"""Quantiles of per-token numbers over many micro-batches, in constant memory and without waiting for the device.

The bins are of equal ratio, so that small difficulties are resolved as well as large ones, and the counts of several
ranks add up. A quantile is exact to half a bin, 0.6 %; a power of two is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TokenHistogram"]

BINS_PER_OCTAVE = 64
LOWEST, HIGHEST = -32, 16
"""Exponents of 2 between which values are told apart: 2e-10 to 65536."""
LAST_BIN = (HIGHEST - LOWEST) * BINS_PER_OCTAVE
NAN_BIN = LAST_BIN + 1


class TokenHistogram:
    """Counts of non-negative values in logarithmic bins: bin i > 0 around 2^(LOWEST + i/BINS_PER_OCTAVE), bin 0 for 0.

    What is below 0 by rounding goes to bin 0, what is above 65536 to the last bin. NaN has a bin of its own behind the
    last, as it comes last in `torch.sort`: a quantile that falls there is NaN, and those below it are of numbers.

    Args:
        device: where the values come from and the counts stay.

    Example:
        >>> histogram = TokenHistogram("cpu")
        >>> histogram.add(torch.tensor([0.0, 0.5, 0.5, 2.0]), torch.tensor([True, True, True, False]))
        >>> [round(q, 2) for q in histogram.quantiles(0.1, 0.9)]
        [0.0, 0.5]
    """

    def __init__(self, device: torch.device | str) -> None:
        self.counts = torch.zeros(NAN_BIN + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, values: Tensor, mask: Tensor) -> None:
        """Count `values` (...) where `mask` (...) is true."""
        place = ((values.flatten().float().clamp_min(0.0).log2() - LOWEST) * BINS_PER_OCTAVE).round()
        place = place.clamp(0, LAST_BIN).nan_to_num(nan=float(NAN_BIN)).long()  # clamp leaves NaN as it is
        self.counts.index_add_(0, place, mask.flatten().long())

    def quantiles(self, *probabilities: float) -> list[float]:
        """The ⌈p·n⌉-th smallest of the n values, for each p in (0, 1]; NaN where n is 0 or where that value is NaN.

        Waits for the device.
        """
        ranks = self.counts.cpu().cumsum(0)
        total = int(ranks[-1])
        if total == 0:
            return [float("nan")] * len(probabilities)
        wanted = torch.tensor([p * total for p in probabilities], dtype=torch.float64).ceil().long().clamp(1, total)
        return [_value(place) for place in torch.searchsorted(ranks, wanted).tolist()]

    def reset(self) -> None:
        """Forget all values."""
        self.counts.zero_()


def _value(place: int) -> float:
    """The number in the middle of a bin."""
    if place == NAN_BIN:
        return float("nan")
    return 0.0 if place == 0 else 2.0 ** (LOWEST + place / BINS_PER_OCTAVE)
