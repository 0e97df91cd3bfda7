"""The peers' rules for choosing channels, on the same `Problem`, so that only the rule differs in a comparison.

The closed-form refit that follows is ours for all of them: the comparison is between selections.
"""

import jax.numpy as jnp
from jax import Array, lax

from spap_jax.numerics import full_precision
from spap_jax.solver.penalty import removal_costs
from spap_jax.solver.problem import Problem, System, Tableau, dense_tableau, pivot


def magnitude(problem: Problem) -> Array:
    """``|W_j|^2``, [f]: the norm of a channel's outgoing weights (Li et al. 2017, "Pruning Filters").

    A `Problem` holds the output projection only, so the incoming weights, which some count too, are left out.

    Args:
        problem: The layer, f channels.
    """
    return jnp.sum(problem.weight**2, axis=1)


def wanda(problem: Problem) -> Array:
    """``sqrt(gram_jj) * sum_i |W_ji|``, [f]: a channel's activation norm times its weights' absolute sum.

    Wanda (Sun et al. 2024) summed over a channel's weights, as Wanda-sp (An et al. 2024, the FLAP paper) and FASP (Hu
    et al. 2025) do. Where the moments are centred, for layers with an output bias, so is the norm.

    Args:
        problem: The layer, f channels.
    """
    return jnp.sqrt(jnp.diagonal(problem.gram)) * jnp.sum(jnp.abs(problem.weight), axis=1)


def flap(problem: Problem, variance: Array) -> Array:
    """``|W_j|^2 * Var(h_j)``, [f]: WIFV, the weighted fluctuation of FLAP (An et al. 2024).

    Args:
        problem: The layer, f channels.
        variance: [f] variance of each hidden channel over the calibration tokens.
    """
    return magnitude(problem) * variance


@full_precision
def obs(system: System, keep: int) -> Array:
    """Optimal brain surgeon, one channel at a time: ZipLM (Kurtic et al. 2023), OSSCAR (Meng et al. 2024) unswapped.

    Args:
        system: The layer, f channels.
        keep: How many channels to keep, k; static.

    Returns:
        [k] int32 channel numbers, ascending.
    """

    def remove_cheapest(_, tableau: Tableau) -> Tableau:
        cheapest = jnp.argmin(removal_costs(tableau))
        return pivot(tableau, cheapest[None], jnp.ones(1, bool), 0.0)

    f = system.gram.shape[0]
    tableau = lax.fori_loop(0, f - keep, remove_cheapest, dense_tableau(system))
    return jnp.flatnonzero(~tableau.removed, size=keep).astype(jnp.int32)


def highest(scores: Array, keep: int) -> Array:
    """The channels with the highest scores; among equals the first.

    Args:
        scores: [f] larger is more important.
        keep: How many to keep, k; static.

    Returns:
        [k] int32 channel numbers, ascending.
    """
    return jnp.sort(lax.top_k(scores, keep)[1]).astype(jnp.int32)
