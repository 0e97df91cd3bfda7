"""What a page is about."""

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
    """What the report is about, whether there are rows for it or not, and the command that asked for it."""

    models: tuple[str, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    command: str

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Those of the cells, ascending."""
        return tuple(sorted({cut for cut, _ in self.cells}))

    @property
    def methods(self) -> tuple[str, ...]:
        """Those of the cells: known ones in their order, then those with settings of their own."""
        asked = {name for _, name in self.cells}
        return tuple(name for name in METHODS if name in asked) + tuple(sorted(asked - METHODS.keys()))

    @property
    def runs(self) -> int:
        """How many rows there are when nothing is missing."""
        return len(self.models) * len(self.cells) * len(self.seeds)

    def with_rows(self, rows: Collection[Row]) -> "Scope":
        """Wide enough for some rows too: a call for one of many methods leaves a page of all that were run."""
        return replace(
            self,
            models=tuple(sorted({*self.models, *(row.model for row in rows)})),
            cells=once([*self.cells, *((row.sparsity, row.method) for row in rows)]),
            seeds=tuple(sorted({*self.seeds, *(row.seed for row in rows)})),
        )


def once(values: Iterable[T]) -> tuple[T, ...]:
    """The same without repetitions."""
    return tuple(dict.fromkeys(values))
