"""Methods that select channels and update the kept weights: the library's own and its baselines, behind one interface.

Every baseline follows its paper except for what all methods share here, so that comparisons isolate the methods: second
moments of the same tokens, on the stream that the pruned blocks produce; where weights are solved for, the same target,
which also corrects earlier errors, and the same ridge, unless the update is ours; one width for all layers; whole
key/value groups of heads. This favours baselines that solve for weights, and deprives FLAP of its widths by layer.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from spap_jax.settings import PruneSettings
from spap_jax.solver import criteria, groups
from spap_jax.solver.penalty import select
from spap_jax.solver.problem import Problem, System
from spap_jax.solver.swap import Polished, polish

SWAP_ROUNDS = 8
"""Largest number of rounds of exact swaps, for the methods that end with swaps."""


class SelectorInputs(NamedTuple):
    """Inputs available to a selector.

    Attributes:
        mean: [f] mean of each hidden channel over the calibration tokens.
        variance: [f] variance of each hidden channel over the calibration tokens.
    """

    problem: Problem
    system: System
    mean: Array
    variance: Array
    key: Array


class Choice(NamedTuple):
    """The channels of a layer that are kept.

    Attributes:
        kept: [k] their numbers, ascending.
        swaps: [] number of swaps made.
        improving: [] number of improving swaps that are left.
        ridge: [] the relative ridge used.
        hidden_mean: [f] mean of every hidden channel, on the stream that they were chosen on.
    """

    kept: Array
    swaps: Array
    improving: Array
    ridge: Array
    hidden_mean: Array


class PruningMethod(NamedTuple):
    """A pruning method.

    Attributes:
        select: (layer, k) -> [k] int32 channels to keep, ascending, before any swaps.
        update: How its paper updates the kept weights: "none", "bias", "refit" or "alternate".
        score: layer -> [f], for methods that select by score alone; a group's score is the sum of its channels'.
    """

    select: Callable[[SelectorInputs, int], Array]
    update: str
    swaps: bool = False
    score: Callable[[SelectorInputs], Array] | None = None


def _by_score(score: Callable[[SelectorInputs], Array], update: str) -> PruningMethod:
    return PruningMethod(lambda layer, keep: criteria.highest(score(layer), keep), update, score=score)


def _wanda(layer: SelectorInputs) -> Array:
    return criteria.wanda(layer.problem.weight, layer.mean, layer.variance)


METHODS: dict[str, PruningMethod] = {
    "spap": PruningMethod(lambda layer, keep: select(layer.system, keep), "alternate", swaps=True),
    "random": _by_score(lambda layer: criteria.random(layer.key, layer.mean.size), "none"),
    "magnitude": _by_score(lambda layer: criteria.magnitude(layer.problem.weight), "none"),
    "wanda": _by_score(_wanda, "none"),
    "flap": _by_score(lambda layer: criteria.flap(layer.problem.weight, layer.variance), "bias"),
    "fasp": _by_score(_wanda, "refit"),
    "obs": PruningMethod(lambda layer, keep: criteria.obs(layer.system, keep), "refit"),
    "osscar": PruningMethod(lambda layer, keep: criteria.obs_batches(layer.system, keep), "refit", swaps=True),
}
"""The methods by name; the criteria in `criteria` document how each relates to its paper."""


def update_used(settings: PruneSettings) -> str:
    """Returns the update used in a run: "none", "bias", "refit" or "alternate"."""
    return METHODS[settings.method].update if settings.update == "own" else settings.update


def select_channels(method: str, layer: SelectorInputs, keep: int, swap_rounds: int = SWAP_ROUNDS) -> Polished:
    """Selects a layer's channels, and swaps some if the method does; all arguments but ``layer`` are static."""
    way = METHODS[method]
    return polish(layer.system, way.select(layer, keep), swap_rounds if way.swaps else 0)


def select_groups(method: str, layer: SelectorInputs, count: int, keep: int) -> Polished:
    """Selects groups of channels that are kept or removed together, such as a layer's key/value heads.

    Methods that score channels keep the groups with the highest sums; the others remove the cheapest group, one at a
    time. The improving swaps are counted for every method. ``method``, ``count`` (all groups) and ``keep`` are static.
    """
    way = METHODS[method]
    if way.score is None:
        kept = groups.eliminate(layer.system, count, keep)
    else:
        kept = criteria.highest(way.score(layer).reshape(count, -1).sum(axis=1), keep)
    return groups.polish(layer.system, count, kept, SWAP_ROUNDS if way.swaps else 0)
