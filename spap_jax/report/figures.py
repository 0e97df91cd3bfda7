"""The plots of one run. Every figure is made from the run's report alone."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spap_jax.quantities import change_text, count_text, signed
from spap_jax.report.schema import AttentionReport, Check, Errors, LayerReport, PruneReport
from spap_jax.report.style import KEPT, LIGHT, STAGES, grid, open_sides

Part = LayerReport | AttentionReport
"""A part of a layer that has errors: its MLP, whose report is the layer's, or its attention."""


TOKENS: dict[str, Literal["-", "--"]] = {"calibration": "-", "held-out": "--"}
"""Line style, keyed by the tokens on which an error was measured."""

NEW_TEXT = " Dashed: on held-out tokens, which were not used, and so tell what to expect on new text."

SIZE = (4.8, 3.3)
WIDTH = 9.8
"""Size in inches of a plot beside another one (SIZE), and width of one across the page (WIDTH)."""

CELLS = 512
"""Maximum number of cells in a row of the channel map."""


@dataclass(frozen=True)
class Plot:
    """A figure with its texts.

    Attributes:
        name: Name for files.
        title: Title of the plot.
        caption: Explanation of how to read it.
        alt: Alternative text for screen readers.
        figure: The drawing.
        wide: Whether it spans the page.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    wide: bool = False


def plots(report: PruneReport) -> list[Plot]:
    """Returns all plots for which the report has data."""
    found = _of_part(report.layers, report.layers, "MLP")
    attention = [layer.attention for layer in report.layers if layer.attention]
    if len(attention) == len(report.layers):
        found += _of_part(report.layers, attention, "attention")
    found.append(channels(report))
    if report.joint:
        found.append(losses(report.joint, report.judged))
    if report.seconds:
        found.append(seconds(report.seconds))
    return found


def _of_part(layers: Sequence[LayerReport], parts: Sequence[Part], what: str) -> list[Plot]:
    """Plots the errors of all layers' MLPs or attention and, if there are several stages, the gain of each."""
    numbers, stages = [layer.layer for layer in layers], changing_stages(parts)
    return [errors(numbers, parts, stages, what), *([gains(numbers, parts, stages, what)] if len(stages) > 1 else [])]


def changing_stages(parts: Sequence[Part]) -> list[str]:
    """Returns the stages that changed any error, after the first stage, which is always included."""
    names = list(STAGES)
    tokens = [errors for part in parts for errors in (part.calibration, part.held_out) if errors]
    moved = [
        later
        for former, later in itertools.pairwise(names)
        if any(getattr(errors, former) != getattr(errors, later) for errors in tokens)
    ]
    return [names[0], *moved]


def errors(layers: Sequence[int], parts: Sequence[Part], stages: Sequence[str], what: str) -> Plot:
    """Plots the relative error in per cent by layer after each stage, on calibration and held-out tokens."""
    figure, axes = _panel("layer", "error, %")
    drawn = [tokens for tokens in TOKENS if tokens == "calibration" or has_held_out(parts)]
    for stage, tokens in itertools.product(stages, drawn):
        colour = LIGHT[STAGES[stage].colour]
        axes.plot(
            layers,
            _stage(parts, tokens, stage),
            color=colour,
            linestyle=TOKENS[tokens],
            linewidth=1.6,
            marker="o",
            markersize=4 if len(layers) < 24 else 0,
            markerfacecolor=colour if tokens == "calibration" else LIGHT["page"],
        )
    axes.set_ylim(bottom=0)
    handles = [
        Line2D([], [], color=LIGHT[STAGES[stage].colour], linewidth=3, label=STAGES[stage].label) for stage in stages
    ]
    handles += [Line2D([], [], color=LIGHT["muted"], linestyle=TOKENS[each], label=f"{each} tokens") for each in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    said = "; ".join(f"{STAGES[each].label} {_extent(layers, _stage(parts, drawn[-1], each))}" for each in stages)
    meanings = "; ".join(f"{STAGES[each].label}: {STAGES[each].meaning}" for each in stages)
    return Plot(
        "errors" if what == "MLP" else f"{what}-errors",
        f"How well each layer's {what} was preserved",
        f"How far each layer's {what} is from the original's: squared difference of their outputs, relative to the "
        f"original's size; lower is better. {meanings[0].upper()}{meanings[1:]}."
        f"{NEW_TEXT if has_held_out(parts) else ''}",
        f"Error of each layer's {what} in per cent on {drawn[-1]} tokens: {said}.",
        figure,
    )


def gains(numbers: Sequence[int], parts: Sequence[Part], stages: Sequence[str], what: str) -> Plot:
    """Plots the fraction of the first stage's error that each later stage removed."""
    figure, axes = _panel("layer", "error removed, %")
    layers = np.array(numbers)
    tokens = "held-out" if has_held_out(parts) else "calibration"
    start = np.array(_stage(parts, tokens, stages[0]))
    start[start == 0] = math.nan  # nothing to remove
    width = 0.8 / (len(stages) - 1)
    said = []
    for place, (former, stage) in enumerate(itertools.pairwise(stages)):
        share = 100 * (np.array(_stage(parts, tokens, former)) - _stage(parts, tokens, stage)) / start
        shift = (place - (len(stages) - 2) / 2) * width
        axes.bar(layers + shift, share, width, color=LIGHT[STAGES[stage].colour], label=STAGES[stage].label)
        said.append(f"{STAGES[stage].label} {_extent(numbers, list(share))}")
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=2)
    return Plot(
        "gains" if what == "MLP" else f"{what}-gains",
        f"What updating the {what}'s weights won back",
        f"Part of the error right after the choice that each later stage removed, on {tokens} tokens; higher is "
        "better, and below 0 the error grew.",
        f"Per cent of the error of the {what} removed in each layer: {'; '.join(said)}.",
        figure,
    )


def channels(report: PruneReport) -> Plot:
    """Plots which channels each layer keeps, and how many."""
    count, width = len(report.layers), report.model.intermediate.before
    figure = Figure((WIDTH, min(1.5 + 0.24 * count, 7)), layout="constrained")
    picture, bars = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    size = math.ceil(width / CELLS)
    kept = np.stack([kept_share(layer, width, size) for layer in report.layers])
    colours = np.empty((*kept.shape, 4))
    colours[..., :3], colours[..., 3] = KEPT, kept
    right = size * kept.shape[1]
    picture.imshow(colours, extent=(0, right, count - 0.5, -0.5), aspect="auto", interpolation="none", rasterized=False)
    picture.hlines(np.arange(count - 1) + 0.5, 0, right, color=LIGHT["page"], linewidth=1.5 if count < 50 else 0.5)
    picture.set(xlim=(0, width), xlabel="channel of the original model", ylabel="layer")
    counts = [len(layer.kept) for layer in report.layers]
    bars.barh(np.arange(count), counts, 0.72, color=KEPT)
    bars.set(xlim=(0, width), xlabel="channels kept")
    bars.set_xticks([0, width])
    if count <= 48:
        for row, number in enumerate(counts):
            bars.annotate(count_text(number), (number, row), (3, 0), textcoords="offset points", va="center", size=8)
    picture.yaxis.set_major_locator(MaxNLocator(nbins=min(count, 16), integer=True))
    for axes in (picture, bars):
        open_sides(axes)
        axes.tick_params(left=False)
    cells = f"; a cell is {size} channels, and the stronger, the more of them stay" if size > 1 else ""
    least, most = min(counts), max(counts)
    each = count_text(least) if least == most else f"from {count_text(least)} to {count_text(most)}"
    return Plot(
        "channels",
        "Which MLP channels were kept",
        f"Each row is a layer of the original model; each mark is a channel that was kept, each gap one that was "
        f"removed{cells}. Right: how many each layer keeps.",
        f"Of {count_text(width)} channels, each of {count} layers keeps {each}.",
        figure,
        wide=True,
    )


def kept_share(layer: LayerReport, width: int, size: int) -> np.ndarray:
    """Returns the fraction of kept channels in each cell of ``size`` channels; the last cell may have fewer."""
    cells = math.ceil(width / size)
    found = np.bincount(np.array(layer.kept, dtype=int) // size, minlength=cells)
    return found / np.minimum(size, width - size * np.arange(cells))


def losses(checks: Sequence[Check], judged: str) -> Plot:
    """Plots the loss over the joint steps: of each step, and on tokens that are held out, or ``judged`` instead."""
    figure, axes = _panel("joint step", "loss against the original, nats")
    each = [loss for check in checks for loss in check.losses]
    axes.plot(range(1, len(each) + 1), each, color=LIGHT["muted"], linewidth=0.6, label="each step")
    steps, found = [check.step for check in checks], [check.held_out for check in checks]
    axes.plot(steps, found, color=LIGHT["blue"], linewidth=1.6)
    for taken, marker, colour in ((True, "o", "blue"), (False, "x", "orange")):
        some = [(check.step, check.held_out) for check in checks if check.taken == taken]
        label = f"{judged}, {'kept' if taken else 'not kept'}"
        if some:
            style = {"linestyle": "none", "marker": marker, "markersize": 5, "color": LIGHT[colour]}
            axes.plot(*zip(*some, strict=True), label=label, **style)
    figure.legend(loc="outside lower center", ncols=2)
    start, kept = found[0], [check.held_out for check in checks if check.taken][-1]
    fall = f"from {start:.4f} to {kept:.4f} nats per token ({signed(change_text(start, kept))})"
    last = [check.step for check in checks if check.taken][-1]
    return Plot(
        "losses",
        "How close the predictions are to the original's",
        "Joint steps adjust the weights of many blocks together; lower is better. The weights with the lowest "
        f"loss on {judged} tokens are kept, here those of step {last}. The loss went {fall}.",
        f"Loss over the joint steps: {fall}.",
        figure,
    )


def seconds(phases: dict[str, float]) -> Plot:
    """Plots the seconds of each phase."""
    figure = Figure((SIZE[0], 1.1 + 0.27 * len(phases)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(phases), list(phases.values()), 0.7, color=LIGHT["blue"])
    for row, spent in enumerate(phases.values()):
        axes.annotate(f"{spent:.1f}", (spent, row), (3, 0), textcoords="offset points", va="center", size=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    axes.tick_params(left=False)
    open_sides(axes)
    grid(axes, "x")
    said = ", ".join(f"{phase} {spent:.1f}" for phase, spent in phases.items())
    whole = f"{sum(phases.values()):.1f} seconds in all, by phase; all layers together."
    return Plot("seconds", "Where the time went", whole, f"Seconds by phase: {said}.", figure)


def has_held_out(parts: Sequence[Part]) -> bool:
    """Whether there are errors on held-out tokens."""
    return all(part.held_out for part in parts)


def _stage(parts: Sequence[Part], tokens: str, stage: str) -> list[float]:
    """Returns the errors of all layers after a stage, in per cent."""
    chosen: list[Errors | None] = [part.held_out if tokens == "held-out" else part.calibration for part in parts]
    return [100 * getattr(errors, stage, math.nan) for errors in chosen]  # NaN leaves a gap in a plot


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_sides(axes)
    grid(axes, "y")
    return figure, axes


def _extent(layers: Sequence[int], values: Sequence[float]) -> str:
    """Returns text with the lowest and the highest value and their layers."""
    if np.isnan(values).all():
        return "not finite"
    low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
    return f"{values[low]:.2f} (layer {layers[low]}) to {values[high]:.2f} (layer {layers[high]})"
