"""Text that is blank, or that says the same again and again: no refusal, but a warning."""

import numpy as np

from spap_jax.errors import warn

_FEW = 16
"""Fewer different tokens, each of them at least as often, make no language, not even one that is spelled in bytes."""


def warn_of_repetition(tokens: np.ndarray, name: str) -> None:
    """Warns of tokens to prune or train on that are nearly all the same.

    Args:
        tokens: Token ids of any shape.
        name: What the data are called.
    """
    different = len(np.unique(tokens))
    if different < _FEW and tokens.size >= _FEW * different:
        values = "value" if different == 1 else "values"
        warn(
            f"{name} gives {tokens.size} tokens with only {different} distinct {values}: they show little of what a "
            "model has to do, so take ordinary text."
        )
