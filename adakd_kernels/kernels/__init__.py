"""Triton kernels and their launchers. Importing a module of this folder needs Triton; `adakd_kernels` does not."""
