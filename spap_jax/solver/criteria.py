"""Selection criteria of the baselines, reimplemented from their papers.

`spap_jax.solver.methods` documents what all of them share here, and how that differs from the papers.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from spap_jax.numerics import full_precision
from spap_jax.solver.penalty import removal_costs
from spap_jax.solver.problem import System
from spap_jax.solver.tableau import Tableau, pivot

BATCHES = 10


def random(key: Array, width: int) -> Array:
    """Returns uniform random scores, [f], so that every set of channels is equally likely; the trivial baseline."""
    return jax.random.uniform(key, (width,))


def magnitude(weight: Array) -> Array:
    """Computes ``|W_j|^2``, [f], of a dense output projection [f,d]: the squared norm of a channel's outgoing weights.

    This is structured magnitude pruning, after Li et al. 2017 ("Pruning Filters for Efficient ConvNets"). They sum the
    absolute values of a channel's incoming weights; here the squares of its outgoing weights are summed, which treats
    gated and plain MLPs alike.
    """
    return jnp.sum(weight**2, axis=1)


def wanda(weight: Array, mean: Array, variance: Array) -> Array:
    """Computes ``|h_j| * sum_i |W_ji|``, [f]: a channel's root mean square times its outgoing weights' absolute sum.

    Wanda (Sun et al. 2024, arXiv 2306.11695) scores single weights this way; the sum over a channel is Wanda-sp (An et
    al. 2024, the FLAP paper) and the metric of FASP (Hu et al. 2025, arXiv 2501.09412). Wanda-sp leaves the weights
    unchanged; FASP then solves least squares for the output projection, and also prunes attention values and outputs.

    Args:
        weight: [f,d] the dense output projection.
        mean: [f] mean of each hidden channel over the calibration tokens.
        variance: [f] variance of each channel; the norm is not centred, even if the layer's moments are.
    """
    return jnp.sqrt(variance + mean**2) * jnp.sum(jnp.abs(weight), axis=1)


def flap(weight: Array, variance: Array) -> Array:
    """Computes ``|W_j|^2 * Var(h_j)``, [f]: WIFV, the weighted fluctuation of FLAP (An et al. 2024, arXiv 2312.11983).

    A channel that hardly varies is well approximated by its mean, which the update "bias" adds. FLAP standardises the
    scores within each layer and ranks them over all layers and attention heads, so that its layers end with different
    widths; here every layer ranks its own channels.

    Args:
        weight: [f,d] the dense output projection.
        variance: [f] variance of each hidden channel over the calibration tokens.
    """
    return magnitude(weight) * variance


@full_precision
def obs(system: System, keep: int) -> Array:
    """Selects by optimal brain surgeon, one channel at a time, as in ZipLM (Kurtic et al. 2023, arXiv 2302.04089).

    Each step removes the channel with the least ``|V_j|^2 / (G^-1)_jj``, with V re-solved for the remaining channels.
    SlimGPT (Ling et al. 2024, arXiv 2412.18110) uses the same score and removes channels in groups of varying size,
    more of them in later layers. Both update the weights step by step; the closed form at the end, the update "refit",
    yields the same result without the accumulated rounding.

    Returns:
        [keep] int32 channel numbers, ascending; ``keep`` is static.
    """

    def remove_cheapest(_, tableau: Tableau) -> Tableau:
        cheapest = jnp.argmin(removal_costs(tableau))
        return pivot(tableau, cheapest[None], jnp.ones(1, bool), 0.0)

    f = system.gram.shape[0]
    return _kept(lax.fori_loop(0, f - keep, remove_cheapest, system.dense), keep)


@full_precision
def obs_batches(system: System, keep: int) -> Array:
    """Selects by the elimination of OSSCAR (Meng et al. 2024, arXiv 2403.12983): ten batches of the cheapest channels.

    Within a batch the costs are those of removing one channel alone; between batches they are recomputed. OSSCAR then
    searches locally: it swaps t channels at once and accepts the swap if the error falls. Here the method "osscar"
    makes the best disjoint one-for-one swaps, many per round if they improve jointly, until none improves or
    `swap_rounds` is exhausted (`solver/swap.py`). In place of its damping of 0.01 times the mean energy, this uses the
    run's ridge, and float32 in place of float64. Returns [keep] int32 channel numbers, ascending; ``keep`` is static.
    """
    count = system.gram.shape[0] - keep
    size = max(1, math.ceil(count / BATCHES))

    def remove_batch(step: Array, tableau: Tableau) -> Tableau:
        _, batch = lax.top_k(-removal_costs(tableau), size)
        return pivot(tableau, batch, step * size + jnp.arange(size) < count, 0.0)

    return _kept(lax.fori_loop(0, math.ceil(count / size), remove_batch, system.dense), keep)


def highest(scores: Array, keep: int) -> Array:
    """Selects the channels with the highest scores [f] -> [keep] int32, ascending; ties go to the lower number."""
    return jnp.sort(lax.top_k(scores, keep)[1]).astype(jnp.int32)


def _kept(tableau: Tableau, keep: int) -> Array:
    return jnp.flatnonzero(~tableau.removed, size=keep).astype(jnp.int32)
