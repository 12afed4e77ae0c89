"""The bodies of the operators take a few rows at a time, so that the temporaries of plain torch stay in the cache.

Every step of the mathematics would fetch a temporary of the size of all logits from memory, and the system would clear
its pages anew: together that takes longer than the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Place = tuple[Tensor, Tensor] | tuple[int, slice]
"""Where some tokens of (B, L) stand: indices of both, or of neighbours in one row of the batch a slice."""

ENTRIES_ON_A_THREAD = 2**17
"""Entries of a chunk for each thread of the CPU: a row of a large vocabulary, or some of a small one."""
ENTRIES_ON_A_DEVICE = 2**26
"""Entries of a chunk elsewhere, where a step takes long to start and the number of temporaries is what counts."""


@cache
def raise_malloc_threshold() -> None:
    """Let glibc's malloc keep what is freed for the next step, up to twice the largest block that it has seen freed.

    It begins with so little that every step would ask the system for memory, and wait while its pages are cleared.
    """
    torch.empty(2**24, dtype=torch.uint8)


def row_chunks(mask: Tensor, vocab: int, *numbers: Tensor | None) -> Iterator[tuple[Place, list[Any]]]:
    """The tokens of a mask (B, L), some at a time, in their order; one chunk of none where there is none.

    Args:
        mask: (B, L) bool.
        vocab: entries of a row.
        numbers: (..., B, L) numbers of the tokens, or None.

    Yields:
        (where, of_them): where the tokens of the chunk stand, for `rows_at` and `set_rows`; (..., n) numbers of them.
    """
    raise_malloc_threshold()
    on_cpu = mask.device.type == "cpu"
    entries = torch.get_num_threads() * ENTRIES_ON_A_THREAD if on_cpu else ENTRIES_ON_A_DEVICE
    size = max(1, entries // max(1, vocab))
    places = mask.nonzero()
    chunks: tuple[Tensor, ...] = torch.split(places, size)
    split: list[Any] = [[None] * len(chunks) if x is None else torch.split(x[..., mask], size, -1) for x in numbers]
    for place, *of_them in zip(chunks, *split, strict=True):
        yield (_neighbours(place) if on_cpu else None) or place.unbind(-1), of_them


def _neighbours(place: Tensor) -> Place | None:
    """Tokens beside each other, whose rows are a view where those of others are a copy; to ask waits for a device."""
    if not len(place):
        return None
    (b, first), (b_last, last) = place[0].tolist(), place[-1].tolist()
    return (b, slice(first, last + 1)) if b == b_last and last - first == len(place) - 1 else None


def rows_at(logits: Tensor, where: Place) -> Tensor:
    """(n, V) rows of (B, L, V) logits."""
    return logits[where]


def set_rows(tensor: Tensor, where: Place, rows: Tensor) -> None:
    """Write (n, V) rows of any type into a (B, L, V) tensor."""
    if isinstance(where[0], int):
        tensor[where].copy_(rows)
    else:
        tensor[where] = rows.to(tensor.dtype)


def joined(chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The (..., n) results of the chunks, each in one (..., N) tensor."""
    return [torch.cat(parts, -1) for parts in zip(*chunks, strict=True)]
