"""Output to the terminal. Progress goes to standard error, results and help to standard output."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spap_jax import progress
from spap_jax.errors import Notice, SpapWarning, UserError, printable, without_password

_GAP = 3
"""Columns of text between two columns of a table."""


class Stream(Console):
    """A console that lets the command continue when its stream breaks, and discards all later output.

    Text is not wrapped, since a broken path cannot be copied. Addresses are shown without passwords.

    Attributes:
        problem: Why the stream broke; None while it works, or if its reader quit, as in ``spap ... | head -1``.
    """

    problem: OSError | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether bars can be drawn: not in a file, also if FORCE_COLOR is set, nor where the cursor cannot move."""
        try:
            is_screen = self.file.isatty()
        except (AttributeError, ValueError):  # something else than a file, or a closed one
            return False
        return is_screen and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")

    def print(self, *objects: Any, soft_wrap: bool | None = None, **how: Any) -> None:
        """Prints as rich does, but records errors of the stream."""
        objects = tuple(without_password(each) if isinstance(each, str) else each for each in objects)
        if soft_wrap is None:
            soft_wrap = all(isinstance(each, str) for each in objects)
        try:
            super().print(*objects, soft_wrap=soft_wrap, **how)
        except OSError as error:
            self.problem = error
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Redirects the stream to the null device, so that flushing its buffer does not fail when Python exits."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


# No markup, and no emoji: a folder's name may contain brackets, or a word between colons.
out = Stream(highlight=False, markup=False, emoji=False)
err = Stream(stderr=True, highlight=False, markup=False, emoji=False, force_jupyter=False)


def check_results() -> None:
    """Reports lost output at the end, after files have been written.

    Raises:
        UserError: printing to standard output failed for any reason other than that its reader quit.
    """
    if out.problem is not None:
        raise UserError(
            f"standard output cannot be written ({out.problem.strerror}): what was to be printed is lost, so free some "
            "space or send it elsewhere."
        )


@contextmanager
def notices() -> Iterator[None]:
    """Prints each ``SpapWarning`` as a line on standard error; other warnings are shown as usual."""
    with warnings.catch_warnings():
        show_other = warnings.showwarning

        def show(message, category, *place, **more) -> None:
            if issubclass(category, SpapWarning):
                kind = "" if issubclass(category, Notice) else "spap: warning: "
                err.print(f"{kind}{printable(str(message))}")
            else:
                show_other(message, category, *place, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", SpapWarning)
        warnings.simplefilter("default", Notice)
        yield


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows what the user is waiting for, with a spinner on a terminal and a line elsewhere."""
    if err.is_terminal:
        with err.status(Text(without_password(f"{what} ..."))):
            yield
    else:
        err.print(f"{what} ...")
        yield


def counting() -> AbstractContextManager[Callable[[str, int, int], None]]:
    """Shows how much of some work is done: see ``progress.counting``."""
    return progress.counting(err)


def say_devices(work: str) -> None:
    """Prints what the devices of a run are, which JAX has chosen: the CPU, where it finds no other."""
    import jax

    from spap_jax.parallel import mesh

    kind, count, sharers = jax.devices()[0].device_kind, mesh.mesh_size(), mesh.model_size()
    many = f" x {count}" if count > 1 else ""
    shared = f", of which {sharers} share the weights" if sharers > 1 else ""
    err.print(f"{work} on {'the CPU' if kind == 'cpu' else kind}{many}{shared} ...")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column holds names, the others numbers.

    No cell is cut, nor broken within a word, even if the table is too wide for the terminal.
    """
    out.print(title)
    cells = [*zip(columns, *rows, strict=True)]
    # Names and headings may break between words; numbers and their units may not.
    widths = [_longest(cells[0]), *(max(_longest([head]), *map(len, numbers), 0) for head, *numbers in cells[1:])]
    gaps = _GAP * (len(columns) - 1)
    for number, column in enumerate(cells):
        room = max(0, out.width - gaps - sum(widths))
        widths[number] += min(room, max(map(len, column)) - widths[number])
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, width=sum(widths) + gaps)
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        shown.add_column(column, justify="right" if number else "left", width=width)
    for row in rows:
        shown.add_row(*row)
    out.print(shown, crop=False)


def _longest(texts: Sequence[str]) -> int:
    """Returns the length of the longest word."""
    return max((len(word) for text in texts for word in text.split()), default=0)
