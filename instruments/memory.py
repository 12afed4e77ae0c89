"""The bytes that belong to a tensor, by address: what a kernel may touch of it, whatever lies between its rows.

Finds an access beside a row, between two rows, or across the end of one. It cannot find an access to another entry of
the same tensor; rows of one tensor that lie one right after the other count as one, so for those there is `guarded`.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor


class Rows:
    """The memory of a tensor as rows of contiguous bytes.

    Rows are looked up by address, never byte by byte, so a tensor may span many gigabytes of address space that no
    page backs.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        assert tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1, "rows must be contiguous"
        length = tensor.shape[-1] if tensor.dim() else 1
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
        self.name = name
        self.row_bytes = length * tensor.element_size()
        self.starts = np.sort(tensor.data_ptr() + offsets.flatten().numpy() * tensor.element_size())
        if len(self.starts) > 1 and (np.diff(self.starts) == self.row_bytes).all():
            self.row_bytes, self.starts = self.row_bytes * len(self.starts), self.starts[:1]

    def __len__(self) -> int:
        """Bytes of the tensor."""
        return len(self.starts) * self.row_bytes

    def locate(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """For accesses of `size` bytes: the first byte's place among the tensor's bytes, −1 if any byte is no part."""
        if not len(self):
            return np.full(addresses.shape, -1)
        row = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = addresses - self.starts[row]
        return np.where((row >= 0) & (inside + size <= self.row_bytes), row * self.row_bytes + inside, -1)

    def distance(self, address: int) -> int:
        """Bytes between an address and the nearest row."""
        if not len(self):
            return 2**63
        return int(np.maximum(self.starts - address, address - (self.starts + self.row_bytes - 1)).clip(0).min())


def bytes_at(address: int, size: int) -> np.ndarray:
    """A writable view of memory that the caller knows to be allocated."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(address)), np.uint8)


def guarded(tensor: Tensor, rows: int = 2, columns: int = 24) -> Tensor:
    """A copy of a (B, L, V) tensor inside a larger one of NaN: `rows` more on each side of L, `columns` of V."""
    batch, length, vocab = tensor.shape
    padded = torch.full((batch + 2, length + 2 * rows, vocab + 2 * columns), torch.nan, dtype=tensor.dtype)
    view = padded[1:-1, rows:-rows, columns:-columns]
    view.copy_(tensor)
    return view
