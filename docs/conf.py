"""Sphinx's settings; ``make docs`` builds the pages and fails on any warning."""

from docutils import nodes

from spap_jax import __version__

project = "SPAP-JAX"
author = copyright = "The SPAP-JAX authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "cyclopts.sphinx_ext"]
html_theme = "furo"
html_title = f"SPAP-JAX {release}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]  # as on a code host: $...$ and $$...$$
autodoc_typehints = "none"  # docstrings name what is taken, with shapes; an array-like is a line long
autodoc_member_order = "bysource"
napoleon_use_ivar = True
highlight_language = "none"
smartquotes = False  # two hyphens are an option, not a dash


def examples_as_typed(_, doctree: nodes.document) -> None:
    """Sets the examples of the commands' help as code: cyclopts hands them on as indented text."""
    for quote in list(doctree.findall(nodes.block_quote)):
        lines = [line.rstrip() for line in quote.astext().splitlines()]
        if all(line.startswith("spap ") for line in lines):
            text = "\n".join(lines)
            quote.replace_self(nodes.literal_block(text, text))


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("doctree-read", examples_as_typed)
