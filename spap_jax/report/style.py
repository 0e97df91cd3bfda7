"""Names, colours and axes that all plots share. Nothing here imports matplotlib: it may be missing."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import RcKeyType

DPI = 150
"""Resolution of plots as PNGs."""

LIGHT = {
    "page": "#ffffff",
    "ink": "#1b2430",
    "muted": "#5a6675",
    "grid": "#e4e7eb",
    "grey": "#7d8794",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#008a65",
    "pink": "#b0578a",
}
"""Colours of the light page. All values differ, since `themed` finds a drawing's colours by their values."""

DARK = {
    "page": "#12161c",
    "ink": "#e6eaf0",
    "muted": "#9aa6b5",
    "grid": "#2a313b",
    "grey": "#8b96a5",
    "blue": "#56b4e9",
    "orange": "#ff9142",
    "green": "#2fc795",
    "pink": "#e29cc9",
}

KEPT = (0.18, 0.52, 0.78)
"""Red, green and blue of a kept channel: it is in an image, so it is the same on a light and on a dark page."""


class StageStyle(NamedTuple):
    """A stage of pruning a layer: its name on a page, its colour, and its meaning."""

    label: str
    colour: str
    meaning: str


STAGES = {
    "selection": StageStyle("chosen", "grey", "right after the choice of what to keep"),
    "refit": StageStyle("refit", "blue", "with its output weights solved for"),
    "alternating": StageStyle("adjusted", "orange", "with all of its weights improved in turn"),
}
"""The stages in order, keyed by their names in a report."""

SETTINGS: "dict[RcKeyType, Any]" = {
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.facecolor": "none",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "text.parse_math": False,  # a folder's name may contain dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "spap",  # the same report gives the same page
}
"""matplotlib's settings for all plots of a page."""


def open_sides(axes: "Axes") -> None:
    """Hides the top and right sides of the frame."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def grid(axes: "Axes", axis: str = "both") -> None:
    """Draws light grid lines at the major ticks, behind the data."""
    axes.grid(True, which="major", axis=axis, color=LIGHT["grid"], linewidth=0.8)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)


def themed(svg: str) -> str:
    """Replaces each colour of a drawing by the page's CSS variable of its name, so that it follows the theme."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
