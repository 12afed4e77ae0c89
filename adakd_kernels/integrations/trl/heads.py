"""The output layers of TRL's models: what follows them, their whole weights, and the entropy of what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ... import ops
from ...adaptive import exact_dtype
from ...divergences import ReverseKL
from ...linear.chunks import CHUNK_BYTES
from ...linear.heads import make_head, spans
from ...trainer.heads import HeadOptions, configured_head, plain_head
from ...trainer.records import IGNORE_INDEX

__all__ = ["Head", "entropy_sum", "head_options", "whole_heads"]


class Head(NamedTuple):
    """A head whose weight this process has as a whole."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


def head_options(role: str, model: Any, *, try_out: bool) -> HeadOptions:
    """What follows the head of a model, as its configuration says and, with `try_out`, as two tokens show.

    Raises:
        ValueError: its logits are something else than its head's result, scaled and soft-capped.
    """
    try:
        return plain_head(model) if try_out else configured_head(model.config)
    except ValueError as error:
        raise ValueError(f"the loss needs a {role} whose logits are those of a plain output layer: {error}") from error


@contextmanager
def whole_heads(*hidden_and_heads: tuple[Tensor, nn.Module]) -> Iterator[list[Head]]:
    """The heads as FSDP2 or ZeRO-3 have put them together, in a type that their hidden states can be multiplied with.

    The gradient of a part that is gathered here goes back to the processes that hold it.
    """
    parameters: list[Any] = [part for _, head in hidden_and_heads for part in (head.weight, head.bias)]
    with maybe_gather_lm_head_ctx(*parameters):
        yield [
            Head(_whole(hidden, head.weight), None if head.bias is None else _whole(hidden, head.bias))
            for hidden, head in hidden_and_heads
        ]


def _whole(hidden: Tensor, parameter: Any) -> Tensor:
    """The parameter, gathered, and cast as the hidden states are where autocast does not choose a type."""
    whole: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole if torch.is_autocast_enabled(hidden.device.type) else whole.to(hidden.dtype)


@torch.no_grad()
def entropy_sum(hidden: Tensor, head: Head, after: HeadOptions, labels: Tensor) -> Tensor:
    """The sum over the valid tokens of the entropy of softmax(z) in nats, 0-d, without the logits of a batch.

    KL(q‖u) against the uniform u is log V − H(q), so the kernels of the reverse KL give it. Costs one product of the
    head with the hidden states of the valid tokens, and reads its result once.

    Args:
        hidden: (B, L, H).
        labels: (B, L), −100 where a token is not valid.
    """
    made = make_head(hidden, head.weight, head.bias, after.scale, after.softcap, len(head.weight))
    positions = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    rows = max(1, min(len(positions), CHUNK_BYTES.get(hidden.device.type, 2**30) // made.row_bytes))
    logits, uniform = made.empty_rows(rows), torch.zeros(1, 1, made.vocab, dtype=made.dtype, device=hidden.device)
    total = torch.zeros((), dtype=exact_dtype(hidden.device), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # the head has taken autocast's type
        for a, b in spans(0, len(positions), rows):
            made.raw_logits(positions[a:b], logits[: b - a])
            student = made.capped(logits[: b - a], logits[: b - a]).unsqueeze(0)
            ones = torch.ones(1, b - a, dtype=torch.float32, device=hidden.device)
            divergence, *_ = ops.token_divergence(
                student, uniform.expand(1, b - a, -1), ones, ones.bool(), ReverseKL.name, *ReverseKL().parameters
            )
            total += (math.log(made.vocab) - divergence).sum(dtype=total.dtype)
    return total
