"""The early end of a run: by SIGTERM, which a scheduler or a pod sends some seconds before it kills, or by an error."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spap_jax.checkpoint.store import FolderStore

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


@contextmanager
def telling(
    store: "FolderStore", before_end: list[Callable[[], str]], amount: Callable[[int, int], str]
) -> Iterator[None]:
    """Says what an interrupted process left, and what this one leaves if it ends early.

    Args:
        store: What is kept of the run; open it outside.
        before_end: The list of `stopping`.
        amount: Returns a clause on how far a run is, from the numbers of finished blocks and of checks that are kept.
    """
    from spap_jax.cli import console
    from spap_jax.errors import NotFiniteError
    from spap_jax.parallel.processes import is_leader

    def words() -> str:
        kept = store.kept()
        if not any(kept):
            return "nothing is kept yet."
        return f"{amount(*kept)}, kept in {store.place}: the same command goes on from there, --no-resume starts over."

    def end() -> str:
        store.settle()
        console.err.show_cursor()  # a progress bar has hidden it
        return words() if is_leader() else "what is kept is said by the first process."

    if store.found and any(store.kept()):
        console.err.print(f"going on: {amount(*store.kept())}, kept in {store.place}")
    before_end.append(end)
    try:
        yield
    except NotFiniteError:  # which is not resumed
        raise
    except BaseException:
        store.settle()  # the last block may not be on the disk yet
        if any(store.kept()):
            console.err.print(words())
        raise
    finally:
        before_end.remove(end)
