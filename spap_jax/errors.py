"""What users are told: the one error that they see, notices, and how both spell the options that they speak of."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_FLAGS = ContextVar("flags", default=False)


class UserError(ValueError):
    """Something that the user can put right: the message says in one sentence what happened, why, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Notice(UserWarning):
    """Something worth knowing that stops nothing: one sentence, which the command line prints as a line of its own."""


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
