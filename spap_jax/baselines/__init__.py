"""Ways to choose channels and to update the weights kept: the library's own and its peers', behind one call.

Every peer works as its paper says up to what all of them share here, so that a comparison shows the methods alone: the
same second moments of the same tokens, on the stream that the already pruned blocks produce; where weights are solved
for, the same target, which also repairs what earlier blocks broke, and the same ridge; the same width in every layer;
attention heads in whole key/value groups, or none. This favours the peers that solve for weights over their papers, in
which each layer reproduces what the dense layer makes of its tokens and repairs nothing; and it takes from FLAP its
allocation of widths over layers.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from spap_jax.baselines import criteria
from spap_jax.settings import PruneSettings
from spap_jax.solver import groups
from spap_jax.solver.penalty import select
from spap_jax.solver.problem import Problem, System
from spap_jax.solver.swap import Polished, polish


class Layer(NamedTuple):
    """What a selector may look at.

    Attributes:
        problem: The layer, f channels.
        system: The same, ridged and equilibrated.
        mean: [f] mean of each hidden channel over the calibration tokens.
        variance: [f] variance of each hidden channel over the calibration tokens.
        key: Randomness of this layer's choice.
    """

    problem: Problem
    system: System
    mean: Array
    variance: Array
    key: Array


class Search(NamedTuple):
    """How hard to search, static but for the penalty.

    Attributes:
        penalty: Weight of the penalty on a removed channel, relative to its energy.
        steps: Steps in which the number of penalised channels grows.
        swap_rounds: Rounds of swaps, for the methods that end with them.
    """

    penalty: float | Array = 100.0
    steps: int = 40
    swap_rounds: int = 8


class Method(NamedTuple):
    """A way to prune.

    Attributes:
        select: (layer, k, search) -> [k] int32 channels to keep, ascending, before any swaps.
        update: What its paper does with the weights kept: "none", "bias", "refit" or "alternate".
        swaps: Whether exact swaps end the selection.
        score: layer -> [f], where the highest scores are all there is to the selection; of a group, their sum.
    """

    select: Callable[[Layer, int, Search], Array]
    update: str
    swaps: bool = False
    score: Callable[[Layer], Array] | None = None


def _by_score(score: Callable[[Layer], Array], update: str) -> Method:
    return Method(lambda layer, keep, search: criteria.highest(score(layer), keep), update, score=score)


def _wanda(layer: Layer) -> Array:
    return criteria.wanda(layer.problem.weight, layer.mean, layer.variance)


METHODS: dict[str, Method] = {
    "spap": Method(lambda layer, keep, s: select(layer.system, keep, s.penalty, s.steps), "alternate", swaps=True),
    "random": _by_score(lambda layer: criteria.random(layer.key, layer.mean.size), "none"),
    "magnitude": _by_score(lambda layer: criteria.magnitude(layer.problem.weight), "none"),
    "wanda": _by_score(_wanda, "none"),
    "flap": _by_score(lambda layer: criteria.flap(layer.problem.weight, layer.variance), "bias"),
    "fasp": _by_score(_wanda, "refit"),
    "obs": Method(lambda layer, keep, search: criteria.obs(layer.system, keep), "refit"),
    "osscar": Method(lambda layer, keep, search: criteria.obs_batches(layer.system, keep), "refit", swaps=True),
}
"""The methods by name; what each takes from its paper is told by its criterion in `criteria`."""


def update_used(settings: PruneSettings) -> str:
    """The update of a run: "none", "bias", "refit" or "alternate"."""
    return METHODS[settings.method].update if settings.update == "own" else settings.update


def select_channels(method: str, layer: Layer, keep: int, search: Search) -> Polished:
    """Chooses a layer's channels; every choice gets its count of improving swaps, whether it makes swaps or not.

    Args:
        method: A key of `METHODS`.
        layer: What to look at, f channels.
        keep: How many channels to keep, k; static, as is `method`.
        search: How hard to search.
    """
    way = METHODS[method]
    return polish(layer.system, way.select(layer, keep, search), search.swap_rounds if way.swaps else 0)


def select_groups(method: str, layer: Layer, count: int, keep: int, swap_rounds: int) -> Polished:
    """Chooses among groups of channels that stay or go together, as a layer's key/value heads do.

    Methods that score channels keep the groups with the highest sums; the others remove the cheapest group, one at a
    time. Every choice gets its count of improving swaps.

    Args:
        method: A key of `METHODS`.
        layer: What to look at, f channels in groups of f / count.
        count: Number of groups; static.
        keep: How many to keep; static, as is `method`.
        swap_rounds: Most swaps, for the methods that end with them; static.
    """
    way = METHODS[method]
    if way.score is None:
        kept = groups.eliminate(layer.system, count, keep)
    else:
        kept = criteria.highest(way.score(layer).reshape(count, -1).sum(axis=1), keep)
    return groups.polish(layer.system, count, kept, swap_rounds if way.swaps else 0)
