"""Output to the terminal. Progress goes to standard error, results to standard output."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from spap_jax.cli.standard_streams import err, out
from spap_jax.errors import Notice, SpapWarning, printable, without_password
from spap_jax.pace import Pace

if TYPE_CHECKING:
    from spap_jax.pruning.progress import Progress, Said
    from spap_jax.report.schema import Check

_EVERY = 10.0
"""Minimum seconds between two progress lines of the same work if there is no terminal."""

_GAP = 3
"""Columns of text between two columns of a table."""

Clock = Callable[[], float]


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


def say_devices(work: str) -> None:
    """Prints what the devices of a run are, which JAX has chosen: the CPU, where it finds no other."""
    import jax

    from spap_jax.parallel import mesh

    kind, count, sharers = jax.devices()[0].device_kind, mesh.mesh_size(), mesh.model_size()
    many = f" x {count}" if count > 1 else ""
    shared = f", of which {sharers} share the weights" if sharers > 1 else ""
    err.print(f"{work} on {'the CPU' if kind == 'cpu' else kind}{many}{shared} ...")


class _Display:
    """Progress: on a terminal bars, with the amount done, elapsed time and time left; elsewhere lines at intervals."""

    def __init__(self, clock: Clock) -> None:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(),
                   TextColumn("{task.fields[left]}"))  # fmt: skip
        self._bars = Bars(*columns, console=err, disable=not err.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self._clock, self._said = clock, clock()
        self._pace, self._last = Pace(), dict[str, tuple[int, float]]()

    def left(self, what: str, done: int, total: int) -> str:
        """Estimates in words how long some work will still take, by how long it has taken so far."""
        now = self._clock()
        before, then = self._last.setdefault(what, (0, now))
        if done > before:
            self._pace, self._last[what] = self._pace.after(what, done - before, now - then), (done, now)
        return self._pace.left([(what, total - done)])

    def show(self, what: str, done: int, total: int, left: str) -> None:
        """Updates the bar of some work; the first call creates it."""
        self._bars.start()  # not earlier: it would disrupt other output drawn before
        if what not in self.tasks:
            self.tasks[what] = self._bars.add_task(what, total=total, left=left)
        self._bars.update(self.tasks[what], completed=done, total=total, left=left)

    def say(self, line: str) -> None:
        """Prints a line if none was printed recently and there is no terminal."""
        if not err.is_terminal and self._clock() - self._said >= _EVERY:
            self.print(line)

    def print(self, line: str) -> None:
        """Prints a line unconditionally."""
        self._said = self._clock()
        err.print(line)

    def close(self) -> None:
        """Stops updating and leaves the bars as they are."""
        self._bars.stop()


class WatchCallbacks(NamedTuple):
    """Callbacks for the progress of a pruning run.

    Attributes:
        advance: Called with the report of every step, and False if it was made before an interruption.
        together: Called after every joint step with the number of steps made, and their total.
    """

    advance: Callable[..., None]
    together: Callable[[int, int], None] | None = None


@contextmanager
def layer_progress(progress: "Progress", number: int) -> Iterator[WatchCallbacks]:
    """Displays a pruning run: a line for each step, and below them bars on a terminal.

    Args:
        progress: Describes the steps in words.
        number: Index of the run among those of ``progress``.
    """
    with closing(_Display(time.monotonic)) as display:

        def show(said: "Said", say: Callable[[str], None] = display.print) -> None:
            for line in said.lines:
                say(line)
            display.show(said.phase, said.done, said.total, said.left)

        show(progress.begin(number))
        yield WatchCallbacks(
            lambda report, fresh=True: show(progress.step(report, fresh)),
            lambda done, parts: show(progress.part(done, parts), display.say),
        )


@contextmanager
def counting(clock: Clock = time.monotonic) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a progress callback (name of the work, amount done, total): a bar for each work, or lines at intervals."""
    with closing(_Display(clock)) as display:

        def watch(what: str, done: int, total: int) -> None:
            if what not in display.tasks and not err.is_terminal:
                display.print(f"{what} ...")
            left = display.left(what, done, total)
            display.show(what, done, total, left)
            display.say(f"{what} {done / total:.0%}{left and ', '}{left} ...")

        yield watch


@contextmanager
def training_progress(steps: int, clock: Clock = time.monotonic) -> Iterator[Callable[["Check"], None]]:
    """Yields a callback for the checks of a training run: a line of losses for each, below them a bar on a terminal."""
    with closing(_Display(clock)) as display:

        def watch(check: "Check") -> None:
            words = f"loss {sum(check.losses) / len(check.losses):.4f}, " if check.losses else ""
            words += f"held out {check.held_out:.4f}" + ("" if check.taken else ", not kept")
            left = display.left("step", check.step, steps)
            err.print(f"step {check.step}/{steps}  {words}{left and ', '}{left}")
            display.show("step", check.step, steps, left)

        yield watch


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column holds names, the others numbers.

    No cell is cut or broken within a word, and numbers are never broken. A table too wide for that becomes a list.
    """
    out.print(title)
    cells = [*zip(columns, *rows, strict=True)]
    whole = [max(map(len, column)) for column in cells]
    # Names and headings may break between words; numbers and their units may not.
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
    """Returns the length of the longest word."""
    return max((len(word) for text in texts for word in text.split()), default=0)


def _list(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table as a list: the name of each row, and below it a line for each column that is not empty."""
    room = out.width - 4 - max(len(value) for _, *values in rows for value in values)
    names = max((len(column) for column in columns[1:] if len(column) <= room), default=0)
    for name, *values in rows:
        out.print(f"{columns[0]} {name}".lstrip())
        for column, value in zip(columns[1:], values, strict=True):
            if value:
                out.print(f"  {column:<{names}}  {value}")
