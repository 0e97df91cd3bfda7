"""SIGTERM: what a pod, a spot instance or a scheduler sends some seconds before it ends a process for good."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPED = os.EX_TEMPFAIL
"""The exit code 75 of a run that was told to end: the same command goes on where it stopped."""


@contextmanager
def stopping() -> Iterator[list[Callable[[], str]]]:
    """Ends the process soon after SIGTERM, with the exit code `STOPPED`.

    Python runs a signal's handler between two of the main thread's operations, and one of those may be a program on the
    device that takes longer than the sender waits. So a thread of its own waits for the signal, and ends the process.

    Yields:
        What to do before the end: each gives a sentence on what becomes of the run.
    """
    before_end: list[Callable[[], str]] = []
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)  # a handler of Python's, so that the pipe is told
    pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, before_end), daemon=True)
    watcher.start()
    try:
        yield before_end
    finally:
        signal.set_wakeup_fd(pipe)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)  # None stands for one that Python does not know
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(reading: int, before_end: list[Callable[[], str]]) -> None:
    """Reads the numbers of the signals that come, until nothing can come any more."""
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
