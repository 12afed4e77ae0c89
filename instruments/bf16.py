"""bf16 as numpy holds it, by its bits: what the interpreter and the PTX simulator share.

Exact both ways, ties to even; which NaN comes out is the caller's matter. Finds nothing by itself.
"""

from __future__ import annotations

import numpy as np


def widened(bits: np.ndarray) -> np.ndarray:
    """The fp32 numbers of some bf16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(x: np.ndarray, nan: int) -> np.ndarray:
    """The bits of the bf16 numbers nearest to fp32 numbers, ties to even; `nan` are those of every NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.where(np.isnan(x), nan, (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
