"""The plots of one run. Every figure is made of the run's record and of nothing else."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spap_jax.quantities import change_text, count_text, signed
from spap_jax.reporting.read import Errors, Layer, Record, Sweep
from spap_jax.reporting.style import KEPT, LIGHT, grid, open_sides

STAGES = {"selection": "grey", "refit": "blue", "alternating": "orange"}
"""Colour by stage, in their order."""

TOKENS: dict[str, Literal["-", "--"]] = {"calibration": "-", "held-out": "--"}
"""Line by the tokens that an error is of."""

SIZE = (4.8, 3.3)
WIDTH = 9.8
"""Inches: of a plot that stands beside another one, and of one across the page."""

CELLS = 512
"""Most cells in a row of the map of channels."""


@dataclass(frozen=True)
class Plot:
    """A figure and its words.

    Attributes:
        name: For file names.
        title: What it shows.
        caption: What to know to read it.
        alt: What it says, for people who do not see it.
        figure: The drawing.
        wide: Whether it goes across the page.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    wide: bool = False


def plots(record: Record) -> list[Plot]:
    """All plots that the record has data for."""
    stages = changing_stages(record)
    found = [errors(record, stages)]
    if len(stages) > 1:
        found.append(gains(record, stages))
    found.append(channels(record))
    if record.sweeps:
        found.append(divergence(record.sweeps))
    if record.seconds:
        found.append(seconds(record.seconds))
    return found


def changing_stages(record: Record) -> list[str]:
    """The stages that changed some layer's error; the first is where it starts."""
    names = list(STAGES)
    tokens = [errors for layer in record.layers for errors in (layer.calibration, layer.held_out) if errors]
    moved = [
        later
        for former, later in itertools.pairwise(names)
        if any(getattr(errors, former) != getattr(errors, later) for errors in tokens)
    ]
    return [names[0], *moved]


def errors(record: Record, stages: Sequence[str]) -> Plot:
    """Relative error by layer after each stage, on calibration and held-out tokens."""
    figure, axes = _panel("layer", "relative error")
    layers = [layer.layer for layer in record.layers]
    drawn = [tokens for tokens in TOKENS if tokens == "calibration" or judged(record)]
    for stage, tokens in itertools.product(stages, drawn):
        colour = LIGHT[STAGES[stage]]
        axes.plot(
            layers,
            _stage(record, tokens, stage),
            color=colour,
            linestyle=TOKENS[tokens],
            linewidth=1.6,
            marker="o",
            markersize=4 if len(layers) < 24 else 0,
            markerfacecolor=colour if tokens == "calibration" else LIGHT["page"],
        )
    axes.set_ylim(bottom=0)
    handles = [Line2D([], [], color=LIGHT[STAGES[stage]], linewidth=3, label=f"after {stage}") for stage in stages]
    handles += [Line2D([], [], color=LIGHT["muted"], linestyle=TOKENS[each], label=f"{each} tokens") for each in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    said = "; ".join(f"after {stage} {_extent(layers, _stage(record, drawn[-1], stage))}" for stage in stages)
    return Plot(
        "errors",
        "Error by layer",
        "How far each pruned MLP is from what it should add to the stream, relative to its size.",
        f"Relative error of each layer on {drawn[-1]} tokens: {said}.",
        figure,
    )


def gains(record: Record, stages: Sequence[str]) -> Plot:
    """How much of the error after selection each later stage removed."""
    figure, axes = _panel("layer", "error removed, %")
    layers = np.array([layer.layer for layer in record.layers])
    tokens = "held-out" if judged(record) else "calibration"
    start = np.array(_stage(record, tokens, stages[0]))
    start[start == 0] = math.nan  # nothing to remove
    width = 0.8 / (len(stages) - 1)
    said = []
    for place, (former, stage) in enumerate(itertools.pairwise(stages)):
        share = 100 * (np.array(_stage(record, tokens, former)) - _stage(record, tokens, stage)) / start
        shift = (place - (len(stages) - 2) / 2) * width
        axes.bar(layers + shift, share, width, color=LIGHT[STAGES[stage]], label=stage)
        said.append(f"{stage} {_extent(list(layers), list(share), '.1f')}")
    axes.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=2)
    return Plot(
        "gains",
        "What each phase gained",
        f"Part of the error after selection that each later phase removed, on {tokens} tokens.",
        f"Per cent of the error after selection removed in each layer: {'; '.join(said)}.",
        figure,
    )


def channels(record: Record) -> Plot:
    """Which channels each layer keeps, and how many."""
    count, width = len(record.layers), record.model.intermediate.before
    figure = Figure((WIDTH, min(1.5 + 0.24 * count, 7)), layout="constrained")
    picture, bars = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    size = math.ceil(width / CELLS)
    kept = np.stack([kept_share(layer, width, size) for layer in record.layers])
    colours = np.empty((*kept.shape, 4))
    colours[..., :3], colours[..., 3] = KEPT, kept
    right = size * kept.shape[1]
    picture.imshow(colours, extent=(0, right, count - 0.5, -0.5), aspect="auto", interpolation="none", rasterized=False)
    picture.hlines(np.arange(count - 1) + 0.5, 0, right, color=LIGHT["page"], linewidth=1.5 if count < 50 else 0.5)
    picture.set(xlim=(0, width), xlabel="channel of the dense model", ylabel="layer")
    counts = [len(layer.kept) for layer in record.layers]
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
        "Channels kept",
        f"Each row is a layer, each mark a channel that stays{cells}. Right: how many stay.",
        f"Of {count_text(width)} channels, each of {count} layers keeps {each}.",
        figure,
        wide=True,
    )


def kept_share(layer: Layer, width: int, size: int) -> np.ndarray:
    """Fraction of the channels kept in each cell of ``size`` channels; the last one may hold fewer."""
    cells = math.ceil(width / size)
    found = np.bincount(np.array(layer.kept, dtype=int) // size, minlength=cells)
    return found / np.minimum(size, width - size * np.arange(cells))


def divergence(sweeps: Sequence[Sweep]) -> Plot:
    """Divergence after every step of the sweeps, and what was tried and not taken."""
    figure, axes = _panel("layer, in each sweep", "nats per token")
    steps = range(len(sweeps))
    current = [number(step.after if step.taken else step.before) for step in sweeps]
    start = number(sweeps[0].before)
    axes.step([-1, *steps], [start, *current], where="post", color=LIGHT["blue"], linewidth=1.6)
    taken = [place for place in steps if sweeps[place].taken]
    refused = [place for place in steps if not sweeps[place].taken]
    dots = {"linestyle": "none", "markersize": 5}
    axes.plot(taken, [current[place] for place in taken], marker="o", color=LIGHT["blue"], label="taken", **dots)
    if refused:
        tried = [number(sweeps[place].after) for place in refused]
        axes.plot(refused, tried, marker="x", color=LIGHT["orange"], label="tried, not taken", **dots)
    every = math.ceil(len(sweeps) / 12)
    shown = [place for place in steps if sweeps[place].layer % every == 0]
    axes.set_xticks(shown, [str(sweeps[place].layer) for place in shown])
    axes.set_xlim(-1, len(sweeps) - 0.5)
    for place in steps:
        if place == 0 or sweeps[place].sweep != sweeps[place - 1].sweep:
            axes.axvline(place - 0.5, color=LIGHT["muted"], linewidth=0.8, linestyle=":")
            place_of_text = axes.get_xaxis_transform()
            axes.text(place - 0.3, 1.02, f"sweep {sweeps[place].sweep + 1}", transform=place_of_text, size=9)
    figure.legend(loc="outside lower center", ncols=2)
    change = signed(change_text(start, current[-1]))
    fall = f"from {start:.4f} to {current[-1]:.4f} nats per token ({change})"
    done = f"{len(taken)} of {len(sweeps)} steps were taken"
    return Plot(
        "divergence",
        "Divergence during the sweeps",
        f"KL divergence of the pruned model's predictions from the dense model's: {fall}; {done}.",
        f"Divergence over the steps of the sweeps: {fall}; {done}.",
        figure,
    )


def seconds(phases: dict[str, float]) -> Plot:
    """Seconds by phase."""
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
    return Plot("seconds", "Seconds by phase", "All layers together.", f"Seconds by phase: {said}.", figure)


def judged(record: Record) -> bool:
    """Whether there are errors on held-out tokens."""
    return all(layer.held_out for layer in record.layers)


def number(found: float | None) -> float:
    """What was not finite leaves a gap in a plot."""
    return math.nan if found is None else found


def _stage(record: Record, tokens: str, stage: str) -> list[float]:
    """Errors of all layers after a stage."""
    pick: Callable[[Layer], Errors | None] = (
        (lambda layer: layer.held_out) if tokens == "held-out" else (lambda layer: layer.calibration)
    )
    return [number(getattr(pick(layer), stage, None)) for layer in record.layers]


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_sides(axes)
    grid(axes, "y")
    return figure, axes


def _extent(layers: Sequence[int], values: Sequence[float], spec: str = ".4f") -> str:
    """The lowest and the highest value, and in which layers."""
    if np.isnan(values).all():
        return "not finite"
    low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
    return f"{values[low]:{spec}} (layer {layers[low]}) to {values[high]:{spec}} (layer {layers[high]})"
