"""Comparison of several runs: the plots against sparsity."""

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spap_jax.quantities import share_text
from spap_jax.report.figures import SIZE, Plot
from spap_jax.report.schema import Change, Perplexities, RunReports
from spap_jax.report.style import LIGHT, grid, open_sides

LINES = (("blue", "o"), ("orange", "s"), ("green", "^"), ("pink", "D"), ("grey", "v"))
"""Colour and marker of each series; they repeat from the sixth series on."""

LINE = 48
"""Maximum number of characters in a line of a legend."""


class Quantity(NamedTuple):
    """A quantity that is plotted against sparsity.

    Attributes:
        name: Name of the plot's file.
        title: Title of the plot.
        unit: Label of its axis.
        values: Returns the values of the dense and of the pruned model; None if the run does not have them.
        spec: Format specification of the values.
        data: Returns the data on which it was measured, if that matters.
        bound: Returns the value that the arithmetic allows, if that is known.
    """

    name: str
    title: str
    unit: str
    values: Callable[[RunReports], tuple[float, float] | None]
    spec: str
    data: Callable[[RunReports], str] = lambda run: ""
    bound: Callable[[RunReports], float | None] = lambda run: None


def _values(change: Change | Perplexities | None, unit: float = 1) -> tuple[float, float] | None:
    return change and (change.before / unit, change.after / unit)


def _workload(run: RunReports) -> str:
    work = run.speed and run.speed.workload
    return f"batch {work.batch}, prompt {work.prompt}, {work.new} new" if work else ""


QUANTITIES = (
    Quantity(
        "perplexity",
        "Perplexity",
        "perplexity",
        lambda run: _values(run.pruned.extras.perplexity),
        ".4f",
        data=lambda run: f"on {run.pruned.extras.perplexity.data}" if run.pruned.extras.perplexity else "",
    ),
    Quantity(
        "parameters", "Parameters", "million parameters", lambda run: _values(run.pruned.model.parameters, 1e6), ".4g"
    ),
    Quantity("bytes", "Weights on disk", "MB", lambda run: _values(run.pruned.extras.bytes, 1e6), ".4g"),
    Quantity(
        "prefill",
        "Prefill speed",
        "times the dense model's",
        lambda run: run.speed and (1.0, run.speed.speed_up.prefill),
        ".3f",
        data=_workload,
        bound=lambda run: run.speed and run.speed.by_arithmetic.prefill,
    ),
    Quantity(
        "decode",
        "Decode speed",
        "times the dense model's",
        lambda run: run.speed and (1.0, run.speed.speed_up.decode),
        ".3f",
        data=_workload,
        bound=lambda run: run.speed and run.speed.by_arithmetic.decode,
    ),
)


def comparisons(runs: Sequence[RunReports]) -> list[Plot]:
    """Returns a plot against sparsity for each quantity that any run has."""
    return [_against(quantity, runs) for quantity in QUANTITIES if any(map(quantity.values, runs))]


def _against(quantity: Quantity, runs: Sequence[RunReports]) -> Plot:
    """Plots a quantity, with one line per series through the dense model and its pruned ones."""
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    handles, said = [], []
    found = {run.label: values for run in runs if (values := quantity.values(run))}
    series = _series(quantity, [run for run in runs if run.label in found])
    for place, (name, members) in enumerate(series.items()):
        colour, marker = LINES[place % len(LINES)]
        points = [(0.0, found[run.label][0]) for run in members]
        points += [(100 * run.pruned.removed, found[run.label][1]) for run in members]
        axes.plot(*zip(*sorted(points), strict=True), color=LIGHT[colour], marker=marker, markersize=5, linewidth=1.6)
        bounds = sorted((100 * run.pruned.removed, bound) for run in members if (bound := quantity.bound(run)))
        if bounds:
            axes.plot(
                *zip((0, 1), *bounds, strict=True), color=LIGHT["muted"], marker="_", markersize=10, linestyle=":"
            )
        handles.append(Line2D([], [], color=LIGHT[colour], marker=marker, label=textwrap.fill(name, LINE)))
        said += [f"{run.label} {found[run.label][1]:{quantity.spec}}" for run in members]
    axes.set(xlabel="MLP channels removed, %", ylabel=quantity.unit)
    axes.set_xlim(left=-2)
    open_sides(axes)
    grid(axes)
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower center")
    dotted = " Dotted: what the arithmetic allows." if any(quantity.bound(run) for run in runs) else ""
    return Plot(
        f"compare-{quantity.name}",
        quantity.title,
        f"Each mark is a run; at 0 % is the original model.{dotted}",
        f"{quantity.title} against the MLP channels removed: {', '.join(said)}.",
        figure,
    )


def _series(quantity: Quantity, runs: Sequence[RunReports]) -> dict[str, list[RunReports]]:
    """Groups the runs that form one line, keyed by a name that consists of the facts in which the lines differ."""
    facts = [
        (
            run.pruned.model.name,
            run.pruned.method.selection,
            run.pruned.method.update,
            f"{share_text(heads.removed)} of the heads removed"
            if (heads := run.pruned.fewer_heads)
            else "all heads kept",
            f"effort {run.pruned.settings.get('effort')}",
            quantity.data(run),
        )
        for run in runs
    ]
    telling = [len(set(column)) > 1 for column in zip(*facts, strict=True)]
    found: dict[str, list[RunReports]] = {}
    for run, known in zip(runs, facts, strict=True):
        name = ", ".join(fact for fact, tells in zip(known, telling, strict=True) if tells)
        found.setdefault(name, []).append(run)
    return found
