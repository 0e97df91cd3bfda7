"""Memory of this process: its peak, and the return of freed memory to the system; memory of the machine."""

import ctypes
import math
import os
import resource
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
        with open("/proc/self/status", encoding="ascii") as status:
            found = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")]
        if found:  # not every sandbox says
            return found[0]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def of_machine() -> float:
    """Memory of this machine in bytes, or less if its container is limited; infinite on systems that do not say."""
    found = [math.inf]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _LIMITS:
        with suppress(OSError, ValueError):  # there is no such file, or it says that there is no limit
            found.append(int(file.read_text("ascii")))
    return min(found)
