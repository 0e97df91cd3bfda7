"""Text that is blank or repeats itself, or that is measured on after it was learned from: no refusal, but a warning."""

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


def warn_of_overlap(learned: np.ndarray, judged: np.ndarray | None) -> None:
    """Warns of a perplexity that will be measured on what a model was pruned or trained on.

    Args:
        learned: Token blocks [B, T] to prune or train on.
        judged: Those to measure on, if there are any.
    """
    if judged is None:
        return
    both = {row.tobytes() for row in learned} & {row.tobytes() for row in judged}
    if both:
        warn(
            f"{len(both)} of the {len(learned)} sequences that are learned from are also measured on, so the "
            "perplexity will look better than it is: name other text for one of the two."
        )
