"""The scope of a results page."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import Row

T = TypeVar("T")

Cell = tuple[float, str]
"""A sparsity, and a method that prunes to it."""


@dataclass(frozen=True)
class Scope:
    """What the report covers, whether or not rows exist for it, and the command that asked for it."""

    models: tuple[str, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    command: str

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsities of the cells, ascending."""
        return tuple(sorted({cut for cut, _ in self.cells}))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of the cells: known ones in their order, then those with changed settings."""
        asked = {name for _, name in self.cells}
        return tuple(name for name in METHODS if name in asked) + tuple(sorted(asked - METHODS.keys()))

    @property
    def runs(self) -> int:
        """The number of rows when none is missing."""
        return len(self.models) * len(self.cells) * len(self.seeds)

    def with_rows(self, rows: Collection[Row]) -> "Scope":
        """Extends the scope to cover rows too, so that a call for one method keeps the page of all that were run."""
        return replace(
            self,
            models=tuple(sorted({*self.models, *(row.model for row in rows)})),
            cells=once([*self.cells, *((row.sparsity, row.method) for row in rows)]),
            seeds=tuple(sorted({*self.seeds, *(row.seed for row in rows)})),
        )


def once(values: Iterable[T]) -> tuple[T, ...]:
    """Removes repetitions, keeping the order."""
    return tuple(dict.fromkeys(values))
