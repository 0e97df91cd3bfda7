"""Memory of this process: its peak, what is left for it, what it gives back; memory and disks of the machine."""

import ctypes
import math
import os
import resource
import shutil
import sys
from contextlib import suppress
from pathlib import Path

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may use, in either version of its control groups."""


def return_scraps() -> None:
    """Makes glibc return what it keeps of freed memory: hundreds of megabytes after a large program was compiled.

    It keeps buffers of up to 32 MB for the next that are asked for. Inside a layer or a step that is right: with every
    buffer returned at once, page faults took a third of the time of steps on a CPU.
    """
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    if sys.platform == "linux":  # where rusage counts the parent's memory at the start of this process
        with suppress(StopIteration):  # not every sandbox says
            return _kilobytes("/proc/self/status", "VmHWM")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def left() -> float:
    """Memory that this process may still take, in bytes; infinite on systems that do not say."""
    found = [math.inf]
    with suppress(OSError, StopIteration):
        found += [of_machine() - _kilobytes("/proc/self/status", "VmRSS"), _kilobytes("/proc/meminfo", "MemAvailable")]
    return min(found)


def _kilobytes(file: str, name: str) -> int:
    """Reads an amount from a file of Linux about memory, in bytes."""
    with open(file, encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def free_disk(folder: Path) -> float:
    """Bytes that are free on the disk of a folder; infinite on network file systems that report a size of 0."""
    disk = shutil.disk_usage(folder)
    return disk.free if disk.total else math.inf


def of_machine() -> float:
    """Memory of this machine in bytes, or less if its container is limited; infinite on systems that do not say."""
    found = [math.inf]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _LIMITS:
        with suppress(OSError, ValueError):  # there is no such file, or it says that there is no limit
            found.append(int(file.read_text("ascii")))
    return min(found)
