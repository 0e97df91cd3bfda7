"""What people see while they wait and when it is done. Progress goes to standard error, results to standard output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from spap_jax.quantities import bytes_text, change_text, count_text

if TYPE_CHECKING:
    from spap_jax.pruning.report import LayerReport, SweepReport
    from spap_jax.training.report import Check

__all__ = [
    "bytes_text",
    "change_text",
    "count_text",
    "err",
    "layer_progress",
    "out",
    "table",
    "training_progress",
    "waiting",
]

# No markup: a folder's name may have brackets. Lines are not wrapped: a path in pieces cannot be copied.
out = Console(highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, force_jupyter=False)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what takes a while, with a spinner on a terminal and a line elsewhere."""
    if err.is_terminal:
        with err.status(Text(f"{what} ...")):
            yield
    else:
        err.print(f"{what} ...")
        yield


@contextmanager
def layer_progress(layers: int) -> Iterator["LayerProgress"]:
    """A bar over the layers with the latest errors and the time left; a line a layer where there is no terminal."""
    columns = (TextColumn("{task.fields[phase]}"), MofNCompleteColumn(), BarColumn(),
               TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        yield LayerProgress(progress, layers)


class LayerProgress:
    """Advances a bar with each layer's report; every sweep over the model has a bar of its own."""

    def __init__(self, progress: Progress, layers: int) -> None:
        self._progress, self._layers = progress, layers
        self._bars: dict[str, TaskID] = {}
        self._bar("layer")

    def advance(self, report: "LayerReport | SweepReport", fresh: bool = True) -> None:
        """Shows a step of pruning, and whether it was made just now or before an interruption."""
        sweep = getattr(report, "sweep", None)
        phase, words = ("layer", _errors(report)) if sweep is None else (f"sweep {sweep + 1}", _divergences(report))
        self._progress.update(self._bar(phase), advance=1, description=words)
        if not err.is_terminal:
            ended = f"{sum(report.seconds.values()):.1f} s" if fresh else "kept"
            err.print(f"{phase}, layer {report.layer + 1}/{self._layers}  {words}  {ended}".removeprefix("layer, "))

    def together(self, done: int, parts: int) -> None:
        """Shows how far the steps on several blocks are."""
        self._progress.update(self._bar("together", parts), completed=done)
        if not err.is_terminal:
            err.print(f"steps on {parts} layers together, {done / parts:.0%} ...")

    def _bar(self, phase: str, total: int | None = None) -> TaskID:
        if phase not in self._bars:
            self._bars[phase] = self._progress.add_task("...", total=total or self._layers, phase=phase)
        return self._bars[phase]


@contextmanager
def request_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Takes what is being done, how much is done, and of how much: a bar each, or a line at every tenth elsewhere."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    progress = Progress(*columns, console=err, disable=not err.is_terminal)
    bars: dict[str, TaskID] = {}
    tenths: dict[str, int] = {}

    def watch(what: str, done: int, total: int) -> None:
        if err.is_terminal:
            progress.start()  # not before: what others draw until then would be torn
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)
        elif tenths.get(what) != done * 10 // total:
            tenths[what] = done * 10 // total
            err.print(f"{what} {done}/{total} ...")

    try:
        yield watch
    finally:
        progress.stop()


@contextmanager
def training_progress(steps: int) -> Iterator[Callable[["Check"], None]]:
    """Takes each look at the held-out sequences: a bar over the steps with the losses, or a line elsewhere."""
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        bar = progress.add_task("...", total=steps)

        def watch(check: "Check") -> None:
            words = f"loss {sum(check.losses) / len(check.losses):.4f}, " if check.losses else ""
            words += f"held out {check.held_out:.4f}" + ("" if check.taken else ", not kept")
            progress.update(bar, completed=check.step, description=words)
            if not err.is_terminal:
                err.print(f"step {check.step}/{steps}  {words}")

        yield watch


def _errors(report) -> str:
    errors = report.held_out or report.calibration
    words = f"error {errors.selection:.4f} > {errors.refit:.4f} > {errors.alternating:.4f}"
    if report.attention is None:
        return words
    errors = report.attention.held_out or report.attention.calibration
    return f"attention {errors.selection:.4f} > {errors.refit:.4f}, {words}"


def _divergences(report) -> str:
    words = f"divergence {report.before:.4f} > {report.after:.4f}"
    return words if report.taken else f"{words}, not taken"


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints a table: the first column names, the others hold numbers."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        # Two long paths, cut at the same place, could not be told apart.
        shown.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    out.print(title, soft_wrap=True)
    out.print(shown)
