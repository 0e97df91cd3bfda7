"""Turns every exception of a command into an exit code and one sentence."""

import os
import sys
from contextlib import suppress

from cyclopts import CycloptsError

from spap_jax.cli.stopping import STOPPED
from spap_jax.errors import NotJoinedError, UserError, first_line

_EXHAUSTED = "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED"
"""What JAX, CUDA and its libraries say when memory is exhausted."""

_LOST = "gloo", "nccl", "unavailable", "heartbeat", "coordination service", "connection"
"""Words of which at least one is in the error of a program when one of its processes is gone."""


def failure(error: BaseException) -> tuple[int, str]:
    """Returns the exit code of a failed command and its message for standard error."""
    if isinstance(error, NotJoinedError):
        return STOPPED, str(error)
    if isinstance(error, UserError | CycloptsError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or "interrupted; no unfinished output is left."
    process = _process()
    if process and _is_loss(error):
        return STOPPED, (
            f"{process}it ends because another one is gone ({first_line(error)}): what that one said tells why. The "
            "same command in all of them goes on from what is kept."
        )
    sentence = _no_device(error) or _no_memory(error) or _no_access(error)
    if sentence is not None:
        return 2, f"{process}{sentence}"
    kind = type(error).__name__
    what = kind if first_line(error) == kind else f"{kind}: {first_line(error)}"
    return 1, (
        f"{process}something unexpected happened ({what}), which is a fault of spap: run the same command with --debug "
        "to see where, and please report it with what spap doctor shows."
    )


def is_one_of_several() -> bool:
    """Whether this process is one of several; JAX is not imported to find out."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()  # their number must not be queried before all have joined


def leave(code: int) -> None:
    """Ends one of several processes at once.

    A normal exit would wait for the others, which may be waiting for this one in a collective. They notice that it is
    gone: immediately in a collective that it takes part in, otherwise after a minute without a heartbeat.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk, or a reader that is gone
            stream.flush()
    os._exit(code)


def _process() -> str:
    """Returns the prefix of messages from one of several processes; empty for a single process."""
    if not is_one_of_several():
        return ""
    import jax

    return f"process {jax.process_index()} of {jax.process_count()}: "


def _is_loss(error: BaseException) -> bool:
    """Whether an error means that another process is gone."""
    import jax

    # Reading an array raises a ValueError of the same words as the program.
    of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return of_jax and any(word in str(error).lower() for word in _LOST)


def _no_device(error: BaseException) -> str | None:
    """Returns a message if JAX finds no device; JAX is not imported to find out."""
    if "jax" not in sys.modules:
        return None
    from spap_jax.backend import missing_backend

    return missing_backend(error)


def _no_access(error: BaseException) -> str | None:
    """Returns a message if the system denies the use of a file or folder, which does not merit a traceback."""
    if not isinstance(error, OSError) or error.filename is None or not error.strerror:
        return None
    return f"{error.filename} cannot be used ({error.strerror}): check the path, and who may read and write there."


def _no_memory(error: BaseException) -> str | None:
    """Returns a message with advice if memory ran out, on the machine or on a device."""
    if not isinstance(error, MemoryError) and not any(word in str(error) for word in _EXHAUSTED):
        return None
    return (
        f"there is not enough memory ({first_line(error)}): fewer --sequences, a smaller --batch-tokens, --joint-last "
        "or --batch, or more --model-devices need less, and on a GPU XLA_CLIENT_MEM_FRACTION=0.95 gives more."
    )
