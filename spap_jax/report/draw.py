"""Rendering of figures: SVGs that are embedded in a page and follow its colours, and PNGs."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.figure import Figure

from spap_jax.report.style import DPI, LIGHT, SETTINGS, themed
from spap_jax.report.write import COMMAND


@contextmanager
def drawing() -> Iterator[None]:
    """Applies the style of all plots while they are drawn and rendered."""
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the fonts of the page may have it
        yield


def svg(figure: Figure, prefix: str) -> str:
    """Returns an ``<svg>`` element for a page; its ids begin with ``prefix``, so that they are unique on the page."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    return themed(re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", text))


def png(figure: Figure) -> bytes:
    """Returns a PNG with the background of the light page."""
    file = io.BytesIO()
    with drawing():
        figure.savefig(file, format="png", dpi=DPI, facecolor=LIGHT["page"], metadata={"Software": COMMAND})
    return file.getvalue()
