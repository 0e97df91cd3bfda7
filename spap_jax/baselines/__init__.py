"""Ways to choose channels: the library's own and its peers', behind one call."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from spap_jax.baselines import criteria
from spap_jax.solver.penalty import select
from spap_jax.solver.problem import Problem, System
from spap_jax.solver.swap import Polished, polish


class Request(NamedTuple):
    """What a selector may look at.

    Attributes:
        problem: The layer, f channels.
        system: The same, ridged and equilibrated.
        variance: [f] variance of each hidden channel over the calibration tokens.
        keep: How many channels to keep, k; static.
        penalty: Weight of the penalty on a removed channel, relative to its energy.
        steps: Steps in which the number of penalised channels grows; static.
    """

    problem: Problem
    system: System
    variance: Array
    keep: int
    penalty: float
    steps: int


SELECTORS: dict[str, Callable[[Request], Array]] = {
    "spap": lambda r: select(r.system, r.keep, r.penalty, r.steps),
    "wanda": lambda r: criteria.highest(criteria.wanda(r.problem), r.keep),
    "flap": lambda r: criteria.highest(criteria.flap(r.problem, r.variance), r.keep),
    "magnitude": lambda r: criteria.highest(criteria.magnitude(r.problem), r.keep),
    "obs": lambda r: criteria.obs(r.system, r.keep),
}
"""Each method's choice, [k] int32 ascending, before any polish."""


def select_channels(
    method: str,
    problem: Problem,
    system: System,
    variance: Array,
    keep: int,
    *,
    penalty: float = 100.0,
    steps: int = 40,
    rounds: int = 8,
) -> Polished:
    """Chooses a layer's channels; only "spap" polishes, but every choice gets its count of improving swaps.

    Args:
        method: A key of `SELECTORS`.
        problem: The layer, f channels.
        system: The same, ridged and equilibrated.
        variance: [f] variance of each hidden channel over the calibration tokens.
        keep: How many channels to keep, k; static, as are `method`, `steps` and `rounds`.
        penalty: Weight of the penalty on a removed channel, relative to its energy.
        steps: Steps in which the number of penalised channels grows to f - k.
        rounds: Rounds of swaps in the polish.
    """
    kept = SELECTORS[method](Request(problem, system, variance, keep, penalty, steps))
    return polish(system, kept, rounds if method == "spap" else 0)
