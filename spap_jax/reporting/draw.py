"""Figures as files: drawings that stand in a page and take its colours, and PNGs."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.figure import Figure

from spap_jax.reporting.style import DPI, LIGHT, SETTINGS, themed
from spap_jax.reporting.write import COMMAND


@contextmanager
def drawing() -> Iterator[None]:
    """The look of all plots, while they are made and while they are written."""
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a page's own fonts may well have it
        yield


def svg(figure: Figure, prefix: str) -> str:
    """An ``<svg>`` element for a page; its ids begin with ``prefix``, so that drawings on one page have their own."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    return themed(re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", text))


def png(figure: Figure) -> bytes:
    """A PNG on the light page's colour."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, facecolor=LIGHT["page"], metadata={"Software": COMMAND})
    return file.getvalue()
