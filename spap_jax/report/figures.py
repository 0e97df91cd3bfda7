"""The plots of one run, each made from the run's report alone."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spap_jax.quantities import change_text
from spap_jax.report.schema import AttentionReport, Check, LayerReport, PruneReport

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, MUTED, GRID = "#1b2430", "#5a6675", "#e4e7eb"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7d8794"

STAGES = {"chosen": GREY, "refit": BLUE, "adjusted": ORANGE}
"""Colour of each stage of pruning a layer."""

SIZE = (4.8, 3.3)
WIDTH = 9.8
"""Size in inches of a plot beside another one (SIZE), and width of one across the page (WIDTH)."""

CELLS = 512
"""Maximum number of cells in a row of the channel map."""

SETTINGS: "dict[RcKeyType, Any]" = {
    "font.size": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a folder's name may contain dollar signs
    "svg.hashsalt": "spap",  # the same report gives the same page
}
"""matplotlib's settings for all plots."""


@dataclass(frozen=True)
class Plot:
    """A figure with its caption and alternative text; ``wide`` if it spans the page."""

    title: str
    caption: str
    alt: str
    figure: Figure
    wide: bool = False

    def svg(self) -> bytes:
        """Draws the figure."""
        file = io.BytesIO()
        with style():
            self.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        return file.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Applies the style of all plots while they are made and drawn."""
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def plots(report: PruneReport) -> list[Plot]:
    """Returns all plots for which the report has data."""
    with style():
        found = [errors(report.layers, report.layers, "MLP")]
        attention = [layer.attention for layer in report.layers if layer.attention]
        if len(attention) == len(report.layers):
            found.append(errors(report.layers, attention, "attention"))
        if len(report.joint) > 1:
            found.append(losses(report.joint, report.judged))
        found.append(kept(report, report.layers, report.model.intermediate.before, "MLP channels"))
        if len(attention) == len(report.layers):
            found.append(kept(report, attention, report.model.kv_heads.before, "key/value heads"))
        return found


def errors(layers: Sequence[LayerReport], parts: Sequence[LayerReport | AttentionReport], what: str) -> Plot:
    """Plots the relative error in per cent by layer after each stage, on calibration and held-out tokens."""
    figure, axes = _panel("layer", "error, %")
    numbers = [layer.layer for layer in layers]
    fitted = [part.calibration.by_stage for part in parts]
    held_out = [part.held_out.by_stage for part in parts if part.held_out]
    both = len(held_out) == len(parts)
    said, earlier = [], []
    for stage, colour in STAGES.items():
        lines = [[100 * found[stage] for found in line] for line in ([fitted, held_out] if both else [fitted])]
        if lines == earlier:
            continue  # this stage changed nothing
        earlier = lines
        marks = {"color": colour, "marker": "o", "markersize": 4 if len(numbers) < 24 else 0}
        axes.plot(numbers, lines[0], label=stage, **marks)
        if both:
            axes.plot(numbers, lines[1], "--", markerfacecolor="white", **marks)
        said.append(f"{stage} {_extent(numbers, lines[-1])}")
    axes.set_ylim(bottom=0)
    if both:
        axes.plot([], [], "--", color=MUTED, label="held-out tokens")
    figure.legend(loc="outside lower center", ncols=2)
    new_text = " Dashed: on held-out tokens, which were not fitted, and so tell what to expect on new text."
    return Plot(
        f"How well each layer's {what} was preserved",
        f"Squared difference of each {what}'s outputs from the original's, relative to their size: right after the "
        f"choice of what to keep, with the output weights refit, and with all weights adjusted; lower is better."
        f"{new_text if both else ''}",
        f"Error of each layer's {what} in per cent on {'held-out' if both else 'calibration'} tokens: "
        f"{'; '.join(said)}.",
        figure,
    )


def kept(report: PruneReport, parts: Sequence[LayerReport | AttentionReport], width: int, what: str) -> Plot:
    """Plots which of ``width`` channels or heads each block keeps; dropped blocks are marked."""
    count = report.model.blocks.before
    figure = Figure((WIDTH, min(1.5 + 0.24 * count, 7)), layout="constrained")
    axes = figure.subplots()
    size = math.ceil(width / CELLS)
    shares = np.zeros((count, math.ceil(width / size)))
    for layer, part in zip(report.layers, parts, strict=True):
        shares[layer.layer] = kept_share(part, width, size)
    right = size * shares.shape[1]
    shades = LinearSegmentedColormap.from_list("kept", ["white", BLUE])
    axes.imshow(shares, shades, extent=(0, right, count - 0.5, -0.5), aspect="auto", vmin=0, vmax=1)
    axes.hlines(np.arange(count - 1) + 0.5, 0, right, color="white", linewidth=1.5 if count < 50 else 0.5)
    dropped = sorted({*range(count)} - {layer.layer for layer in report.layers})
    for row in dropped:
        axes.axhspan(row - 0.5, row + 0.5, color=GRID, linewidth=0)
        axes.text(width / 2, row, "dropped", color=MUTED, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, width), xlabel=f"{what} of the original model", ylabel="block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=min(count, 16), integer=True))
    axes.tick_params(left=False)
    axes.grid(False)
    cells = f" A cell is {size} of them, and the darker, the more of them stay." if size > 1 else ""
    gone = " A grey row is a block that was dropped." if dropped else ""
    return Plot(
        f"Which {what} were kept",
        f"Each row is a block of the original model; marks are {what} that were kept, gaps those that were removed."
        f"{cells}{gone}",
        f"{report.shape}." + (f" Dropped blocks: {', '.join(map(str, dropped))}." if dropped else ""),
        figure,
        wide=True,
    )


def kept_share(part: LayerReport | AttentionReport, width: int, size: int) -> np.ndarray:
    """Returns the fraction kept in each cell of ``size`` channels or heads; the last cell may have fewer."""
    cells = math.ceil(width / size)
    found = np.bincount(np.array(part.kept, dtype=int) // size, minlength=cells)
    return found / np.minimum(size, width - size * np.arange(cells))


def losses(checks: Sequence[Check], judged: str) -> Plot:
    """Plots the divergence on held-out (or else calibration) tokens over the joint steps, and the loss of each step."""
    figure, axes = _panel("joint step", "divergence, nats")
    each = [loss for check in checks for loss in check.losses]
    axes.plot(range(1, len(each) + 1), each, color=MUTED, linewidth=0.6, label="each step")
    steps, found = [check.step for check in checks], [check.held_out for check in checks]
    axes.plot(steps, found, color=BLUE)
    for taken, marker, colour in ((True, "o", BLUE), (False, "x", ORANGE)):
        some = [(check.step, check.held_out) for check in checks if check.taken == taken]
        if some:
            label = f"{judged}, {'kept' if taken else 'not kept'}"
            axes.plot(*zip(*some, strict=True), marker, color=colour, markersize=5, label=label)
    figure.legend(loc="outside lower center", ncols=2)
    last = [check for check in checks if check.taken][-1]
    fall = f"from {found[0]:.4f} to {last.held_out:.4f} nats per token ({change_text(found[0], last.held_out)})"
    return Plot(
        "How close the predictions are to the original's",
        "Joint steps adjust the weights of many blocks together; lower is better. The weights with the lowest "
        f"divergence on {judged} tokens are kept, here those of step {last.step}. It went {fall}.",
        f"Divergence over the joint steps: {fall}.",
        figure,
    )


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _extent(layers: Sequence[int], values: Sequence[float]) -> str:
    """Returns text with the lowest and the highest value and their layers."""
    if np.isnan(values).all():
        return "not finite"
    low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
    return f"{values[low]:.2f} (layer {layers[low]}) to {values[high]:.2f} (layer {layers[high]})"
