"""What people see while they wait and when it is done. Progress goes to standard error, results to standard output."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from spap_jax.cli.streams import err, out
from spap_jax.errors import Notice, SpapWarning
from spap_jax.pace import Pace
from spap_jax.quantities import bytes_text, change_text, count_text

if TYPE_CHECKING:
    from spap_jax.pruning.progress import Progress, Said
    from spap_jax.pruning.report import LayerReport, SweepReport
    from spap_jax.training.report import Check

__all__ = [
    "bytes_text",
    "change_text",
    "count_text",
    "counting",
    "err",
    "layer_progress",
    "notices",
    "out",
    "table",
    "training_progress",
    "waiting",
]

_EVERY = 10.0
"""Seconds from one line on the progress of the same work to the next, where there is no terminal."""

_GAP = 3
"""Columns of text between two columns of a table."""

Clock = Callable[[], float]


@contextmanager
def notices() -> Iterator[None]:
    """Prints each warning of ours as a line on standard error; other warnings are shown as ever."""
    with warnings.catch_warnings():
        show_other = warnings.showwarning

        def show(message, category, *place, **more) -> None:
            if issubclass(category, SpapWarning):
                err.print(f"{'' if issubclass(category, Notice) else 'spap: warning: '}{message}")
            else:
                show_other(message, category, *place, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", SpapWarning)
        warnings.simplefilter("default", Notice)
        yield


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what takes a while, with a spinner on a terminal and a line elsewhere."""
    if err.is_terminal:
        with err.status(Text(f"{what} ...")):
            yield
    else:
        err.print(f"{what} ...")
        yield


class _Bar:
    """Bars on a terminal: what is being done, how much of it is done, for how long, and how long the rest takes."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(),
                   TextColumn("{task.fields[left]}"))  # fmt: skip
        self._bars = Bars(*columns, console=err, disable=not err.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def show(self, what: str, done: int, total: int, left: str) -> None:
        """Moves the bar of some work, which begins with its first call."""
        self._bars.start()  # not before: what others draw until then would be torn
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, left=left)
        self._bars.update(self._tasks[what], completed=done, left=left)

    def stop(self) -> None:
        """Leaves the bars as they are."""
        self._bars.stop()


class _Lines:
    """Says only now and then how far some work is, where there is no terminal to show a bar."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._said = clock, clock()

    def say(self, line: str) -> None:
        """Prints a line if none was printed for a while."""
        if not err.is_terminal and self._clock() - self._said >= _EVERY:
            self.print(line)

    def print(self, line: str) -> None:
        """Prints a line in any case."""
        self._said = self._clock()
        err.print(line)


@contextmanager
def layer_progress(progress: "Progress", number: int, clock: Clock = time.monotonic) -> Iterator["LayerProgress"]:
    """Shows the steps of a run of pruning, which begins: a line for each, and below them bars on a terminal.

    Args:
        progress: Puts the steps into words.
        number: Which of its runs it is.
        clock: Gives the time in seconds.
    """
    bar = _Bar()
    try:
        yield LayerProgress(progress, number, bar, _Lines(clock))
    finally:
        bar.stop()


class LayerProgress:
    """Shows each step as it is done."""

    def __init__(self, progress: "Progress", number: int, bar: _Bar, lines: _Lines) -> None:
        self._progress, self._bar, self._lines = progress, bar, lines
        self._show(progress.begin(number), lines.print)

    def advance(self, report: "LayerReport | SweepReport", fresh: bool = True) -> None:
        """Shows a step of pruning, which was made just now or before an interruption."""
        self._show(self._progress.step(report, fresh), self._lines.print)

    def together(self, done: int, parts: int) -> None:
        """Shows how far the steps on several blocks are."""
        self._show(self._progress.part(done, parts), self._lines.say)

    def _show(self, said: "Said", say: Callable[[str], None]) -> None:
        for line in said.lines:
            say(line)
        self._bar.show(said.phase, said.done, said.total, said.left)


@contextmanager
def counting(clock: Clock = time.monotonic) -> Iterator[Callable[[str, int, int], None]]:
    """Takes what is being done, how much of it is done, and of how much: a bar each, or now and then a line."""
    bar, lines, pace = _Bar(), _Lines(clock), Pace()
    last: dict[str, tuple[int, float]] = {}

    def watch(what: str, done: int, total: int) -> None:
        nonlocal pace
        now = clock()
        if what not in last:
            last[what] = (0, now)
            if not err.is_terminal:
                lines.print(f"{what} ...")
        before, then = last[what]
        if done > before:
            pace, last[what] = pace.after(what, done - before, now - then), (done, now)
        left = pace.left([(what, total - done)]).words
        bar.show(what, done, total, left)
        lines.say(f"{what} {done / total:.0%}{left and ', '}{left} ...")

    try:
        yield watch
    finally:
        bar.stop()


@contextmanager
def training_progress(steps: int, clock: Clock = time.monotonic) -> Iterator[Callable[["Check"], None]]:
    """Takes each look at the held-out sequences: a line with the losses, and below them a bar on a terminal."""
    bar, pace, last = _Bar(), Pace(), (0, clock())

    def watch(check: "Check") -> None:
        nonlocal pace, last
        words = f"loss {sum(check.losses) / len(check.losses):.4f}, " if check.losses else ""
        words += f"held out {check.held_out:.4f}" + ("" if check.taken else ", not kept")
        now, (before, then) = clock(), last
        if check.step > before:
            pace, last = pace.after("step", check.step - before, now - then), (check.step, now)
        left = pace.left([("step", steps - check.step)]).words
        err.print(f"step {check.step}/{steps}  {words}{left and ', '}{left}")
        bar.show("step", check.step, steps, left)

    try:
        yield watch
    finally:
        bar.stop()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column names, the others hold numbers.

    No cell is cut or broken inside a word, and no number at all. A table that is too wide for that becomes a list.
    """
    out.print(title)
    cells = [*zip(columns, *rows, strict=True)]
    whole = [max(map(len, column)) for column in cells]
    # Names and headings may break between words, numbers and what is beside them may not.
    least = [_longest(cells[0]), *(max(_longest([head]), *map(len, numbers), 0) for head, *numbers in cells[1:])]
    spare = out.width - sum(least) - _GAP * (len(columns) - 1)
    if spare < 0:
        _list(columns, rows)
        return
    widths = []
    for narrow, wide in zip(least, whole, strict=True):
        widths.append(narrow + min(spare, wide - narrow))
        spare -= widths[-1] - narrow
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        shown.add_column(column, justify="right" if number else "left", width=width)
    for row in rows:
        shown.add_row(*row)
    out.print(shown, soft_wrap=False)


def _longest(texts: Sequence[str]) -> int:
    """The length of the longest word."""
    return max((len(word) for text in texts for word in text.split()), default=0)


def _list(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as a list: below the name of each row a line for each column that has something."""
    room = out.width - 4 - max(len(value) for _, *values in rows for value in values)
    names = max((len(column) for column in columns[1:] if len(column) <= room), default=0)
    for name, *values in rows:
        out.print(f"{columns[0]} {name}".lstrip())
        for column, value in zip(columns[1:], values, strict=True):
            if value:
                out.print(f"  {column:<{names}}  {value}")
