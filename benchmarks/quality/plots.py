"""Plots of the rows: one figure per model, and one of the ratios to the best peer."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.quality.judge import Judge, Median
from benchmarks.quality.methods import PEERS, STEPPED, TARGETS
from benchmarks.quality.results import Row
from benchmarks.quality.scope import Scope

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Look(NamedTuple):
    """Style of a method: colours that are distinguishable with colour blindness (Okabe and Ito), and markers."""

    colour: str
    marker: str
    line: str = "-"
    width: float = 1.3


LOOKS = {
    "random": Look("#bbbbbb", "x", ":"),
    "magnitude": Look("#999999", "+", ":"),
    "wanda": Look("#777777", "v", "--"),
    "flap": Look("#444444", "^", "--"),
    "fasp": Look("#e69f00", "s"),
    "obs": Look("#56b4e9", "D"),
    "osscar": Look("#009e73", "P"),
    "fasp + steps": Look("#e69f00", "s", "-."),
    "obs + steps": Look("#56b4e9", "D", "-."),
    "spap, refit only": Look("#cc79a7", "o"),
    "spap, low effort": Look("#d55e00", "o", "--"),
    "spap": Look("#d55e00", "o", "-", 2.8),
    "spap, high effort": Look("#0072b2", "*", "-", 2.8),
}
"""Grey: peers that solve for no weights; dash-dotted: peers with our steps; thick: ours."""

EFFORT_METHODS = {"spap, low effort": "low", "spap": "default", "spap, high effort": "high"}
EFFORT_MARKERS = {"low": "o", "default": "s", "high": "^"}
EFFORT_CUT = 0.3

MODEL_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

RATIO = "rise in log-perplexity / best peer's, or 0"
"""Name of the axis of ratios; 0 is where the model is no worse than the dense one."""

OTHER = Look("#000000", ".")


def draw(folder: Path, rows: Sequence[Row], scope: Scope) -> list[str]:
    """Writes the PNG files and returns their names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    judge = Judge(rows)
    figures = {
        f"{model}.png": rises(Figure((8, 5), layout="constrained"), judge, scope, model)
        for model in scope.models
        if any(row.model == model for row in rows)
    }
    figures["summary.png"] = ratios(Figure((2 + 2.6 * len(scope.models), 4.2), layout="constrained"), judge, scope)
    if any(len(points) > 1 for points in effort_points(judge, scope).values()):
        figures["effort.png"] = efforts(Figure((7, 4.2), layout="constrained"), judge, scope)
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return list(figures)


def rises(figure: "Figure", judge: Judge, scope: Scope, model: str) -> "Figure":
    """Plots the rise in log-perplexity against sparsity, one line per method, with the range over seeds as bars."""
    axes = figure.subplots()
    found = {
        method: [(cut, middle) for cut in scope.sparsities if (middle := judge.median(model, cut, method, _rise))]
        for method in scope.methods
    }
    drawn = {method: points for method, points in found.items() if points}
    for place, (method, points) in enumerate(drawn.items()):
        _line(axes, method, points, _beside(place, len(drawn), 0.12))
    lows = [middle.low for points in drawn.values() for _, middle in points]
    _log_scale(axes, lows)
    _percentages(axes, scope.sparsities)
    axes.set_title(f"{model}: what pruning loses (medians and ranges over seeds)", fontsize=11)
    axes.set_ylabel("rise in log-perplexity")
    last = {method: points[-1][1].value for method, points in drawn.items()}
    order = sorted(drawn, key=lambda method: -last[method])  # in the vertical order of the line ends, from the top
    handles = _handles(axes)
    figure.legend([handles[method] for method in order], order, loc="outside right center", frameon=False, fontsize=9)
    return figure


def ratios(figure: "Figure", judge: Judge, scope: Scope) -> "Figure":
    """Plots the ratio to the best peer, one panel per model: ours, the peers with our steps, and the targets."""
    shown = [method for method in (*STEPPED, *TARGETS, "spap, refit only") if method in scope.methods]
    panels = figure.subplots(1, len(scope.models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, scope.models, strict=True):
        for place, method in enumerate(shown):
            found = [(cut, judge.ratio(model, cut, method, PEERS)) for cut in scope.sparsities]
            points = [(cut, _at_least_zero(middle)) for cut, middle in found if middle and middle.high < float("inf")]
            _line(axes, method, points, _beside(place, len(shown), 1.6))
            _targets(axes, method, scope.sparsities)
        axes.axhline(1, color="black", linewidth=0.8)
        _percentages(axes, scope.sparsities)
        axes.set_title(model, fontsize=11)
    panels[0].set_ylim(bottom=min(-0.05, panels[0].get_ylim()[0]))
    panels[0].set_ylabel(RATIO)
    handles = _handles(panels[0])
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def effort_points(judge: Judge, scope: Scope) -> dict[str, list[tuple[float, float, str]]]:
    """Returns by model the CPU seconds, the ratio to the best peer, and the name of each effort that was run."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for model in scope.models:
        for method, effort in EFFORT_METHODS.items():
            seconds = judge.median(model, EFFORT_CUT, method, lambda row: row.processor_seconds)
            ratio = judge.ratio(model, EFFORT_CUT, method, PEERS)
            if seconds and ratio and ratio.high < float("inf"):
                found.setdefault(model, []).append((seconds.value, _at_least_zero(ratio).value, effort))
    return found


def efforts(figure: "Figure", judge: Judge, scope: Scope) -> "Figure":
    """Plots the ratio to the best peer against the CPU time, one line per model and one marker per effort."""
    axes, by_model = figure.subplots(), effort_points(judge, scope)
    for (model, points), colour in zip(by_model.items(), itertools.cycle(MODEL_COLOURS)):
        seconds, found, _ = zip(*points, strict=True)
        axes.plot(seconds, found, label=model, color=colour, linewidth=1.3)
        for place, value, effort in points:
            axes.plot(place, value, color=colour, marker=EFFORT_MARKERS[effort])
    measured = {effort for points in by_model.values() for *_, effort in points}
    for effort in (effort for effort in EFFORT_MARKERS if effort in measured):
        marker = EFFORT_MARKERS[effort]
        axes.plot([], [], label=f"{effort} effort", color="black", marker=marker, linestyle="none")
    axes.set_xscale("log", subs=())
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 3, 5, 7))  # pyright: ignore[reportCallIssue]
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=-0.02)
    axes.set_xlabel("seconds of processor cores to prune, compiling included")
    axes.set_ylabel(RATIO)
    axes.set_title(f"What an effort takes and gives, {EFFORT_CUT:.0%} of the MLP channels removed", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _at_least_zero(found: Median) -> Median:
    """Returns zeros for what is negative: a model that ends better than the dense one would set the scale of a plot."""
    return dataclasses.replace(found, **{name: max(0.0, getattr(found, name)) for name in ("value", "low", "high")})


def _handles(axes: "Axes") -> dict[str, Any]:
    """Returns the legend handle of each label: lines without their error bars, targets last."""
    pairs = zip(*axes.get_legend_handles_labels(), strict=True)
    found = {label: handle[0] if isinstance(handle, tuple) else handle for handle, label in pairs}
    return dict(sorted(found.items(), key=lambda pair: pair[0].startswith("target")))


def _rise(row: Row) -> float:
    return row.rise


def _beside(place: int, count: int, step: float) -> float:
    """Returns the horizontal offset in percentage points of one of ``count`` methods, so that none hides another."""
    return (place - (count - 1) / 2) * step


def _line(axes: "Axes", method: str, points: Sequence[tuple[float, Median]], shift: float) -> None:
    look = LOOKS.get(method, OTHER)
    places, middles = [100 * cut + shift for cut, _ in points], [middle for _, middle in points]
    values = [middle.value for middle in middles]
    below = [middle.value - middle.low for middle in middles]
    above = [middle.high - middle.value for middle in middles]
    size = 4 + look.width + (3 if look.marker == "*" else 0)
    axes.errorbar(
        places,
        values,
        (below, above),
        label=method,
        color=look.colour,
        marker=look.marker,
        markersize=size,
        linestyle=look.line,
        linewidth=look.width,
        capsize=2,
        elinewidth=0.9,
        zorder=2 + look.width,
    )


def _targets(axes: "Axes", method: str, sparsities: Sequence[float]) -> None:
    """Draws a short bar at each of a method's targets."""
    asked = {cut: target for cut, target in TARGETS.get(method, {}).items() if cut in sparsities}
    colour = LOOKS[method].colour
    for place, (cut, target) in enumerate(asked.items()):
        label = f"target of {method}" if place == 0 else "_"
        axes.hlines(target, 100 * cut - 3, 100 * cut + 3, color=colour, linewidth=5, alpha=0.35, label=label)


def _log_scale(axes: "Axes", lows: Sequence[float]) -> None:
    """Sets a logarithmic y axis; if some rise is not positive, linear around zero and wide enough for all of them."""
    lowest = min(lows, default=1.0)
    if lowest > 0:
        axes.set_yscale("log", subs=())
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))  # pyright: ignore[reportCallIssue]
    else:
        axes.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(max(-lowest, 1e-4))))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _percentages(axes: "Axes", sparsities: Sequence[float]) -> None:
    axes.set_xticks([100 * cut for cut in sparsities], [f"{cut:.0%}" for cut in sparsities])
    axes.set_xlim(100 * min(sparsities) - 5, 100 * max(sparsities) + 5)
    axes.set_xlabel("MLP channels removed")
