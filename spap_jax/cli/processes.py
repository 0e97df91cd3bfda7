"""How one of several processes of a run begins, by waiting for the others, and how it ends by an error: at once.

On the usual way out it would wait for the others, which may be waiting for it in the middle of a sum. They notice that
it is gone: where it was to take part in a sum at once, elsewhere after the seconds of silence that ``devices`` allows,
when JAX ends them and says why.
"""

import os
import sys

from spap_jax.cli.stopping import STOPPED
from spap_jax.hub import first_line

_LOST = ("gloo", "nccl", "unavailable", "heartbeat", "coordination service", "connection")
"""What the error of a program speaks of, one of them at least, when a process that was to take part in it is gone."""


def wait_for_others(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of a run, if there are any, and says whom this one waits for; later only one prints.

    Raises:
        UserError: see ``joining.join``.
    """
    from spap_jax.cli.console import err, out, waiting
    from spap_jax.devices import leads
    from spap_jax.joining import AUTO, check_processes, join

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

    return jax.distributed.is_initialized()  # how many there are is not to be asked before all have come


def prefix() -> str:
    """What the sentence of one of several processes begins with; nothing where there is one process."""
    if not of_several():
        return ""
    import jax

    return f"process {jax.process_index()} of {jax.process_count()}: "


def loss(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the sentence of a process whose error means that another one is gone; None for other errors."""
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
    """Ends this process without a farewell to the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
