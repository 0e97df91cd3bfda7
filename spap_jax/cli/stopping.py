"""Handling of SIGTERM, which a pod, a spot instance or a scheduler sends some seconds before it kills a process."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPED = os.EX_TEMPFAIL
"""Exit code (75) of a run that the same command resumes: stopped by SIGTERM, or without its other processes."""


@contextmanager
def stopping() -> Iterator[list[Callable[[], str]]]:
    """Ends the process soon after SIGTERM, with the exit code `STOPPED`.

    Python runs a signal's handler between two operations of the main thread, one of which may be a program on the
    device that takes longer than the sender waits. So a separate thread waits for the signal and ends the process.

    Yields:
        A list for actions before the exit; each returns a sentence on the state of the run.
    """
    before_end: list[Callable[[], str]] = []
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)  # a Python handler, so that Python writes to the pipe
    pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, before_end), daemon=True)
    watcher.start()
    try:
        yield before_end
    finally:
        signal.set_wakeup_fd(pipe)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)  # None means a handler not set by Python
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(reading: int, before_end: list[Callable[[], str]]) -> None:
    """Reads the numbers of arriving signals until the pipe is closed; ends the process at SIGTERM."""
    while number := os.read(reading, 1):
        if number[0] == signal.SIGTERM:
            try:
                sentences = [each() for each in before_end]
                print(
                    "spap: stopped by SIGTERM;",
                    *(sentences or ["nothing was done since it began."]),
                    file=sys.stderr,
                    flush=True,
                )
            finally:
                os._exit(STOPPED)
