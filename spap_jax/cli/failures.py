"""Turns every exception of a command into an exit code and one sentence."""

import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from spap_jax.cli import processes
from spap_jax.cli.stopping import STOPPED
from spap_jax.errors import NotJoinedError, UserError, first_line

_LESS_MEMORY = {
    "--batch-tokens": "a smaller --batch-tokens",
    "--stream-dtype": "--stream-dtype bfloat16",
    "--effort": "--effort low",
    "--joint-blocks": "a smaller --joint-blocks",
    "--sequences": "fewer --sequences",
    "--batch": "a smaller --batch",
    "--prompt": "a shorter --prompt",
    "--model-devices": "weights divided among several --model-devices",
}
"""Ways to need less memory, keyed by the option that a command must have for each."""


_EXHAUSTED = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED")
"""What JAX, CUDA and its libraries say of memory that is not there."""


def failure(error: BaseException, words: Sequence[str]) -> tuple[int, str]:
    """Returns the exit code of a failed command, and its message for standard error.

    Args:
        error: The exception that was raised.
        words: Words of the command line.
    """
    if isinstance(error, NotJoinedError):
        return STOPPED, str(error)
    if isinstance(error, UserError | CycloptsError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or "interrupted; no unfinished output is left."
    if (lost := processes.loss(error)) is not None:
        return lost
    sentence = _no_device(error) or _no_memory(error, words) or _no_access(error)
    if sentence is not None:
        return 2, f"{processes.prefix()}{sentence}"
    kind = type(error).__name__
    what = kind if first_line(error) == kind else f"{kind}: {first_line(error)}"
    return 1, (
        f"{processes.prefix()}something unexpected happened ({what}), which is a fault of spap: run the same command "
        "with --debug to see where, and please report it with what spap doctor shows."
    )


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


def _no_memory(error: BaseException, words: Sequence[str]) -> str | None:
    """Returns a message with advice if memory ran out, on the machine or on a device."""
    if not isinstance(error, MemoryError) and not any(said in str(error) for said in _EXHAUSTED):
        return None
    from spap_jax.cli.app import option_names

    ways = [way for name, way in _LESS_MEMORY.items() if name in option_names(words)]
    advice = f"{', '.join(ways[:-1])} or {ways[-1]} needs less" if len(ways) > 1 else "use a machine that has more"
    more = "" if isinstance(error, MemoryError) else _more_of_the_device()
    return f"there is not enough memory ({first_line(error)}): {advice}.{more}"


def _more_of_the_device() -> str:
    import jax

    from spap_jax.backend import more_memory

    return more_memory(jax.default_backend())
