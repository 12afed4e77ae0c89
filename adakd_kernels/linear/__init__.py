"""The loss from hidden states and heads, without the logits: the functions, their chunks of tokens, and the heads."""

from .function import linear_adakd_loss
from .token_divergence import linear_token_divergence

__all__ = ["linear_adakd_loss", "linear_token_divergence"]
