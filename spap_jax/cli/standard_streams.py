"""Standard output and standard error, which may break while a command runs: a full disk, or a reader that has quit."""

import os
import re
import textwrap
from typing import Any

from rich.console import Console

from spap_jax.errors import UserError, without_password


class Stream(Console):
    """A console that lets the command continue when its stream breaks, and discards all later output.

    Attributes:
        problem: Why the stream broke; None while it works, or if its reader quit, as in ``spap ... | head -1``.
    """

    problem: OSError | None = None

    def print(self, *objects: Any, **how: Any) -> None:
        """Prints as rich does, but records errors of the stream."""
        try:
            super().print(*objects, **how)
        except OSError as error:
            self.problem = error
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Redirects the stream to the null device, so that flushing its buffer does not fail when Python exits."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


_NO_BREAK = "\N{NO-BREAK SPACE}"


class Lines(Stream):
    """A stream whose lines are wrapped between words on a terminal, and not wrapped elsewhere.

    Words longer than a line, such as paths, are not broken either: a broken path cannot be copied. Addresses are shown
    without passwords, since lines are kept in logs.
    """

    @property
    def is_terminal(self) -> bool:
        """Whether bars can be drawn: not in a file, also if FORCE_COLOR is set, nor where no cursor moves."""
        try:
            screen = self.file.isatty()
        except (AttributeError, ValueError):  # something else than a file, or a closed one
            return False
        return screen and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")

    def print(self, *objects: Any, soft_wrap: bool = True, **how: Any) -> None:
        """Prints as `Stream` does; the library does not wrap lines, since it also breaks words."""
        objects = tuple(without_password(each) if isinstance(each, str) else each for each in objects)
        if self.is_terminal:
            objects = tuple(self._broken(each) if isinstance(each, str) else each for each in objects)
        super().print(*objects, soft_wrap=soft_wrap, **how)

    def _broken(self, text: str) -> str:
        """Wraps a text, and keeps every number on the same line as the word that follows it."""
        joined = re.sub(r"(?<=\d) (?=\S)", _NO_BREAK, text)
        lines = textwrap.fill(
            joined, self.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        return lines.replace(_NO_BREAK, " ")


# No markup, and no emoji: a folder's name may contain brackets, or a word between colons.
out = Lines(highlight=False, markup=False, emoji=False)
err = Lines(stderr=True, highlight=False, markup=False, emoji=False, force_jupyter=False)
pages = Stream()
"""Shows help and the version, on standard output as well."""


def check_results() -> None:
    """Reports lost output at the end, after files have been written.

    Raises:
        UserError: printing to standard output failed for any reason other than that its reader quit.
    """
    problem = out.problem or pages.problem
    if problem is not None:
        raise UserError(
            f"standard output cannot be written ({problem.strerror}): what was to be printed is lost, so free some "
            "space or send it elsewhere."
        )
