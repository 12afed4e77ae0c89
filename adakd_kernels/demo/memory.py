"""A setting of the C library that a small model on a CPU gains from."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation, in the whole process; elsewhere nothing happens.

    By default every tensor above 32 MiB is returned to the system when freed, and the next one is mapped and zeroed
    page by page. On a virtual machine that took longer than the arithmetic on it.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
