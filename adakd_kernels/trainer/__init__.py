"""The trainer on transformers' `Trainer`, a file for each part; `adakd_kernels.integrations.transformers` exports them.

Importing this package imports neither a part nor transformers.
"""
