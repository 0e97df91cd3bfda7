"""What users are told: errors, warnings and notices, and how all spell the options that they speak of."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parent)

_FLAGS = ContextVar("flags", default=False)


class UserError(ValueError):
    """Something that the user can put right: the message says in one sentence what happened, why, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class NotFiniteError(UserError):
    """Numbers that overflow in the course of a run, which the same run would meet again: nothing goes on from there."""


class SpapWarning(UserWarning):
    """A result that is likely not what was meant: it was computed all the same, and the message says why in a sentence.

    The command line prints it as one line on standard error.
    """


class Notice(SpapWarning):
    """Something worth knowing that stops nothing: one sentence, which the command line prints as a line of its own."""


def warn(sentence: str) -> None:
    """Warns with a `SpapWarning` that names the line outside of this package that led to it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, SpapWarning, stacklevel=level)


@contextmanager
def naming_flags() -> Iterator[None]:
    """Within this context `option` spells the flags of the command line, which enters it; elsewhere Python arguments.

    Threads that are started inside begin with the spelling of Python.
    """
    before = _FLAGS.set(True)
    try:
        yield
    finally:
        _FLAGS.reset(before)


def option(name: str, value: Any = None) -> str:
    """An option as the user has to write it, for a message that may be read in a terminal or in a notebook.

    Args:
        name: The name of the argument in Python, such as "round_to".
        value: The value to suggest for it; None names the option alone.

    Returns:
        On the command line "--round-to", "--round-to 64", "--overwrite" for True and "--no-resume" for False; in Python
        "round_to", "round_to=64", "overwrite=True" and "resume=False".
    """
    if not _FLAGS.get():
        return name if value is None else f"{name}={value!r}"
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}" if value is None else f"--{flag} {value}"
