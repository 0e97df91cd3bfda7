"""Memory of this process: its peak, and the return of freed memory to the system; memory of the machine."""

import ctypes
import math
import os
import resource
import sys

_MMAP_THRESHOLD = -3


def return_large_buffers() -> None:
    """Makes glibc return every large buffer to the system when it is freed.

    By default it keeps buffers of up to 32 MB, and as layer after layer allocates its buffers, the process grows a
    quarter larger than the memory in use. Other C libraries have no such setting and need none.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(_MMAP_THRESHOLD, 1 << 20)


def return_scraps() -> None:
    """Makes glibc return freed small allocations: hundreds of megabytes after a large program was compiled."""
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    if sys.platform == "linux":  # where rusage counts the parent's memory at the start of this process
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def of_machine() -> float:
    """Memory of this machine in bytes; infinite on systems that do not say."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def _glibc(name: str):
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
