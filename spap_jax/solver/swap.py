"""Polish: exact swaps of one kept for one removed channel, and a certificate that no improving swap is left.

With S kept, A = G_SS^-1, V = A C_S, B = A G_SO, R = C_O - G_OS V and c_j = G_jj - G_jS B_j, swapping i out and j in
changes the doubled objective by

    gain_ij = |R_j + t V_i|^2 / (c_j + B_ij^2 / A_ii) - |V_i|^2 / A_ii ,    t = B_ij / A_ii ,

for all pairs from matrix products, some removed channels at a time. A round pairs the most promising channels of both
sides, and applies them only if they lower the objective as a block; the gain of a block has a closed form too, and is
not the difference of two large numbers. (Swaps after a greedy elimination: OSSCAR, Meng et al. 2024.)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from spap_jax.numerics import full_precision
from spap_jax.solver.checks import check_channels, check_whole, or_none
from spap_jax.solver.problem import System, is_finite, smallest_pivot
from spap_jax.solver.tableau import Tableau, inverted, pivot, solved

TOLERANCE = 1e-6  # of the explained power: a smaller gain is within the rounding of the moments themselves
BLOCK = 16  # at most one swap per round for this many channels on the smaller side
POOL = 4  # channels of either side, the most promising ones, that are paired for every swap of a round
_LEAST_POOL = 64
_ROWS = 1024  # removed channels whose gains are computed at once


class Polished(NamedTuple):
    """A selection after polishing.

    Attributes:
        kept: [k] int32 channel numbers, ascending; all -1 if the system is not finite.
        swaps: [] int32 swaps made.
        improving: [] int32 remaining swaps that would lower the objective; 0 certifies a local optimum, -1 a failure.
    """

    kept: Array
    swaps: Array
    improving: Array


class _State(NamedTuple):
    """Tableau of the current selection, the counts, and whether the last round swapped."""

    tableau: Tableau
    swaps: Array
    improving: Array
    rounds: Array
    moved: Array


@full_precision
def polish(system: System, kept: Array, rounds: int) -> Polished:
    """Applies improving swaps, many disjoint ones per round, until none is left or all rounds are used.

    Args:
        kept: [k] distinct channel numbers.
        rounds: 0 only counts the improving swaps. Static.

    Raises:
        UserError: ``kept`` are not distinct, ``rounds`` is negative, or the system is concrete and not finite.
    """
    f = system.gram.shape[0]
    check_channels(kept, f)
    k = kept.shape[0]
    rounds = check_whole("rounds", rounds, 0)
    zero, sound = jnp.int32(0), is_finite(system)
    if k == f:
        return Polished(or_none(jnp.arange(f, dtype=jnp.int32), sound), zero, jnp.where(sound, zero, -1))
    # From the system, not from the selection's last tableau: many updates have rounded that.
    tableau, _ = solved(system.gram, system.cross, kept)
    threshold = TOLERANCE * explained_by(tableau, system.cross)
    floor = smallest_pivot(system.ridge)

    def turn(state: _State) -> _State:
        """Counts the improving swaps and applies some if a round is left; once none was applied, nothing changes."""
        best = best_gains(state.tableau, f - k, floor, threshold)
        block, gains = _disjoint_pairs(state.tableau, best, min(k, f - k), floor)
        return _swap(state._replace(improving=best.improving), block, gains, threshold, state.rounds < rounds)

    first = _State(tableau, zero, zero, zero, jnp.bool_(True))
    if rounds:
        last = lax.while_loop(lambda state: state.moved, turn, first)
    else:  # most methods only count: their programs need not know how to swap
        last = first._replace(improving=best_gains(tableau, f - k, floor, threshold).improving)
    final = jnp.flatnonzero(~last.tableau.removed, size=k).astype(jnp.int32)
    return Polished(or_none(final, sound), last.swaps, jnp.where(sound, last.improving, -1))


def explained_by(tableau: Tableau, cross: Array) -> Array:
    """Computes the explained power <C_S, V_S>, [], of a tableau at an infinite penalty. cross: [f,d]."""
    return jnp.sum(jnp.where(tableau.removed[:, None], 0, tableau.rows * cross))


class Best(NamedTuple):
    """The best gain of a swap of each channel.

    Attributes:
        kept: [f] the best gain of a swap that removes the channel; minus infinity for removed channels.
        removed: [f] the best gain of a swap that returns the channel; minus infinity for kept channels.
        improving: [] int32 number of swaps whose gain is above the threshold.
    """

    kept: Array
    removed: Array
    improving: Array


def best_gains(tableau: Tableau, count: int, floor: Array, threshold: Array) -> Best:
    """Computes the gains of all swaps, in blocks of removed channels, so that no array of all pairs is stored.

    Args:
        threshold: Gain from which a swap is improving.
    """
    f = tableau.removed.size
    size = min(_ROWS, count)
    blocks = -(-count // size)
    numbers = jnp.flatnonzero(tableau.removed, size=blocks * size, fill_value=f).reshape(blocks, size)
    diagonal = jnp.diagonal(tableau.matrix)

    def add(best: Best, block: Array) -> tuple[Best, None]:
        channels = jnp.minimum(block, f - 1)
        gains = _gains(tableau, diagonal, channels, tableau.matrix[channels], slice(None), floor)
        gains = jnp.where((block < f)[:, None] & ~tableau.removed[None, :], gains, -jnp.inf)
        kept = jnp.maximum(best.kept, gains.max(axis=0))
        removed = best.removed.at[block].set(gains.max(axis=1), mode="drop")
        return Best(kept, removed, best.improving + jnp.sum(gains > threshold, dtype=jnp.int32)), None

    none = jnp.full(f, -jnp.inf, diagonal.dtype)
    return lax.scan(add, Best(none, none, jnp.int32(0)), numbers)[0]


def swap_gains(tableau: Tableau, kept: Array, removed: Array, floor: float | Array) -> Array:
    """Computes twice the fall of the objective, [r,k], for swaps of kept [k] for removed [r] channels at an infinite
    penalty.

    ``floor`` is a lower bound of a Schur complement.
    """
    negated = tableau.matrix[removed].T[kept].T
    return _gains(tableau, jnp.diagonal(tableau.matrix), removed, negated, kept, floor)


def _gains(
    tableau: Tableau, diagonal: Array, removed: Array, negated: Array, kept: Array | slice, floor: float | Array
) -> Array:
    """Computes ``swap_gains`` from the matrix's diagonal [f] and its entries [r,k], which are -B'."""
    weights, residuals = tableau.rows[kept], tableau.rows[removed]
    pivots = diagonal[kept][None, :]
    power = jnp.sum(weights**2, axis=1)[None, :]
    t = -negated / pivots
    freed = jnp.sum(residuals**2, axis=1)[:, None] + 2 * t * (residuals @ weights.T) + t**2 * power
    schur = jnp.maximum(-diagonal[removed], floor)[:, None]
    return freed / (schur - negated * t) - power / pivots


def _disjoint_pairs(tableau: Tableau, best: Best, fewer: int, floor: Array) -> tuple[Array, Array]:
    """Returns a round's disjoint swaps, best first: [2 s] leaving and then coming channels, and their gains [s]."""
    most = max(1, fewer // BLOCK)
    pool = min(fewer, max(POOL * most, _LEAST_POOL))
    removed, kept = (lax.top_k(gains, pool)[1] for gains in (best.removed, best.kept))

    def take(left: Array, _) -> tuple[Array, tuple[Array, Array, Array]]:
        i, j = jnp.divmod(jnp.argmax(left), pool)
        return left.at[i, :].set(-jnp.inf).at[:, j].set(-jnp.inf), (kept[j], removed[i], left[i, j])

    leaving, coming, gains = lax.scan(take, swap_gains(tableau, kept, removed, floor), length=most)[1]
    return jnp.concatenate([leaving, coming]), gains


def _swap(state: _State, block: Array, gains: Array, threshold: Array, allowed: Array) -> _State:
    """Applies disjoint swaps: as many as possible, halved until they lower the objective as a block."""

    def active(size: Array) -> Array:
        return jnp.tile(jnp.arange(gains.size) < size, 2)

    def pays(size: Array) -> Array:
        return block_gain(state.tableau, block, active(size)) > threshold

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        size, paying = state
        size = jnp.where(paying, size, size // 2)
        return size, pays(size)

    def tried(state: tuple[Array, Array]) -> Array:
        size, paying = state
        return (size > 0) & ~paying

    start = jnp.where(allowed, jnp.sum(gains > threshold, dtype=jnp.int32), 0)
    size, _ = lax.while_loop(tried, halve, (start, pays(start)))
    return state._replace(
        tableau=pivot(state.tableau, block, active(size), 0.0),
        swaps=state.swaps + size,
        rounds=state.rounds + 1,
        moved=size > 0,
    )


def block_gain(tableau: Tableau, block: Array, active: Array) -> Array:
    """Computes twice the fall of the objective, [], when the active [b] channels of a block [b] change sides together.

    The tableau is at an infinite penalty.
    """
    both = active[:, None] & active[None, :]
    eye = jnp.eye(block.size, dtype=tableau.matrix.dtype)
    inverse, _ = inverted(jnp.where(both, tableau.matrix[block].T[block].T, eye))
    rows = tableau.rows[block] * active[:, None]
    return -jnp.sum(rows * (inverse @ rows))
