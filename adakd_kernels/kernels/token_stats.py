"""`token_stats`: squared Hellinger distance and log-normalisers of every token at temperature 1 (equations (1), (2)).

Reads 2U (U: one pass over an N x V tensor), writes five numbers a token. A masked token costs these writes only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hellinger import sweep_distance
from .launch import acc_type, launch_config, on_device, row_parts, row_strides
from .rows import Normalizers, Rows, exponent_rounding, exponent_scale, row_start, store_normalizers
from .split import split_stats


@triton.jit(do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "lead"])
def token_stats_fwd_kernel(
    S,  # (B, L, Vs) logits
    T,  # (B, L, Vt)
    Mask,  # (B·L,) bool
    Difficulty,  # (B·L,) result s², in ACC
    Normalizers1,  # (4, B·L) result, in ACC
    L,
    stride_sb,  # distances of two batches and of two tokens, in units
    stride_sl,
    unit_s,  # entries
    stride_tb,
    stride_tl,
    unit_t,
    lead,  # of all logits, see `row_start`
    V: tl.constexpr,  # entries of the common vocabulary
    SKEWED: tl.constexpr,
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0)
    if tl.load(Mask + n) == 0:
        tl.store(Difficulty + n, 0.0)
        store_normalizers(Normalizers1, n, Normalizers(0.0, 1.0, 0.0, 1.0))
        return
    S, skew = row_start(S, n, L, stride_sb, stride_sl, unit_s, lead, SKEWED)
    T, _ = row_start(T, n, L, stride_tb, stride_tl, unit_t, lead, SKEWED)
    tau = tl.full((), 1.0, ACC)
    normalizers, difficulty = sweep_distance(
        Rows(S, T, skew, exponent_scale(tau), V, SKEWED, TILES, LANES, VEC, WIDTH), exponent_rounding(tau)
    )
    tl.store(Difficulty + n, difficulty)
    store_normalizers(Normalizers1, n, normalizers)


def token_stats_fwd(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, Vs), (B, L, Vt), (B, L) bool -> (B, L) difficulty s², (4, B, L) normalisers."""
    dtype, acc = acc_type(student, teacher)
    difficulty = torch.empty(mask.shape, dtype=dtype, device=mask.device)
    normalizers_1 = torch.empty(4, mask.numel(), dtype=dtype, device=mask.device)
    vocab = min(student.shape[-1], teacher.shape[-1])
    mask = mask.contiguous()
    if mask.numel():
        config = launch_config("stats", "hellinger", vocab, student, teacher)
        with on_device(student):
            if row_parts(config, mask.numel(), vocab, student.device)[0] > 1:
                split_stats(student, teacher, mask, difficulty, normalizers_1, config)
            else:
                token_stats_fwd_kernel[(mask.numel(),)](
                    student, teacher, mask, difficulty, normalizers_1,
                    mask.shape[1], *row_strides(student), *row_strides(teacher),
                    V=vocab, ACC=acc, **config,
                )  # fmt: skip
    return difficulty, normalizers_1.view(4, *mask.shape)
