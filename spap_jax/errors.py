"""Errors, warnings and notices for users, and how their messages spell options."""

import re
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
    """An error that the user can fix: the message says in one sentence what happened, why, and what to do.

    The command line prints it without a traceback and exits with code 2, unless a subclass says otherwise.
    """

    def __init__(self, message: str):
        """Leaves out the password in an address that the message names."""
        super().__init__(without_password(message))


class NotFiniteError(UserError):
    """Numbers overflowed during a run; the same run would overflow again, so it is not resumed from there."""


class NotJoinedError(UserError):
    """Other processes of a run did not come in time: the same command may succeed later. Its exit code is 75."""


class SpapWarning(UserWarning):
    """A warning of a result that is likely not what was meant; it was computed anyway, and one sentence says why.

    The command line prints it as one line on standard error.
    """


class Notice(SpapWarning):
    """Information that stops nothing: one sentence, which the command line prints on a line of its own."""


def printable(sentence: str) -> str:
    """Escapes a sentence to one printable line: names may contain newlines and terminal control codes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in sentence)


def without_password(text: str) -> str:
    """Removes user and password from addresses like https://user:password@host/file or https://token@host/file."""
    return re.sub(r"((?<=://)[^/@\s:]*:|(?<=http://)|(?<=https://))[^/@\s]*@", "", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use inside a sentence: no final period, no hub token, no password."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
    if "huggingface_hub" in sys.modules:  # a server may echo the token, also in the first line of its client's error
        from huggingface_hub import get_token

        if token := get_token():
            line = line.replace(token, "the token")
    return without_password(line)


def warn(sentence: str, kind: type[SpapWarning] = SpapWarning) -> None:
    """Issues a `SpapWarning`, or a `Notice`, that points to the calling line outside of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, kind, stacklevel=level)


@contextmanager
def naming_flags() -> Iterator[None]:
    """Makes `option` spell command-line flags inside; elsewhere it spells Python arguments. The command line enters it.

    Threads that are started inside begin with the Python spelling.
    """
    before = _FLAGS.set(True)
    try:
        yield
    finally:
        _FLAGS.reset(before)


def option(name: str, value: Any = None) -> str:
    """Spells an option as the user has to write it, for messages on the command line and in Python.

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
