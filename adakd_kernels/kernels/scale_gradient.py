"""Multiplies the gradient of a loss by its upstream gradient, in place.

Reads and writes 1U of the rows with a weight, and nothing where the factor is 1. U is one pass over an N x V tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import acc_type, launch_config, on_device, row_strides
from .rows import edge_entries, edge_start, inside, row_start, tile_offsets, whole_steps


@triton.jit(do_not_specialize=["L", "N", "stride_gb", "stride_gl", "lead"])
def scale_gradient_kernel(
    Grad,  # (B, L, V)
    Weights,  # (W, B·L)
    GradLoss,  # 0-d
    ScaledBy,  # 0-d, or None
    L,
    N,
    stride_gb,  # distances of two batches and of two tokens, in units
    stride_gl,
    unit_g,  # entries
    lead,  # see `row_start`
    V: tl.constexpr,
    W: tl.constexpr,
    SKEWED: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    factor = tl.load(GradLoss).to(ACC)
    if ScaledBy is not None:
        factor = factor / tl.load(ScaledBy).to(ACC)
    weighted = tl.load(Weights + n) != 0.0
    if W == 2:
        weighted |= tl.load(Weights + N + n) != 0.0
    # A row without a weight is zeros, whatever the factor.
    if (factor == 1.0) | (weighted == 0):
        return
    Grad, skew = row_start(Grad, n, L, stride_gb, stride_gl, unit_g, lead, SKEWED)
    STEP: tl.constexpr = LANES * VEC
    for i in range(0, edge_entries(V, V, STEP, SKEWED), STEP):
        offs_v = tile_offsets(edge_start(i, V, STEP, SKEWED), LANES, VEC, WIDTH)
        mask = inside(offs_v, skew, V, SKEWED)
        grad = tl.load(Grad + offs_v, mask=mask, other=0.0).to(ACC)
        tl.store(Grad + offs_v, (grad * factor).to(Grad.dtype.element_ty), mask=mask)
    for start in range(whole_steps(V, STEP, SKEWED)[0], whole_steps(V, STEP, SKEWED)[1], STEP):
        offs_v = tile_offsets(start, LANES, VEC, WIDTH)
        grad = tl.load(Grad + offs_v).to(ACC)
        tl.store(Grad + offs_v, (grad * factor).to(Grad.dtype.element_ty))


def scale_gradient(gradient: Tensor, weights: Tensor, grad_loss: Tensor, scaled_by: Tensor | None) -> None:
    """(B, L, V), (1 or 2, B, L), 0-d, 0-d or None; the gradient is multiplied in place."""
    _, acc = acc_type(gradient, gradient)
    vocab, size = gradient.shape[-1], weights[0].numel()
    if size:
        with on_device(gradient):
            scale_gradient_kernel[(size,)](
                gradient, weights.contiguous().flatten(1), grad_loss, scaled_by, gradient.shape[1], size,
                *row_strides(gradient), V=vocab, W=len(weights), ACC=acc,
                **launch_config("scale", "reverse_kl", vocab, gradient, gradient),
            )  # fmt: skip
