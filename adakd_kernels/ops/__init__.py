"""The `adakd::` operators: schema, shapes, and which kernel runs on which device."""

from .backends import Backend, backend, load_native
from .loss_sums import loss_sums, loss_weights, spread_statistics, token_cross_entropy
from .shards import merge_statistics, row_statistics, shard_divergence, shard_statistics
from .token_choice import choose_tokens, focus_step_
from .token_divergence import (
    token_divergence,
    token_divergence_backward,
    token_divergence_backward_,
)
from .token_kl import token_kl
from .token_losses import token_losses
from .token_stats import token_stats
from .token_terms import token_terms
from .with_gradient import scale_gradient_, token_divergence_with_gradient, token_divergence_with_gradient_

load_native()

__all__ = [
    "Backend",
    "backend",
    "choose_tokens",
    "focus_step_",
    "loss_sums",
    "loss_weights",
    "merge_statistics",
    "row_statistics",
    "scale_gradient_",
    "shard_divergence",
    "shard_statistics",
    "spread_statistics",
    "token_cross_entropy",
    "token_divergence",
    "token_divergence_backward",
    "token_divergence_backward_",
    "token_divergence_with_gradient",
    "token_divergence_with_gradient_",
    "token_kl",
    "token_losses",
    "token_stats",
    "token_terms",
]
