"""Locks on places that only one process of a machine at a time may write to."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from spap_jax.errors import UserError


def take_lock(file: Path, what: str) -> int:
    """Takes a lock, which ends with the process however that ends, and returns its handle.

    Args:
        file: The file that is locked, which is made if it does not exist; remove it before the handle is closed.
        what: What only one process may do, after "another process".

    Raises:
        UserError: Another process has the lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process {what}: wait for it, or end it.") from None
    except OSError:  # some network file systems have no locks
        pass
    if os.fstat(handle).st_nlink:
        return handle
    os.close(handle)  # whoever had the lock removed the file after it was opened here
    return take_lock(file, what)


@contextlib.contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Holds a lock inside; see `take_lock`."""
    handle = take_lock(file, what)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)
