"""Selection of channel groups that are removed together: greedy elimination, then a polish by exact swaps of groups.

A group is a key/value head with the query heads that read it; its channels are these heads' outputs. One group is
removed per step, in the limit of an infinite penalty. With A = G_SS^-1 and V = A C_S of the groups kept, S, removing
group g costs exactly ``trace(V_g' (A_gg)^-1 V_g)``, the block form of the score of OBS (Hassibi and Stork 1993). Swaps
of a kept for a removed group then revise early choices.
"""

import jax.numpy as jnp
from jax import Array, lax

from spap_jax.numerics import full_precision
from spap_jax.solver.problem import System
from spap_jax.solver.swap import TOLERANCE, Polished, block_gain, explained_by
from spap_jax.solver.tableau import Tableau, pivot, solved


def channels_of(chosen: Array, size: int) -> Array:
    """Returns the channel numbers, [g size], of groups [g]: group i has those from i size to i size + size - 1."""
    return (chosen[:, None] * size + jnp.arange(size)[None, :]).reshape(-1)


@full_precision
def eliminate(system: System, groups: int, keep: int) -> Array:
    """Removes the group with the least removal cost, one at a time, until ``keep`` groups are left.

    The system's f channels are in ``groups`` groups of equal size; both numbers are static.

    Returns:
        [keep] int32 group numbers, ascending.
    """

    def remove_cheapest(_, tableau: Tableau) -> Tableau:
        return _moved(tableau, jnp.argmin(removal_costs(tableau, groups))[None], groups)

    last = lax.fori_loop(0, groups - keep, remove_cheapest, system.dense)
    return _numbers(~_gone(last, groups), keep)


def removal_costs(tableau: Tableau, groups: int) -> Array:
    """Computes twice the rise of the objective when a kept group is removed, [m]; infinite for removed groups."""
    costs = lax.map(lambda group: -_gain(tableau, group[None], groups), jnp.arange(groups))
    return jnp.where(_gone(tableau, groups), jnp.inf, costs)


@full_precision
def polish(system: System, groups: int, kept: Array, rounds: int) -> Polished:
    """Makes the best swap of a kept for a removed group until none improves or all rounds are used.

    Args:
        kept: [k] distinct group numbers, k < groups.
        rounds: 0 only counts the improving swaps. Static, like ``groups``.
    """
    k = kept.shape[0]
    start, _ = solved(system.gram, system.cross, channels_of(kept, system.scale.size // groups))
    threshold = TOLERANCE * explained_by(start, system.cross)

    def turn(state: tuple[Tableau, Array, Array, Array]) -> tuple[Tableau, Array, Array, Array]:
        tableau, swaps, _, _ = state
        gone = _gone(tableau, groups)
        pairs = jnp.stack(jnp.meshgrid(_numbers(~gone, k), _numbers(gone, groups - k)), axis=-1).reshape(-1, 2)
        gains = lax.map(lambda pair: _gain(tableau, pair, groups), pairs)
        best = jnp.argmax(gains)
        moves = (gains[best] > threshold) & (swaps < rounds)
        tableau = _moved(tableau, pairs[best], groups, moves)
        return tableau, swaps + moves, jnp.sum(gains > threshold, dtype=jnp.int32), moves

    zero = jnp.int32(0)
    last, swaps, improving, _ = lax.while_loop(lambda state: state[-1], turn, (start, zero, zero, jnp.bool_(True)))
    return Polished(_numbers(~_gone(last, groups), k), swaps, improving)


def _moved(tableau: Tableau, chosen: Array, groups: int, active: Array | bool = True) -> Tableau:
    """Moves groups [g] between kept and removed, at an infinite penalty."""
    block = channels_of(chosen, tableau.removed.size // groups)
    return pivot(tableau, block, jnp.full(block.shape, active), 0.0)


def _gain(tableau: Tableau, chosen: Array, groups: int) -> Array:
    """Computes twice the fall of the objective, [], when groups [g] change sides together."""
    block = channels_of(chosen, tableau.removed.size // groups)
    return block_gain(tableau, block, jnp.ones(block.shape, bool))


def _gone(tableau: Tableau, groups: int) -> Array:
    """Returns which groups are removed, [m]."""
    return tableau.removed.reshape(groups, -1)[:, 0]


def _numbers(which: Array, count: int) -> Array:
    """Returns the numbers of the groups for which `which` [m] is true, [count] int32, ascending."""
    return jnp.flatnonzero(which, size=count).astype(jnp.int32)
