"""How far the long work of a run is: lines and bars on standard error, with an estimate of the time left."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from spap_jax.quantities import duration_text, percent_text
from spap_jax.report.schema import AttentionReport, Check, LayerReport

_INTERVAL = 10.0
"""Minimum seconds between two lines about the same work if there is no terminal."""

_SHORTEST = 1.0
"""Shortest time, in seconds, that is worth reporting."""

Shown = bool | Callable[..., None] | None
"""Whether to show progress, or a function to call instead; None shows it where standard error is watched."""


class Pace:
    """Measured seconds per unit of work, for each kind of work.

    The first piece of a kind is not counted: programs are compiled for it, which can take longer than the work itself.
    """

    def __init__(self) -> None:
        self._spent: dict[str, tuple[float, float]] = {}
        self._compiled: set[str] = set()

    def restart(self) -> None:
        """Expects the first pieces of all kinds once more: another process has made the pieces so far."""
        self._compiled.clear()

    def add(self, kind: str, units: float, seconds: float) -> None:
        """Adds a piece of work."""
        if kind in self._compiled:
            counted, took = self._spent.get(kind, (0.0, 0.0))
            self._spent[kind] = counted + units, took + seconds
        self._compiled.add(kind)

    def left(self, todo: Iterable[tuple[str, float]]) -> str:
        """Estimates how long the given work will take, for the end of a line: "about 39 min left".

        Of work whose pace is not known it says when that begins: "step in 39 min". It is empty if nothing is known or
        worth reporting.

        Args:
            todo: Kinds of work and their units, in the order in which they will be done.
        """
        remaining = [(kind, units) for kind, units in todo if units]
        known = list(itertools.takewhile(lambda piece: piece[0] in self._spent, remaining))
        seconds = sum(units * self._spent[kind][1] / self._spent[kind][0] for kind, units in known)
        if seconds < _SHORTEST:
            return ""
        duration = duration_text(seconds, digits=2)
        return f"about {duration} left" if len(known) == len(remaining) else f"{remaining[len(known)][0]} in {duration}"


class Display:
    """On a terminal bars, with the amount done, elapsed time and time left; elsewhere lines at intervals."""

    def __init__(self, console: Console | None = None) -> None:
        """Prints to a console; by default standard error."""
        self.console = console or Console(stderr=True, force_jupyter=False, highlight=False, markup=False, emoji=False)
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(),
                   TextColumn("{task.fields[left]}"))  # fmt: skip
        self._bars = Bars(*columns, console=self.console, disable=not self.console.is_terminal)
        self.tasks: dict[str, TaskID] = {}
        self._printed = monotonic()

    def show(self, work: str, done: int, total: int, left: str) -> None:
        """Updates the bar of some work; the first call creates it."""
        self._bars.start()  # not earlier: it would disrupt other output drawn before
        if work not in self.tasks:
            self.tasks[work] = self._bars.add_task(work, total=total, left=left)
        self._bars.update(self.tasks[work], completed=done, total=total, left=left)

    def print(self, line: str, left: str = "") -> None:
        """Prints a line, with the time left at its end."""
        self._printed = monotonic()
        self.console.print(f"{line}, {left}" if left else line, soft_wrap=True)

    def print_sometimes(self, line: str, left: str) -> None:
        """Prints a line about work that goes on, if none was printed recently and there is no terminal."""
        if not self.console.is_terminal and monotonic() - self._printed >= _INTERVAL:
            self.print(f"{line}{left and ', '}{left} ...")

    def close(self) -> None:
        """Stops updating and leaves the bars as they are."""
        self._bars.stop()


class PruningProgress:
    """Shows pruning runs: a line for each report, below them bars, and the time left for all that remains.

    What an earlier process has made counts with the seconds that it took then, so that there is an estimate from the
    first block after an interruption.
    """

    def __init__(
        self, layers: int, steps: int, windows: int = 0, runs: int = 1, console: Console | None = None
    ) -> None:
        """Begins the first of several runs, each of which has ``steps`` joint steps.

        Args:
            layers: Number of layers that stay.
            windows: Number of windows on which perplexity is measured at the end of a run.
        """
        self._pieces = {"layer": layers, "step": steps, "perplexity": windows}
        self._runs, self._pace, self._tokens = runs, Pace(), "calibration"
        self._console = console
        self.begin(0)

    def begin(self, number: int) -> None:
        """Begins the run with this number, from 0, with bars of its own."""
        self._display = Display(self._console)
        self._later, self._begun = self._runs - 1 - number, False
        self._place = f"{number + 1} of {self._runs}, " if self._runs > 1 else ""
        self._done = dict.fromkeys(self._pieces, 0)
        self._last = monotonic()

    def report(self, report: LayerReport | Check, fresh: bool = True) -> None:
        """Shows that a layer was pruned, or joint steps were made and measured, by this process if ``fresh``."""
        if isinstance(report, LayerReport):
            self._tokens = "held-out" if report.held_out else "calibration"
            kind, done, seconds = "layer", self._done["layer"] + 1, sum(report.seconds.values())
            where = f"layer {done}/{self._pieces[kind]}"
            lines = [f"{where}  {self._errors(report)}"]
            if report.attention:
                lines.insert(0, f"{where}  attention, {self._errors(report.attention)}")
        else:
            kind, done, seconds = "step", report.step, report.seconds
            where = f"step {done}/{self._pieces[kind]}" if self._pieces[kind] else "no joint steps"
            lines = [f"{where}  {self._tokens} {report.words}"]
            lines[0] += "" if report.taken else ", not kept"
        self._reach(kind, done, None if fresh else seconds)
        for line in lines[:-1]:
            self._display.print(line)
        if fresh:
            self._display.print(f"{lines[-1]}  {duration_text(seconds, digits=2)}", self._left())
        else:
            self._display.print(f"{lines[-1]}  kept")
        if self._pieces[kind]:
            self._show(kind)

    def step(self, done: int, total: int) -> None:
        """Shows how many joint steps were made."""
        self._reach("step", done)
        self._display.print_sometimes(f"step {done}/{total}", self._left())
        self._show("step")

    def measured(self, done: int, total: int) -> None:
        """Records on how many windows perplexity was measured, before or after pruning."""
        now, new = monotonic(), done - self._done["perplexity"]
        if new > 0:
            self._pace.add("perplexity", new, now - self._last)
        self._done["perplexity"], self._last = done % total, now

    def close(self) -> None:
        """Leaves the bars as they are."""
        self._display.close()

    def _reach(self, kind: str, done: int, seconds: float | None = None) -> None:
        """Records that pieces of a kind are done, the new ones in ``seconds`` (by default, since the last ones)."""
        new, now = done - self._done[kind], monotonic()
        if new <= 0:
            return
        if seconds is None and not self._begun:
            self._pace.restart()
            self._begun = True
        self._pace.add(kind, new, now - self._last if seconds is None else seconds)
        self._done[kind], self._last = done, now

    def _left(self) -> str:
        remaining = [(kind, count - self._done[kind]) for kind, count in self._pieces.items()]
        return self._pace.left(remaining + [*self._pieces.items()] * self._later)

    def _show(self, kind: str) -> None:
        self._display.show(f"{self._place}{kind}", self._done[kind], self._pieces[kind], self._left())

    def _errors(self, report: LayerReport | AttentionReport) -> str:
        """Names the errors of the stages that changed the weights."""
        shown, last = [], None
        for stage, error in (report.held_out or report.calibration).by_stage.items():
            if error != last:
                shown.append(f"{stage} {percent_text(error)}")
            last = error
        return f"{'held-out' if report.held_out else 'calibration'} error: {', '.join(shown)}"


def is_watched() -> bool:
    """Whether users see standard error: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or Console().is_jupyter


def _is_shown(progress: Shown) -> bool:
    return not callable(progress) and (is_watched() if progress is None else progress)


@contextmanager
def pruning(
    progress: Shown, layers: int, steps: int
) -> Iterator[tuple[Callable[..., None], Callable[[int, int], None]]]:
    """Shows a pruning run that was started from Python; a function is called with every report.

    Yields:
        What the run calls with every report, and after every joint step with the steps made and their total.
    """
    if _is_shown(progress):
        with closing(PruningProgress(layers, steps)) as shown:
            yield shown.report, shown.step
    else:
        yield (lambda report, fresh=True: progress(report) if callable(progress) else None), lambda done, total: None


@contextmanager
def training(steps: int, progress: Shown = True, console: Console | None = None) -> Iterator[Callable[[Check], None]]:
    """Shows training: a line of losses for each measurement, with which a function is called instead."""
    if not _is_shown(progress):
        yield progress if callable(progress) else lambda check: None
        return
    with closing(Display(console)) as display:
        left = _time_left()

        def watch(check: Check) -> None:
            words = f"loss {sum(check.losses) / len(check.losses):.4f}, " if check.losses else ""
            words += f"held-out {check.words}" + ("" if check.taken else ", not kept")
            time_left = left("step", check.step, steps)
            display.print(f"step {check.step}/{steps}  {words}", time_left)
            display.show("step", check.step, steps, time_left)

        yield watch


@contextmanager
def counting(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback for the name of some work, the amount done and the total: a bar for each, or lines."""
    with closing(Display(console)) as display:
        left = _time_left()

        def watch(work: str, done: int, total: int) -> None:
            if work not in display.tasks and not display.console.is_terminal:
                display.print(f"{work} ...")
            time_left = left(work, done, total)
            display.show(work, done, total, time_left)
            display.print_sometimes(f"{work} {done / total:.0%}", time_left)

        yield watch


def _time_left() -> Callable[[str, int, int], str]:
    """Returns a function that estimates the time left for some work by the time that it has taken so far."""
    pace, last = Pace(), dict[str, tuple[int, float]]()

    def left(work: str, done: int, total: int) -> str:
        now = monotonic()
        before, then = last.setdefault(work, (0, now))
        if done > before:
            pace.add(work, done - before, now - then)
            last[work] = done, now
        return pace.left([(work, total - done)])

    return left
