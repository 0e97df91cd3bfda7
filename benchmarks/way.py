"""The way of a run, drawn from the code: ``python -m benchmarks.way`` writes ``docs/way.png``.

The bundled model is pruned twice by ``spap prune``. The first run compiles, and the second is followed from function to
function: each row of the picture is a file or a package, and a bar shows when the run was in it, and in no other row.
Work of the devices counts for whoever waits for it.
"""

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cyclopts import App
from matplotlib.figure import Figure

import spap_jax
from spap_jax.cli import main
from spap_jax.report import draw
from spap_jax.report.style import LIGHT, grid, open_sides

ROOT = Path(__file__).parents[1]
SOURCE = Path(spap_jax.__file__).parent
BY_FILE = ("pruning",)
"""Packages whose files have a row each."""

ROOMS = ("cli", "data", "checkpoint", "models", "solver", "training", "methods", "evaluation", "reporting")
"""Packages with one row. What lies beside them holds helpers, which count for whoever calls them."""

COMMAND = ("--sparsity", "0.3", "--data", "examples/stories_calibration.txt", "--sequences", "64",
           "--sequence-length", "128")  # fmt: skip

PASSING = 0.002
"""Seconds that a stay lasts at least to be drawn."""

Span = tuple[float, float]

app = App(name="way", help=__doc__)


def room_of(file: str) -> str | None:
    """Returns the row of a source file; None if it has none."""
    path = Path(file)
    if not path.is_relative_to(SOURCE):
        return None
    package, *rest = path.relative_to(SOURCE).parts
    if package in BY_FILE:
        return "/".join((package, *rest))
    return package if package in ROOMS else None


class Followed:
    """Which room the main thread is in, as seconds by room, in the order in which rooms are first entered."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = defaultdict(list)
        self._rooms: list[str | None] = [None]
        self._known: dict[str, str | None] = {}
        self._start = self._since = time.perf_counter()

    def event(self, frame: FrameType, event: str, _: Any) -> None:
        """Called by the interpreter whenever a function, or a generator, is entered or left."""
        if event == "call":
            file = frame.f_code.co_filename
            if file not in self._known:
                self._known[file] = room_of(file)
            self._move(lambda: self._rooms.append(self._known[file] or self._rooms[-1]))
        elif event == "return" and len(self._rooms) > 1:
            self._move(self._rooms.pop)

    def _move(self, step: Any) -> None:
        before = self._rooms[-1]
        step()
        if self._rooms[-1] != before:
            now = time.perf_counter()
            if before is not None:
                self.spans[before].append((self._since - self._start, now - self._start))
            self._since = now


@contextmanager
def following() -> Iterator[Followed]:
    """Follows the main thread through the code inside."""
    found = Followed()
    sys.setprofile(found.event)
    try:
        yield found
    finally:
        sys.setprofile(None)


def stays(spans: list[Span], width: float) -> list[Span]:
    """Joins spans that lie closer together than a picture can show, and leaves out passing calls, of 2 ms in all."""
    found: list[tuple[float, float, float]] = []
    for start, end in spans:
        if found and start - found[-1][1] < width:
            found[-1] = (found[-1][0], end, found[-1][2] + end - start)
        else:
            found.append((start, end, end - start))
    return [(start, max(end - start, width)) for start, end, spent in found if spent > PASSING]


def picture(spans: dict[str, list[Span]]) -> Figure:
    """Draws a row for each room, from the top in the order in which the run first stays there."""
    end = max(found[-1][1] for found in spans.values())
    every = {room: stays(found, end / 800) for room, found in spans.items()}
    shown = sorted(((room, bars) for room, bars in every.items() if bars), key=lambda each: each[1][0])
    figure = Figure((9.8, 0.5 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for row, (room, bars) in enumerate(shown):
        colour = LIGHT["blue" if room.partition("/")[0] in BY_FILE else "grey"]
        axes.broken_barh(bars, (row - 0.32, 0.64), color=colour)
    axes.set_yticks(range(len(shown)), [room for room, _ in shown])
    axes.set(xlabel="seconds", xlim=(0, end), ylim=(len(shown) - 0.4, -0.6))
    open_sides(axes)
    grid(axes, "x")
    return figure


@app.default
def way(output: Path = ROOT / "docs" / "way.png") -> None:
    """Follows a run and draws it.

    Args:
        output: The picture.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = ("prune", "examples/llama-stories", *COMMAND)
        main([*model, "--output", f"{folder}/first"])
        with following() as found:
            main([*model, "--output", f"{folder}/second"])
    with draw.drawing():
        figure = picture(found.spans)
    output.write_bytes(draw.png(figure))


if __name__ == "__main__":
    app()
