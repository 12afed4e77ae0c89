"""How a model is told from another one: by a sample of its weights."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

__all__ = ["weights_fingerprint"]

SAMPLE = 1024
"""Entries that are read of a tensor at most."""


def weights_fingerprint(model: Any) -> str:
    """16 hex digits of a model's state: name, shape, type and evenly spaced entries of each tensor in it.

    They follow the weights, wherever these were loaded from. A change of the configuration alone, or of an entry that
    is not read, leaves them as they are. Of a tensor that is split over processes, the part here is read; of one that
    is not in memory (on the meta device, as those are that accelerate streams from disk), the shape alone.
    """
    digest = sha256()
    for name, value in model.state_dict().items():
        _add(digest, name, value)
    return digest.hexdigest()[:16]


def _add(digest: Any, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        return  # such as the mesh of a DTensor
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    # A DTensor and a quantised tensor name the plain tensors that they are made of.
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            _add(digest, f"{name}.{part}", getattr(tensor, part))
    elif tensor.numel() and not tensor.is_meta:
        # An odd step, so that the entries are not all of one column.
        step = -(-tensor.numel() // SAMPLE) | 1
        digest.update(tensor.detach().reshape(-1)[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
