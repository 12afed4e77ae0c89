"""Which implementation an op takes on a device, and why.

The reference (plain torch) is the default body of every op, so every device works. Triton replaces it on CUDA and ROCm,
and on the CPU where the process was started with TRITON_INTERPRET=1, so that the real kernels run without a GPU.
Otherwise the C++ kernels replace it on the CPU, where they are built.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native

_LIBRARY: Any = torch.library.Library("adakd", "FRAGMENT")  # type: ignore[no-untyped-call]


class Backend(NamedTuple):
    """An implementation and the reason it is taken."""

    name: str
    reason: str


def _interpreting() -> bool:
    """Triton reads the variable when its kernels are defined, so it has to be set before the process starts."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend(device_type: str) -> Backend:
    """The implementation of the `adakd::` ops for tensors on a device of this type ('cpu', 'cuda', 'mps', ...)."""
    if device_type in _triton_devices():
        if device_type == "cpu":
            return Backend(
                "triton-interpreter", "TRITON_INTERPRET=1 is set: the GPU kernels run in Triton's interpreter"
            )
        return Backend("triton", f"Triton is installed and compiles for {device_type}")
    if device_type == "cpu":
        in_use, reason = load_native()
        return (
            Backend("native", f"the C++ kernels are built; they use {reason} here")
            if in_use
            else Backend("reference", reason)
        )
    if device_type == "cuda":
        reason = "TRITON_INTERPRET is set" if _interpreting() else "Triton is not installed: pip install triton"
    else:
        reason = f"there is no kernel for {device_type}"
    return Backend("reference", reason)


def _triton_devices() -> tuple[str, ...]:
    if not _triton_installed():
        return ()
    return ("cpu",) if _interpreting() else ("cuda",)


def load_native() -> tuple[bool, str]:
    """Put the C++ kernels in place, unless the interpreter is: (whether they are, the instruction set or why not)."""
    if "cpu" in _triton_devices():
        return False, "TRITON_INTERPRET=1 is set"
    return native.load()


@cache
def report_plain_torch() -> None:
    """When an op first runs in plain torch on the CPU, and nobody asked for that: say so, with the reason.

    Raises:
        RuntimeError: ADAKD_NATIVE=1 asks for the C++ kernels.
    """
    taken, wanted = backend("cpu"), os.environ.get("ADAKD_NATIVE")
    if taken.name != "reference" or wanted == "0":
        return
    if wanted == "1":
        raise RuntimeError(f"ADAKD_NATIVE=1, but {taken.reason}")
    warnings.warn(
        "adakd_kernels computes on the CPU in plain torch, which takes many times as long as its C++ kernels: "
        f"{taken.reason}. ADAKD_NATIVE=0 asks for plain torch, without this warning.",
        stacklevel=2,
    )


def operator(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `adakd::name`, which changes none of its arguments; the function is its reference body.

    The schema is that of the function's annotations, unless it is given. `torch.library.custom_op` would run Python
    between the caller and the kernel, which takes longer than a small batch. An operator that takes floats has an
    overload `in_graph` that takes 0-d tensors in their places, for `call`.
    """

    def define(body: Callable[..., Any]) -> Any:
        inferred = torch.library.infer_schema(body, mutates_args=()) if schema is None else schema
        _LIBRARY.define(name + inferred, tags=torch.Tag.pt2_compliant_tag)

        @wraps(body)
        def reported(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(x, Tensor) and x.is_cpu for x in args):
                report_plain_torch()
            return body(*args, **kwargs)

        _LIBRARY.impl(name, reported, "CompositeExplicitAutograd")
        op = getattr(torch.ops.adakd, name).default
        floats = [i for i, argument in enumerate(op._schema.arguments) if "float" in str(argument.type)]
        if floats:

            def on_numbers(*args: Any) -> Any:
                return op(*(x.item() if i in floats and x is not None else x for i, x in enumerate(args)))

            of_tensors = re.sub(r"\bfloat\b", "Tensor", inferred)
            _LIBRARY.define(f"{name}.in_graph{of_tensors}", tags=torch.Tag.pt2_compliant_tag)
            _LIBRARY.impl(f"{name}.in_graph", on_numbers, "CompositeExplicitAutograd")
        return op

    return define


def call(op: Any, *args: Any) -> Any:
    """The result of an `operator` that takes floats.

    Where torch.compile traces and one of them changes, the overload `in_graph` takes them: as floats they would be
    constants of the graph, and each value would compile another one.
    """
    if not torch.compiler.is_compiling():
        return op(*args)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # and all of sympy

    if not all(has_static_value(x) for x in args if isinstance(x, float)):
        one = torch.ones((), dtype=torch.float64, device="cpu")  # whose value no GPU has to be waited for
        args = tuple(one * x if isinstance(x, float) else x for x in args)
        op = op.overloadpacket.in_graph
    return op(*args)


def register_fake(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function, which reads no float, gives the shapes of what an `operator` returns."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        for overload in op.overloadpacket.overloads():
            torch.library.register_fake(getattr(op.overloadpacket, overload), fake, lib=_LIBRARY)
        return fake

    return register


def register_triton(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function, which imports Triton when first called, is the op's kernel where Triton is taken."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        for device_type in _triton_devices():
            torch.library.register_kernel(op, device_type, kernel, lib=_LIBRARY)
        return kernel

    return register
