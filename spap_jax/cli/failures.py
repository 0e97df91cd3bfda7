"""How a command that fails ends: with an exit code and one sentence, whatever was raised."""

import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from spap_jax.cli import processes
from spap_jax.errors import UserError
from spap_jax.hub import first_line

_LESS_MEMORY = {
    "--batch-tokens": "a smaller --batch-tokens",
    "--stream-dtype": "--stream-dtype bfloat16",
    "--effort": "--effort low",
    "--sequences": "fewer --sequences",
    "--batch": "a smaller --batch",
    "--prompt": "a shorter --prompt",
    "--model-devices": "weights divided among several --model-devices",
}
"""What needs less memory, by the option that a command has to have for it."""


def failure(error: BaseException, words: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command that ends by an error, and what it says on standard error.

    Args:
        error: What was raised.
        words: Words of the command line.
    """
    if isinstance(error, UserError | CycloptsError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; no unfinished output is left."
    if (lost := processes.loss(error)) is not None:
        return lost
    sentence = _no_device() or _no_memory(error, words) or _no_access(error)
    if sentence is not None:
        return 2, f"{processes.prefix()}{sentence}"
    kind = type(error).__name__
    what = kind if first_line(error) == kind else f"{kind}: {first_line(error)}"
    return 1, (
        f"{processes.prefix()}something unexpected happened ({what}), which is a fault of spap: run the same command "
        "with --debug to see where, and please report it with what spap doctor shows."
    )


def _no_device() -> str | None:
    """What is wrong where JAX finds no device; JAX is not imported to find out."""
    if "jax" not in sys.modules:
        return None
    from spap_jax.backend import missing_backend

    return missing_backend()


def _no_access(error: BaseException) -> str | None:
    """What the system says of a file or a folder that it does not let us use: it is not the place for a traceback."""
    if not isinstance(error, OSError) or error.filename is None or not error.strerror:
        return None
    return f"{error.filename} cannot be used ({error.strerror}): check the path, and who may read and write there."


def _no_memory(error: BaseException, words: Sequence[str]) -> str | None:
    """What helps where memory ran out, on the machine or on a device."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return None
    from spap_jax.cli.app import option_names

    ways = [way for name, way in _LESS_MEMORY.items() if name in option_names(words)]
    advice = f"{', '.join(ways[:-1])} or {ways[-1]} needs less" if len(ways) > 1 else "use a machine that has more"
    return f"there is not enough memory ({first_line(error)}): {advice}."
