"""The record of a measurement on held-out sequences, which the steps of pruning and of recovery training share."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """A measurement on the held-out sequences, after some steps. Losses are in nats per token.

    Attributes:
        step: Number of steps made so far.
        tokens: Number of tokens in these steps.
        losses: Training loss of every step since the previous check, on its own batch and before its update.
        held_out: Loss on the held-out sequences; on the training sequences if none are held out.
        taken: Whether this loss is the lowest so far, so that these weights are kept.
        seconds: Duration of the steps since the previous check, and of the check.
    """

    step: int
    tokens: int
    losses: tuple[float, ...]
    held_out: float
    taken: bool
    seconds: float


def check_of(tree: dict[str, Any]) -> Check:
    """Inverts ``dataclasses.asdict`` for a check, after a round trip through JSON."""
    losses: Any = tuple(tree["losses"])
    return Check(**tree | {"losses": losses})
