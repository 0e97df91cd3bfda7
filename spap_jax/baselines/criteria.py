"""The peers' rules for choosing channels, written anew from their papers.

What all of them share here, and how that differs from the papers, is told in `spap_jax.baselines`.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from spap_jax.numerics import full_precision
from spap_jax.solver.penalty import removal_costs
from spap_jax.solver.problem import System, Tableau, dense_tableau, pivot

BATCHES = 10


def random(key: Array, width: int) -> Array:
    """Uniform scores, [f]: every set of channels is equally likely; what a criterion has to beat.

    Args:
        key: Randomness.
        width: Number of channels, f; static.
    """
    return jax.random.uniform(key, (width,))


def magnitude(weight: Array) -> Array:
    """``|W_j|^2``, [f]: the size of a channel's outgoing weights.

    Magnitude pruning of whole structures, after Li et al. 2017 ("Pruning Filters for Efficient ConvNets"). They take
    the absolute sum of the weights that enter a channel; here it is the squares of those that leave it, in which
    channels of a gated and of a plain MLP compare alike.

    Args:
        weight: [f,d] the dense output projection.
    """
    return jnp.sum(weight**2, axis=1)


def wanda(weight: Array, mean: Array, variance: Array) -> Array:
    """``|h_j| * sum_i |W_ji|``, [f]: a channel's root mean square times its outgoing weights' absolute sum.

    Wanda (Sun et al. 2024, arXiv 2306.11695) scores single weights so; its sum over a channel is Wanda-sp (An et al.
    2024, the FLAP paper) and the metric of FASP (Hu et al. 2025, arXiv 2501.09412). Wanda-sp keeps the weights as they
    are; FASP then solves least squares for the output projection. FASP also prunes the attention's values and outputs.

    Args:
        weight: [f,d] the dense output projection.
        mean: [f] mean of each hidden channel over the calibration tokens.
        variance: [f] variance of each; the norm is not centred, even where the layer's moments are.
    """
    return jnp.sqrt(variance + mean**2) * jnp.sum(jnp.abs(weight), axis=1)


def flap(weight: Array, variance: Array) -> Array:
    """``|W_j|^2 * Var(h_j)``, [f]: WIFV, the weighted fluctuation of FLAP (An et al. 2024, arXiv 2312.11983).

    A channel that hardly varies is well replaced by its mean, which the update "bias" adds. FLAP standardises the
    scores within each layer and ranks them over all layers and over the attention heads, so that its layers end with
    different widths; here every layer ranks its own channels.

    Args:
        weight: [f,d] the dense output projection.
        variance: [f] variance of each hidden channel over the calibration tokens.
    """
    return magnitude(weight) * variance


@full_precision
def obs(system: System, keep: int) -> Array:
    """Optimal brain surgeon, a whole channel at a time: as ZipLM (Kurtic et al. 2023, arXiv 2302.04089).

    Each step removes the channel with the least ``|V_j|^2 / (G^-1)_jj``, V being solved anew for those left. SlimGPT
    (Ling et al. 2024, arXiv 2412.18110) has the same score and removes channels in groups, of a size that changes as it
    goes, with more of them in later layers. Both change the weights step by step; the closed form at the end, the
    update "refit", is where those steps lead, without their rounding.

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
    return _kept(lax.fori_loop(0, f - keep, remove_cheapest, dense_tableau(system)), keep)


@full_precision
def obs_batches(system: System, keep: int) -> Array:
    """The elimination of OSSCAR (Meng et al. 2024, arXiv 2403.12983): ten batches, each of the cheapest channels.

    Within a batch the costs are those of losing one channel alone; between batches they are computed anew. OSSCAR then
    searches locally: it exchanges t channels at once and keeps the exchange if the error falls. Here the method
    "osscar" makes disjoint exchanges of one for one, the best ones, many in a round if they pay together, until none
    improves or `swap_rounds` is spent (`solver/swap.py`). Its damping of 0.01 times the mean energy is the run's ridge
    here, and its float64 is float32.

    Args:
        system: The layer, f channels.
        keep: How many channels to keep, k; static.

    Returns:
        [k] int32 channel numbers, ascending.
    """
    count = system.gram.shape[0] - keep
    size = max(1, math.ceil(count / BATCHES))

    def remove_batch(step: Array, tableau: Tableau) -> Tableau:
        _, batch = lax.top_k(-removal_costs(tableau), size)
        return pivot(tableau, batch, step * size + jnp.arange(size) < count, 0.0)

    return _kept(lax.fori_loop(0, math.ceil(count / size), remove_batch, dense_tableau(system)), keep)


def highest(scores: Array, keep: int) -> Array:
    """The channels with the highest scores; among equals the first.

    Args:
        scores: [f] larger is more important.
        keep: How many to keep, k; static.

    Returns:
        [k] int32 channel numbers, ascending.
    """
    return jnp.sort(lax.top_k(scores, keep)[1]).astype(jnp.int32)


def _kept(tableau: Tableau, keep: int) -> Array:
    return jnp.flatnonzero(~tableau.removed, size=keep).astype(jnp.int32)
