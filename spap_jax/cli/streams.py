"""Standard output and standard error, which may break while a command works: a full disk, a reader that has left."""

import os
import re
import textwrap
from typing import Any

from rich.console import Console

from spap_jax.errors import UserError


class Stream(Console):
    """A console that lets the work go on when its stream breaks; what it is given after that goes nowhere.

    Attributes:
        problem: Why the stream broke; None while it works, and where its reader left, as in ``spap ... | head -1``.
    """

    problem: OSError | None = None

    def print(self, *objects: Any, **how: Any) -> None:
        """Prints as rich does, but for errors of the stream."""
        try:
            super().print(*objects, **how)
        except OSError as error:
            self.problem = error
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Leads the stream to nowhere, so that nothing that is still in a buffer fails when Python ends."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


_NO_BREAK = "\N{NO-BREAK SPACE}"

_WHOLE: dict[str, Any] = {"soft_wrap": True}
"""Lines are not broken by the library, which breaks words too."""


class Lines(Stream):
    """A stream whose lines break between words on a terminal, and stay whole elsewhere.

    Words that are longer than a line, as paths are, stay whole too: one in pieces cannot be copied.
    """

    def print(self, *objects: Any, **how: Any) -> None:
        """Prints as `Stream` does."""
        if self.is_terminal:
            objects = tuple(self._broken(each) if isinstance(each, str) else each for each in objects)
        super().print(*objects, **_WHOLE | how)

    def _broken(self, text: str) -> str:
        """In lines, with every number beside what it counts."""
        joined = re.sub(r"(?<=\d) (?=\S)", _NO_BREAK, text)
        lines = textwrap.fill(
            joined, self.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        return lines.replace(_NO_BREAK, " ")


# No markup: a folder's name may have brackets.
out = Lines(highlight=False, markup=False)
err = Lines(stderr=True, highlight=False, markup=False, force_jupyter=False)
pages = Stream()
"""Shows help and the version, on standard output as well."""


def check_results() -> None:
    """Tells of a loss at the end, after files have been written.

    Raises:
        UserError: standard output did not take what was printed, for another reason than that its reader left.
    """
    problem = out.problem or pages.problem
    if problem is not None:
        raise UserError(
            f"standard output cannot be written ({problem.strerror}): what was to be printed is lost, so free some "
            "space or send it elsewhere."
        )
