"""Loads the C++ kernels for the CPU, which `setup.py` builds from python_bindings/ where it can.

Loading the library registers them as the CPU kernels of the ops. The environment decides before that: ADAKD_NATIVE=0
leaves them out, ADAKD_NATIVE=1 makes their absence an error of the first loss, ADAKD_NATIVE=<path> takes that library;
ADAKD_ISA (avx512, avx2, portable) picks the instruction set, which is otherwise the widest that the processor has.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from functools import cache
from pathlib import Path

import torch

BUILT = Path(__file__).parent.parent / "_native.so"
CURE = (
    "install the package with a C++ compiler, torch 2.10 and setuptools 77 or newer at hand, by "
    "pip install --no-build-isolation"
    if platform.system() != "Windows"
    else "there are none for Windows"
)


@cache
def load() -> tuple[bool, str]:
    """(whether the C++ kernels are in use, the instruction set or why they are not and what helps)."""
    if os.environ.get("ADAKD_NATIVE") == "0":
        return False, "ADAKD_NATIVE=0 leaves the C++ kernels out"
    if path() != BUILT and not path().is_file():
        return False, f"ADAKD_NATIVE must be 0, 1 or the path of a library, and there is no {path()}: unset it"
    if not path().is_file():
        return False, f"the C++ kernels are not built: {CURE}"
    try:
        library()
        if not library().adakd_isa():
            return False, (
                f"ADAKD_ISA must be one of {', '.join(instruction_sets())} on this processor, got "
                f"{os.environ.get('ADAKD_ISA')!r}: unset it"
            )
        torch.ops.load_library(str(path()))  # type: ignore[no-untyped-call]
    except (OSError, AttributeError, RuntimeError) as error:  # such as a function that an older torch lacks
        return False, f"the C++ kernels cannot be loaded with torch {torch.__version__} ({error}): {CURE}"
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
    """The library's plain C functions.

    Raises:
        OSError: the file is incomplete, or no library that this process can load.
        AttributeError: it is another library.
    """
    refuse_incomplete(path())
    loaded = ctypes.CDLL(str(path()))
    loaded.adakd_isa.restype = ctypes.c_char_p
    loaded.adakd_instruction_sets.restype = ctypes.c_char_p
    return loaded


def refuse_incomplete(file: Path) -> None:
    """Raise OSError if an ELF file ends before its program does: to load that kills the process, with no exception."""
    data = file.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:  # 64 bits, little-endian; the loader refuses what it is not
        return
    (table,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<2H", data, 54)
    if size != 56:  # the loader refuses entries of another size too
        return
    ends = [table + size * count]
    if ends[0] <= len(data):
        segments = [struct.unpack_from("<I4xQ16xQ", data, table + size * index) for index in range(count)]
        ends += [offset + length for _, offset, length in segments]
    if max(ends) > len(data):
        raise OSError(f"{file}: the file has {len(data)} bytes, and its program {max(ends)}")
