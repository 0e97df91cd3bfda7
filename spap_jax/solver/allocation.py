"""Allocation of layer widths within a total budget: each layer's loss at every width, and the optimal choice."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from spap_jax.numerics import full_precision
from spap_jax.solver.penalty import cheapest_block
from spap_jax.solver.problem import System
from spap_jax.solver.tableau import Tableau, pivot

_STEPS = 40
"""Number of block steps in which a layer's elimination goes from all channels to the smallest width."""


@full_precision
def path(system: System, widths: tuple[int, ...]) -> Array:
    """Removes channels one at a time, cheapest first, and records the refitted output projection at every width.

    The projection is a by-product of the exact updates of the tableau, so no width needs a factorisation.

    Args:
        widths: W channel counts, descending, each below f; static.

    Returns:
        [W, f, d] in the original scale, zero for removed channels.
    """
    f = system.gram.shape[0]
    size = math.ceil((f - widths[-1]) / _STEPS)

    def narrow(tableau: Tableau, count: Array) -> tuple[Tableau, Array]:
        def step(number: Array, tableau: Tableau) -> Tableau:
            block, _ = cheapest_block(tableau, size, 0.0)
            return pivot(tableau, block, number * size + jnp.arange(size) < count, 0.0)

        tableau = lax.fori_loop(0, -(-count // size), step, tableau)
        return tableau, jnp.where(tableau.removed[:, None], 0, system.scale[:, None] * tableau.rows)

    return lax.scan(narrow, system.dense, -jnp.diff(jnp.array((f, *widths))))[1]


def allocate(losses: np.ndarray, total: int) -> np.ndarray:
    """Chooses a column for each layer with the least total loss, exactly, by dynamic programming.

    Args:
        losses: [L, W] loss of each layer with each choice; infinite for choices that a layer does not have.
        total: Upper bound on the sum of the column indices; at least 0.

    Returns:
        [L] column indices.
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
