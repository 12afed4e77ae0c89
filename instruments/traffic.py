"""Counts what Triton kernels ask of memory, in the interpreter: bytes by argument, strays, writes of each byte.

Only the lanes that a mask lets through count, as on a GPU. An access belongs to the arguments of its own launch, so
whatever a kernel touches beyond them is a stray, even where that happens to be some other tensor. A stray is counted
and not carried out.

A second read of the same byte counts again. But of (B, L, V) tensors it is told from the first look of a launch, with
its distance: how many other bytes of such tensors the launch touched since the last access, in the order of the
programs. A cache that holds as many bytes for every program that runs at a time serves it.

It cannot find a wrong entry of the right row, an access that is too narrow for a GPU, or what a real cache does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from .memory import Rows

_Builder = interpreter.InterpreterBuilder


class Argument:
    """A tensor argument of one launch. Arguments that share memory (a gradient in place) share the counts."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.dim = tensor.dim()
        self.rows = Rows(name, tensor)
        self.itemsize = tensor.element_size()
        self.read = 0
        self.first_looks = 0  # bytes that were read before any other access
        self.touched = np.zeros(len(self.rows) if self.dim == 3 else 0, np.int64)  # time of the last access, or 0
        self.times_written = np.zeros(len(self.rows), np.int64)

    @property
    def written(self) -> int:
        return int(self.times_written.sum())


class Launch:
    """One launch of a kernel: its tensor arguments and the accesses that belong to none of them."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.kernel = kernel
        self.strays: list[str] = []
        self.time = 0
        self.distance = 0  # the largest of a repeated look, in bytes
        self.arguments: list[Argument] = []
        seen = set()
        for name, tensor in tensors.items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and key not in seen:
                seen.add(key)
                self.arguments.append(Argument(name, tensor))

    def argument(self, name: str) -> Argument:
        return next(argument for argument in self.arguments if argument.name == name)

    def note(self, kind: str, pointers: Any, mask: Any) -> Any:
        """Count a load or a store of a block of pointers; the mask without the strays."""
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        addresses = np.asarray(pointers.data).astype(np.int64)
        self.time += 1
        left = np.broadcast_to(np.asarray(mask.data, bool), addresses.shape).copy()
        allowed = np.zeros_like(left)
        for argument in self.arguments:
            places = argument.rows.locate(addresses, size)
            mine = left & (places >= 0)
            if kind == "read":
                argument.read += int(mine.sum()) * size
            else:
                for byte in range(size):
                    np.add.at(argument.times_written, places[mine] + byte, 1)
            if argument.dim == 3 and mine.any():
                self._look(kind, argument, (places[mine][:, None] + np.arange(size)).ravel())
            left, allowed = left & ~mine, allowed | mine
        for address in addresses[left][:1]:
            nearest = min(self.arguments, key=lambda argument: argument.rows.distance(address))
            self.strays.append(
                f"{self.kernel}: {left.sum()} lanes {kind} outside every argument, the first "
                f"{nearest.rows.distance(address)} bytes from {nearest.name}"
            )
        return interpreter.TensorHandle(allowed, mask.dtype)

    def _look(self, kind: str, argument: Argument, places: np.ndarray) -> None:
        """Tell first looks from repeated ones, of bytes of a (B, L, V) tensor."""
        places = np.unique(places)
        last = argument.touched[places]
        if kind == "read":
            argument.first_looks += int((last == 0).sum())
            if last.any():
                oldest = last[last > 0].min()
                since = sum(int((other.touched > oldest).sum()) for other in self.arguments)
                self.distance = max(self.distance, since)
        argument.touched[places] = self.time


class Traffic(list[Launch]):
    """The launches since counting began."""

    def passes(self) -> tuple[int, int]:
        """Bytes (read, written) of (B, L, V) tensors, the unit of the method's cost."""
        large = [argument for launch in self for argument in launch.arguments if argument.dim == 3]
        return sum(argument.read for argument in large), sum(argument.written for argument in large)

    def first_looks(self) -> int:
        """Bytes of (B, L, V) tensors that each launch reads for the first time: what a large enough cache leaves."""
        return sum(argument.first_looks for launch in self for argument in launch.arguments)

    def per_token(self) -> int:
        """Bytes read and written of all other tensors."""
        small = [argument for launch in self for argument in launch.arguments if argument.dim < 3]
        return sum(argument.read + argument.written for argument in small)

    def faults(self) -> list[str]:
        """Strays, and results that are not written exactly once a byte."""
        found = [stray for launch in self for stray in launch.strays]
        for launch in self:
            for argument in launch.arguments:
                times = argument.times_written
                if times.any() and not (times == 1).all():
                    found.append(
                        f"{launch.kernel}: of {len(times)} bytes of {argument.name}, {int((times == 0).sum())} are "
                        f"never written and {int((times > 1).sum())} more than once"
                    )
        return found


@contextmanager
def counting() -> Iterator[Traffic]:
    """Inside, every launch in the interpreter is counted."""
    traffic = Traffic()
    run, load, store = interpreter.GridExecutor.__call__, _Builder.create_masked_load, _Builder.create_masked_store

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        assert all(tensor.device.type == "cpu" for tensor in tensors.values()), "a copy would have other addresses"
        traffic.append(Launch(self.fn.__name__, tensors))
        run(self, *args, **kwargs)

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        return load(self, pointers, traffic[-1].note("read", pointers, mask), *args)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, pointers, value, traffic[-1].note("written", pointers, mask), *args)

    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("this kind of access is not counted")

    uncounted: dict[str, Any] = {
        name: refused for name in dir(_Builder) if name.startswith(("create_atomic", "create_descriptor_"))
    }
    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_run),
        mock.patch.multiple(_Builder, create_masked_load=counted_load, create_masked_store=counted_store),
        mock.patch.multiple(_Builder, **uncounted),
    ):
        yield traffic
