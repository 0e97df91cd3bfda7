"""What a page is about."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import Row


@dataclass(frozen=True)
class Scope:
    """What the report is about, whether there are rows for it or not, and the command that asked for it."""

    models: tuple[str, ...]
    sparsities: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    command: str

    @property
    def runs(self) -> int:
        """How many rows there are when nothing is missing."""
        return len(self.models) * len(self.sparsities) * len(self.methods) * len(self.seeds)

    def with_rows(self, rows: Collection[Row]) -> "Scope":
        """Wide enough for some rows too: a call for one of many methods leaves a page of all that were run."""
        methods = {*self.methods, *(row.method for row in rows)}
        return replace(
            self,
            models=tuple(sorted({*self.models, *(row.model for row in rows)})),
            sparsities=tuple(sorted({*self.sparsities, *(row.sparsity for row in rows)})),
            methods=tuple(name for name in METHODS if name in methods) + tuple(sorted(methods - METHODS.keys())),
            seeds=tuple(sorted({*self.seeds, *(row.seed for row in rows)})),
        )
