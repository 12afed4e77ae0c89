"""Fused kernels for token-adaptive knowledge distillation (AdaKD, arXiv 2510.11615) of language models."""

from importlib.metadata import PackageNotFoundError, version

from . import quiet_torch as quiet_torch
from .adaptive import LossAdaptiveFocus, ScheduledFocus, inverse_difficulty_temperature, select_tokens
from .divergences import (
    AlphaBeta,
    Divergence,
    ForwardKL,
    Hellinger,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from .functional import AdaKDOutput, TokenChoice, adakd_loss, token_difficulty, token_divergence
from .linear import linear_adakd_loss, linear_token_divergence
from .loss import AdaKDLoss, LinearAdaKDLoss
from .vocab_parallel import VocabParallel

try:
    __version__ = version("adakd-kernels")
except PackageNotFoundError:  # the folder alone, which nobody installed
    __version__ = "unknown"

__all__ = [
    "AdaKDLoss",
    "AdaKDOutput",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Hellinger",
    "Jeffreys",
    "JensenShannon",
    "LinearAdaKDLoss",
    "LossAdaptiveFocus",
    "ReverseKL",
    "ScheduledFocus",
    "SkewForwardKL",
    "SkewReverseKL",
    "TokenChoice",
    "TotalVariation",
    "VocabParallel",
    "adakd_loss",
    "inverse_difficulty_temperature",
    "linear_adakd_loss",
    "linear_token_divergence",
    "select_tokens",
    "token_difficulty",
    "token_divergence",
]
