"""What people are told in one sentence: errors, and warnings of results that are likely not what was meant."""

import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


class UserError(ValueError):
    """Something the person can mend: the message says in one sentence what happened, why, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class NotFiniteError(UserError):
    """Numbers that overflow in the course of a run, which the same run would meet again: nothing goes on from there."""


class SpapWarning(UserWarning):
    """A result that is likely not what was meant: it was computed all the same, and the message says why in a sentence.

    The command line prints it as one line on standard error.
    """


def warn(sentence: str) -> None:
    """Warns with a `SpapWarning` that names the line outside of this package that led to it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, SpapWarning, stacklevel=level)
