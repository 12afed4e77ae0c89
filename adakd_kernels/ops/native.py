"""Loads the C++ kernels for the CPU, which `setup.py` builds from python_bindings/ where it can.

Loading the library registers them as the CPU kernels of the ops. The environment decides before that: ADAKD_NATIVE=0
leaves them out, ADAKD_NATIVE=1 makes their absence an error, ADAKD_ISA (avx512, avx2, portable) picks the instruction
set, which is otherwise the widest that the processor has.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent.parent / "_native.so"


@cache
def load() -> tuple[bool, str]:
    """(whether the C++ kernels are in use, the instruction set or why they are not).

    Raises:
        ImportError: ADAKD_NATIVE=1 and there are none, or ADAKD_ISA names an instruction set that is not there.
    """
    wanted = os.environ.get("ADAKD_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise ImportError(f"ADAKD_NATIVE must be 0 (never), 1 (or fail) or unset (where built), got {wanted!r}")
    if wanted == "0":
        return False, "ADAKD_NATIVE=0 leaves the C++ kernels out"
    if not LIBRARY.exists():
        why = "the C++ kernels are not built: pip install --no-build-isolation, with a compiler and torch installed"
        if wanted == "1":
            raise ImportError(f"ADAKD_NATIVE=1, but {why}")
        return False, why
    isa = library().adakd_isa()
    if isa is None:
        raise ImportError(
            f"ADAKD_ISA must be avx512, avx2 or portable, and one that this processor has, got "
            f"{os.environ.get('ADAKD_ISA')!r}; leave it unset for the widest there is"
        )
    torch.ops.load_library(str(LIBRARY))
    return True, isa.decode()


@cache
def library() -> ctypes.CDLL:
    """The library's plain C functions."""
    loaded = ctypes.CDLL(str(LIBRARY))
    loaded.adakd_isa.restype = ctypes.c_char_p
    return loaded
