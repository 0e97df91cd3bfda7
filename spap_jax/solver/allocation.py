"""Widths for all layers within one budget: what each layer loses at every width, and the cheapest choice."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from spap_jax.numerics import full_precision
from spap_jax.solver.penalty import cheapest_block
from spap_jax.solver.problem import System, Tableau, dense_tableau, pivot

_STEPS = 40
"""Blocks in which a layer's elimination goes from all channels to the fewest."""


@full_precision
def path(system: System, widths: tuple[int, ...]) -> Array:
    """Removes channels one at a time, the cheapest first, and stops at every width to solve for those left.

    Of the tableau's updates, which are exact, the output projection is a by-product: no width costs a factorisation.

    Args:
        system: The layer, f channels.
        widths: Numbers of channels, W of them, descending, each below f; static.

    Returns:
        [W, f, d] the output projection in the original scale, zero for the channels that are gone.
    """
    f = system.gram.shape[0]
    size = math.ceil((f - widths[-1]) / _STEPS)

    def narrow(tableau: Tableau, count: Array) -> tuple[Tableau, Array]:
        def step(number: Array, tableau: Tableau) -> Tableau:
            block, _ = cheapest_block(tableau, size, 0.0)
            return pivot(tableau, block, number * size + jnp.arange(size) < count, 0.0)

        tableau = lax.fori_loop(0, -(-count // size), step, tableau)
        return tableau, jnp.where(tableau.removed[:, None], 0, system.scale[:, None] * tableau.rows)

    return lax.scan(narrow, dense_tableau(system), -jnp.diff(jnp.array((f, *widths))))[1]


def allocate(losses: np.ndarray, total: int) -> np.ndarray:
    """The choice of a column for each layer with the least summed losses, and numbers of at most ``total`` in sum.

    Exact: dynamic programming over the layers and the sum so far.

    Args:
        losses: [L, W] what each layer loses with each choice; infinite where it has not got it.
        total: Most that the numbers of the columns may add up to; at least 0.

    Returns:
        [L] numbers of columns.
    """
    least, choices = np.zeros(total + 1), []
    for row in losses:
        options = np.full((len(row), total + 1), np.inf)
        for column, loss in enumerate(row[: total + 1]):
            options[column, column:] = loss + least[: total + 1 - column]
        choices.append(options.argmin(axis=0))
        least = options.min(axis=0)
    spent, chosen = total, []
    for choice in reversed(choices):
        chosen.append(int(choice[spent]))
        spent -= chosen[-1]
    return np.array(chosen[::-1])
