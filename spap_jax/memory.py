"""The memory of this process: what it has held, and what it gives back to the system."""

import ctypes
import resource
import sys

_MMAP_THRESHOLD = -3


def return_large_buffers() -> None:
    """Has glibc give every large buffer back when it is freed.

    By default it keeps those of up to 32 MB, and with the buffers of one layer after another the process ends up a
    quarter larger than what it holds. Other C libraries have no such setting and need none.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(_MMAP_THRESHOLD, 1 << 20)


def return_scraps() -> None:
    """Has glibc give back what it keeps of freed small pieces: hundreds of megabytes after a large program compiled."""
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


def peak() -> int:
    """Highest resident memory of this process, in bytes."""
    if sys.platform == "linux":  # where rusage counts what the parent held when it started this process
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _glibc(name: str):
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
