"""Estimates the remaining time from the pace so far: arithmetic on measured times, without a clock."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from spap_jax.quantities import duration_text

_SHORTEST = 1.0
"""Seconds; shorter times are not worth reporting."""


@dataclass(frozen=True)
class Pace:
    """Measured seconds per unit of work of each kind.

    The first piece of a kind after a start is not counted: programs are compiled for it, which can take longer than the
    work itself. So the pace of a kind is known from its second piece on.

    Attributes:
        spent: Number of units that were counted and the seconds that they took, by kind.
        warm: Kinds whose first piece is done.
    """

    spent: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    warm: frozenset[str] = frozenset()

    def cold(self) -> Self:
        """Returns the same pace for programs that will have to be compiled again."""
        return replace(self, warm=frozenset())

    def after(self, kind: str, units: float, seconds: float) -> Self:
        """Returns the pace after one more piece of work."""
        if kind not in self.warm:
            return replace(self, warm=self.warm | {kind})
        counted, took = self.spent.get(kind, (0.0, 0.0))
        return replace(self, spent={**self.spent, kind: (counted + units, took + seconds)})

    def left(self, todo: Iterable[tuple[str, float]]) -> str:
        """Estimates how long the given work will take, for the end of a line: "about 39 min left".

        Of work whose pace is not known it says when that begins: "step in 39 min". It is empty if nothing is known or
        worth reporting.

        Args:
            todo: Kinds of work and their units, in the order in which they will be done.
        """
        wanted = [(kind, units) for kind, units in todo if units]
        known = list(itertools.takewhile(lambda each: each[0] in self.spent, wanted))
        seconds = sum(units * self.spent[kind][1] / self.spent[kind][0] for kind, units in known)
        if seconds < _SHORTEST:
            return ""
        time = duration_text(seconds, digits=2)
        return f"about {time} left" if len(known) == len(wanted) else f"{wanted[len(known)][0]} in {time}"
