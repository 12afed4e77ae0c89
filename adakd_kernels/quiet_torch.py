"""Imports torch, which warns where numpy is missing. This package does without it, also under `-W error`."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401
