"""Loads the C++ kernels for the CPU, which `setup.py` builds from python_bindings/ where it can.

Loading the library registers them as the CPU kernels of the ops. The environment decides before that: ADAKD_NATIVE=0
leaves them out, ADAKD_NATIVE=1 makes their absence an error, ADAKD_NATIVE=<path> takes that library; ADAKD_ISA (avx512,
avx2, portable) picks the instruction set, which is otherwise the widest that the processor has.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

BUILT = Path(__file__).parent.parent / "_native.so"


@cache
def load() -> tuple[bool, str]:
    """(whether the C++ kernels are in use, the instruction set or why they are not).

    Raises:
        ImportError: ADAKD_NATIVE asks for them, and they are missing or cannot be loaded, or ADAKD_ISA names an
            instruction set that the processor lacks.
    """
    wanted = os.environ.get("ADAKD_NATIVE", "")
    if wanted == "0":
        return False, "ADAKD_NATIVE=0 leaves the C++ kernels out"
    if not path().exists():
        why = (
            "the C++ kernels are not built: install the package with a C++ compiler and torch 2.10 or newer at hand, "
            "by pip install --no-build-isolation"
        )
        if wanted:
            raise ImportError(f"ADAKD_NATIVE={wanted}, but there is no {path()}: {why}")
        return False, why
    try:
        library()
    except OSError as error:  # such as the name of a function that an older torch lacks
        why = (
            f"the C++ kernels cannot be loaded with torch {torch.__version__} ({error}); with torch 2.10 or newer, "
            "build them anew"
        )
        if wanted:
            raise ImportError(f"ADAKD_NATIVE={wanted}, but {why}") from error
        return False, why
    if not library().adakd_isa():
        raise ImportError(
            f"ADAKD_ISA must be unset or one of {', '.join(instruction_sets())} on this processor, "
            f"got {os.environ.get('ADAKD_ISA')!r}"
        )
    torch.ops.load_library(str(path()))  # type: ignore[no-untyped-call]
    return True, library().adakd_isa().decode()


def path() -> Path:
    """Where the library is, or would be."""
    wanted = os.environ.get("ADAKD_NATIVE", "")
    return BUILT if wanted in ("", "0", "1") else Path(wanted)


def instruction_sets() -> list[str]:
    """Those that this processor has and the library was built for, the widest first."""
    names: bytes = library().adakd_instruction_sets()
    return names.decode().split()


def divergences() -> set[str]:
    """Names of the divergences that the library was built with; an older library does not tell."""
    tell = getattr(library(), "adakd_divergences", None)
    if tell is None:
        return set()
    tell.restype = ctypes.c_char_p
    return set(tell().decode().split())


@cache
def library() -> ctypes.CDLL:
    """The library's plain C functions."""
    loaded = ctypes.CDLL(str(path()))
    loaded.adakd_isa.restype = ctypes.c_char_p
    loaded.adakd_instruction_sets.restype = ctypes.c_char_p
    return loaded
