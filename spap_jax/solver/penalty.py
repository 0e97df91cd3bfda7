"""Channel selection: a penalty method with a growing number of removed channels, scored by marginal costs.

The constraint "a removed channel has no weights" becomes a large penalty on these weights. The number of penalised
channels grows from none to f - k in a few steps; the system is updated, never refactorised. Scores are marginal: the
cost of removing channel j with its own penalty lifted, |V_j|^2 / A_jj for a kept channel, which makes kept and
penalised channels comparable (at an infinite penalty: OBS, Hassibi and Stork 1993). A plain score, |V_j|^2 G_jj, would
never revise its first choice: a penalised channel's weights are small.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from spap_jax.numerics import full_precision
from spap_jax.solver.checks import check_positive, check_whole, or_none
from spap_jax.solver.problem import System, is_finite
from spap_jax.solver.tableau import Tableau, pivot

POOL = 4  # candidates per step for every channel that may be removed
_LEAST_POOL = 64
RETURNS = 0.25  # channels that may return per step, for every channel that is removed
_MARGIN = 1e-3  # a return must gain more than it costs by this fraction, to ignore float32 noise


class _State(NamedTuple):
    """Tableau, and returned: [f] channels that have returned once and may not return again, to prevent cycles."""

    tableau: Tableau
    returned: Array


@full_precision
def select(system: System, keep: int, penalty: float | Array = 100.0, steps: int = 40) -> Array:
    """Chooses the channels to keep.

    Args:
        keep: At least 1; static.
        penalty: Weight of the penalty on a removed channel, relative to its energy.
        steps: Number of steps in which the count of penalised channels grows to f - k, at least 1; static.

    Returns:
        [k] int32 channel numbers, ascending; all -1 if the system is not finite.

    Raises:
        UserError: ``keep`` or ``steps`` is out of range, or the penalty or the system is concrete and unusable.
    """
    f = system.gram.shape[0]
    keep, steps = check_whole("keep", keep, 1, f), check_whole("steps", steps, 1)
    check_positive("penalty", penalty)
    penalty = jnp.asarray(penalty, system.gram.dtype)
    count, sound = f - keep, is_finite(system)
    if count == 0:
        return or_none(jnp.arange(f, dtype=jnp.int32), sound)
    b = math.ceil(count / steps)
    guests = min(math.ceil(RETURNS * b), keep)

    def step(state: _State, target: Array) -> tuple[_State, None]:
        return _step(state, target, b, guests, 1 / penalty), None

    targets = jnp.minimum(b * jnp.arange(1, math.ceil(count / b) + 1), count)
    last, _ = lax.scan(step, _State(system.dense, jnp.zeros(f, bool)), targets)
    return or_none(jnp.flatnonzero(~last.tableau.removed, size=keep).astype(jnp.int32), sound)


def removal_costs(tableau: Tableau) -> Array:
    """Computes twice the rise of the objective when a kept channel is removed, [f]; infinite if already penalised."""
    costs = jnp.sum(tableau.rows**2, axis=1) / jnp.diagonal(tableau.matrix)
    return jnp.where(tableau.removed, jnp.inf, costs)


def return_gains(tableau: Tableau, slack: float | Array) -> Array:
    """Computes twice the fall of the objective when a penalised channel returns, [f]; minus infinity for kept ones.

    With a = A_jj, V_j the penalised values, q the penalty and ``slack`` = 1 / q, lifting the penalty of j gives a_free
    = a / (1 - q a) and V_free = V_j a_free / a; the gain is |V_free|^2 / a_free. The tableau stores q V_j and q - q^2
    a, so 1 - q a, which would suffer complete cancellation in float32, is never formed.
    """
    stiffness = -jnp.diagonal(tableau.matrix)
    gains = jnp.sum(tableau.rows**2, axis=1) / (stiffness * (1 - stiffness * slack))
    return jnp.where(tableau.removed, gains, -jnp.inf)


def _step(state: _State, target: Array, b: int, guests: int, slack: float | Array) -> _State:
    """Penalises up to b more channels, to a total of `target`; up to `guests` may return in exchange for others."""
    tableau, returned = state
    due = target - jnp.sum(tableau.removed)
    leaving, prices = cheapest_block(tableau, b + guests, slack)
    gains, coming = lax.top_k(jnp.where(returned, -jnp.inf, return_gains(tableau, slack)), guests)
    # The i-th return requires one more removal than was due, and is accepted only if it gains more than that costs.
    better = gains > (1 + _MARGIN) * prices[due + jnp.arange(guests)]
    welcome = jnp.cumprod(better).astype(bool)
    leaves = jnp.arange(b + guests) < due + jnp.sum(welcome)
    tableau = pivot(tableau, jnp.concatenate([leaving, coming]), jnp.concatenate([leaves, welcome]), slack)
    return _State(tableau, returned.at[coming].max(welcome))


def cheapest_block(tableau: Tableau, b: int, slack: float | Array) -> tuple[Array, Array]:
    """Chooses the next b channels to penalise by one-at-a-time elimination within a pool of the cheapest.

    If two channels carry the same signal, removing either is cheap but removing both is expensive, so each choice must
    take the previous ones into account. The [p,p] part of the system that belongs to the pool suffices for that.

    Returns:
        [b] channel numbers in the order of choice, [b] their costs when chosen.
    """
    f = tableau.removed.shape[0]
    negated, pool = lax.top_k(-removal_costs(tableau), min(f, max(POOL * b, _LEAST_POOL)))
    rows = tableau.rows[pool]

    def choose(state: tuple[Array, Array, Array], _) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        inverse, power, open_ = state
        costs = jnp.where(open_, jnp.diagonal(power) / jnp.diagonal(inverse), jnp.inf)
        j = jnp.argmin(costs)
        ratio = inverse[:, j] / (inverse[j, j] + slack)
        mixed = jnp.outer(ratio, power[j])
        power = power - mixed - mixed.T + power[j, j] * jnp.outer(ratio, ratio)
        inverse = inverse - jnp.outer(ratio, inverse[j])
        return (inverse, power, open_.at[j].set(False)), (j, costs[j])

    state = (tableau.matrix[pool].T[pool].T, rows @ rows.T, jnp.isfinite(negated))
    _, (order, prices) = lax.scan(choose, state, length=b)
    return pool[order], prices
