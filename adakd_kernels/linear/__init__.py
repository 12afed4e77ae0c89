"""The loss from hidden states and heads, without the logits: the function, its chunks of tokens, and the heads."""

from .function import linear_adakd_loss

__all__ = ["linear_adakd_loss"]
