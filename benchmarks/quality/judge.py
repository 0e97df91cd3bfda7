"""Evaluation of the rows: medians over seeds, ratios to the best peer, targets met and missed. Arithmetic only."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.quality.methods import PEERS, STEPPED, TARGETS
from benchmarks.quality.results import Row

SEEDS = 3
"""Number of seeds that a verdict requires."""


@dataclass(frozen=True)
class Median:
    """A median over seeds, the number of seeds, and their range."""

    value: float
    seeds: int
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """One of our methods at one sparsity of one model, against the best peer.

    Attributes:
        model: The dense model.
        sparsity: Fraction of channels removed.
        method: Our method.
        target: Upper bound for the ratio; None if there is no target.
        best: The peers that were best, the one that was best on most seeds first.
        ratio: Rise in log-perplexity over the best peer's; None if a row is missing.
        stepped: The same ratio to the best of the peers that take our steps.
        peers: Number of peers with a row, on the seed with the fewest that has a ratio.
    """

    model: str
    sparsity: float
    method: str
    target: float | None
    best: tuple[str, ...]
    ratio: Median | None
    stepped: Median | None
    peers: int

    @property
    def met(self) -> bool | None:
        """Whether the ratio is within the target; None if either is missing."""
        return None if self.ratio is None or self.target is None else self.ratio.value <= self.target

    @property
    def complete(self) -> bool:
        """Whether rows for all peers and enough seeds exist."""
        return self.ratio is not None and self.ratio.seeds >= SEEDS and self.peers == len(PEERS)


class Judge:
    """Looks up rows by model, sparsity, method and seed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._cells: dict[tuple[str, float, str], dict[int, Row]] = {}
        for row in rows:
            self._cells.setdefault((row.model, row.sparsity, row.method), {})[row.seed] = row

    def seeds(self, model: str, sparsity: float, method: str) -> dict[int, Row]:
        """Returns the rows of a cell by seed; empty if nothing was run."""
        return self._cells.get((model, sparsity, method), {})

    def median(self, model: str, sparsity: float, method: str, value: Callable[[Row], float]) -> Median | None:
        """Returns the median of a value over the seeds of a cell for which it was measured."""
        values = [value(row) for row in self.seeds(model, sparsity, method).values()]
        return median_of([value for value in values if not math.isnan(value)])

    def best(self, model: str, sparsity: float, seed: int, methods: Sequence[str]) -> Row | None:
        """Returns the row with the lowest rise among the given methods on one seed."""
        cells = (self.seeds(model, sparsity, method) for method in methods)
        return min((cell[seed] for cell in cells if seed in cell), key=lambda row: row.rise, default=None)

    def ratio(self, model: str, sparsity: float, method: str, against: Sequence[str]) -> Median | None:
        """Returns the median over seeds of the rise over the lowest rise among others *on the same seed*."""
        pairs = [
            (row.rise, best.rise)
            for seed, row in self.seeds(model, sparsity, method).items()
            if (best := self.best(model, sparsity, seed, against)) is not None
        ]
        return median_of([ratio_of(*pair) for pair in pairs])

    def verdict(self, model: str, sparsity: float, method: str) -> Verdict:
        """Returns the verdict on one of our methods."""
        seeds = self.seeds(model, sparsity, method)
        counts = (sum(seed in self.seeds(model, sparsity, peer) for peer in PEERS) for seed in seeds)
        found = (self.best(model, sparsity, seed, PEERS) for seed in seeds)
        best = Counter(row.method for row in found if row is not None)
        return Verdict(
            model,
            sparsity,
            method,
            TARGETS.get(method, {}).get(sparsity),
            tuple(name for name, _ in best.most_common()),
            self.ratio(model, sparsity, method, PEERS),
            self.ratio(model, sparsity, method, STEPPED),
            min((count for count in counts if count), default=0),
        )


def median_of(values: Sequence[float]) -> Median | None:
    """Returns the median of the values, or None if there are none."""
    return Median(median(values), len(values), min(values), max(values)) if values else None


def ratio_of(ours: float, theirs: float) -> float:
    """Returns our rise as a fraction of theirs; infinite if theirs is not positive."""
    return ours / theirs if theirs > 0 else math.inf
