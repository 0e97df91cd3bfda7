"""Warnings of text that is blank or repeats itself, or that is used both for learning and for evaluation."""

import numpy as np

from spap_jax.errors import warn

_FEW = 16
"""Fewer distinct tokens, each at least this often on average, are no language, not even one spelled in bytes."""


def warn_of_repetition(tokens: np.ndarray, name: str) -> None:
    """Warns if the tokens to prune or train on are nearly all the same.

    Args:
        tokens: Token ids of any shape.
        name: Name of the data.
    """
    different = len(np.unique(tokens))
    if different < _FEW and tokens.size >= _FEW * different:
        values = "value" if different == 1 else "values"
        warn(
            f"{name} gives {tokens.size} tokens with only {different} distinct {values}: they show little of what a "
            "model has to do, so take ordinary text."
        )


def warn_of_overlap(learned: np.ndarray, judged: np.ndarray | None) -> None:
    """Warns if perplexity will be measured on sequences that the model is pruned or trained on.

    Args:
        learned: Token blocks [B, T] to prune or train on.
        judged: Token blocks to evaluate on, if there are any.
    """
    if judged is None:
        return
    both = {row.tobytes() for row in learned} & {row.tobytes() for row in judged}
    if both:
        warn(
            f"{len(both)} of the {len(learned)} sequences that are learned from are also measured on, so the "
            "perplexity will look better than it is: name other text for one of the two."
        )
