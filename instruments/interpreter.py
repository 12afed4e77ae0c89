"""Makes Triton's interpreter strict where it is laxer than a GPU.

As shipped, it truncates fp32 to bf16 where hardware rounds to nearest even, loses fp64 on the way there, computes on
the raw bits of bf16 operands where a kernel forgot to cast them, rounds twice in a fused multiply-add, and takes NaN
for the smaller and the larger of NaN and a number. Here the cast is exact, arithmetic on bf16 is an error, a fused
multiply-add rounds once, and of NaN and a number the number is taken, as on a GPU.

So the interpreter finds wrong formulas, masks and types. It cannot find what the compiler makes of a kernel (a spill,
a lost barrier, a race, a narrow access), and exp2 and log2 are numpy's instead of the approximations of a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from . import bf16

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_ARITHMETIC = ("create_f", "create_exp", "create_log", "create_sqrt", "create_rsqrt", "create_max", "create_min")
_CASTS = ("create_fp_ext", "create_fp_trunc", "create_fp_to_fp", "create_fp_to_si", "create_fp_to_ui")


def install() -> None:
    """Patch the interpreter of this process, once."""
    if getattr(_Builder, "strict_bf16", False):
        return
    shipped_cast = _Builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return _Handle(bf16.widened(src.data), target)
        if source in (tl.float32, tl.float64) and target == tl.bfloat16:
            # Hardware goes from fp64 by way of fp32; the interpreter as shipped makes 0 of most fp64 numbers.
            return _Handle(bf16.rounded(src.data.astype(np.float32), nan=0x7FC0), target)
        return shipped_cast(self, src, dst_type)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wider = {4: np.float64, 8: np.longdouble}.get(z.data.dtype.itemsize, np.float32)
        exact = x.data.astype(wider) * y.data.astype(wider) + z.data.astype(wider)
        return _Handle(exact.astype(z.data.dtype), z.dtype.scalar)

    def refusing(name: str, method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(arg, _Handle) and arg.dtype.scalar == tl.bfloat16 for arg in args):
                raise TypeError(f"{name} on bf16: the kernel must cast to the accumulation type first")
            return method(self, *args, **kwargs)

        return call

    _Builder.cast_impl = cast_impl
    _Builder.create_fma = create_fma
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(_Builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    _Builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    _Builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    for name in dir(_Builder):
        if name.startswith(_ARITHMETIC) and name not in _CASTS:
            setattr(_Builder, name, refusing(name, getattr(_Builder, name)))
    for reductions in (interpreter.ReduceOps, interpreter.ScanOps):
        shipped_apply = reductions.apply_impl

        def apply_impl(self: Any, inputs: Any, shipped_apply: Any = shipped_apply) -> Any:
            if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
                raise TypeError("a reduction of bf16: the kernel must cast to the accumulation type first")
            return shipped_apply(self, inputs)

        reductions.apply_impl = apply_impl
    _Builder.strict_bf16 = True
