"""Start of one of several processes of a run, which waits for the others, and its exit after an error, at once.

A normal exit would wait for the other processes, which may be waiting for this one in a collective. They notice that it
is gone: immediately in a collective that it takes part in, otherwise after the heartbeat timeout that ``joining`` sets,
when JAX ends them and says why.
"""

import os
import sys
from contextlib import suppress

from spap_jax.cli.stopping import STOPPED
from spap_jax.errors import first_line

_LOST = ("gloo", "nccl", "unavailable", "heartbeat", "coordination service", "connection")
"""Words of which at least one occurs in a program's error when a process that takes part in it is gone."""


def wait_for_others(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of a run, if any, and shows whom it waits for; afterwards only one process prints.

    Raises:
        NotJoinedError, UserError: see ``joining.join``.
    """
    from spap_jax.cli.console import err, out, waiting
    from spap_jax.parallel.joining import AUTO, check_processes, join
    from spap_jax.parallel.processes import leads

    if any(each is not None for each in (coordinator, processes, process_id)):
        check_processes(coordinator, processes, process_id)
        whom = "the other processes"
        if coordinator != AUTO and processes is not None:
            others = "1 other process" if processes == 2 else f"{processes - 1} other processes"
            whom = f"{others} at {coordinator}, as process {process_id}"
        with waiting(f"waiting for {whom}"):
            join(coordinator, processes, process_id)
    out.quiet = err.quiet = not leads()


def of_several() -> bool:
    """Whether this process is one of several; JAX is not imported to find out."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()  # their number must not be queried before all have joined


def prefix() -> str:
    """Returns the prefix of messages from one of several processes; empty for a single process."""
    if not of_several():
        return ""
    import jax

    return f"process {jax.process_index()} of {jax.process_count()}: "


def loss(error: BaseException) -> tuple[int, str] | None:
    """Returns exit code and message if an error means that another process is gone; None for other errors."""
    if not of_several():
        return None
    import jax

    if not isinstance(error, jax.errors.JaxRuntimeError) or not any(word in str(error).lower() for word in _LOST):
        return None
    return STOPPED, (
        f"{prefix()}it ends because another one is gone ({first_line(error)}): what that one said tells why. The same "
        "command in all of them goes on from what is kept."
    )


def leave(code: int) -> None:
    """Ends this process immediately, without waiting for the others."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk, or a reader that is gone
            stream.flush()
    os._exit(code)
