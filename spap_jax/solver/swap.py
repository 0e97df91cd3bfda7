"""Polish: exact swaps of one kept for one removed channel, and a certificate that no improving swap is left.

With S kept, A = G_SS^-1, V = A C_S, B = A G_SO, R = C_O - G_OS V and c_j = G_jj - G_jS B_j, swapping i out and j in
changes the doubled objective by

    gain_ij = |R_j + t V_i|^2 / (c_j + B_ij^2 / A_ii) - |V_i|^2 / A_ii ,    t = B_ij / A_ii ,

for all pairs at once from a few matrix products. A block of swaps has a closed form too, so a block is applied only if
it lowers the objective as a block, and its gain is computed directly, not as the difference of two large numbers.
(Swaps after a greedy elimination: OSSCAR, Meng et al. 2024.)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_solve

from spap_jax.numerics import full_precision
from spap_jax.solver.checks import check_channels, check_whole, or_none
from spap_jax.solver.problem import System, Tableau, is_finite, pivot, smallest_pivot

TOLERANCE = 1e-6  # of the explained power: a smaller gain is within the rounding of the moments themselves
BLOCK = 16  # at most one swap per round for this many channels on the smaller side


class Polished(NamedTuple):
    """A selection after polishing.

    Attributes:
        kept: [k] int32 channel numbers, ascending; all -1 if the system is not finite.
        swaps: [] int32 swaps made.
        improving: [] int32 remaining swaps that would lower the objective; 0 certifies a local optimum, and -1 means
            that the system is not finite.
    """

    kept: Array
    swaps: Array
    improving: Array


class _State(NamedTuple):
    """Tableau of the current selection, kept: [k], removed: [f-k], the counts, and whether the last round swapped."""

    tableau: Tableau
    kept: Array
    removed: Array
    swaps: Array
    improving: Array
    rounds: Array
    moved: Array


@full_precision
def polish(system: System, kept: Array, rounds: int) -> Polished:
    """Applies improving swaps, many disjoint ones per round, until none is left or all rounds are used.

    Args:
        system: The layer, f channels.
        kept: [k] distinct channel numbers.
        rounds: Maximum number of rounds; 0 only counts the improving swaps. Static.

    Raises:
        UserError: ``kept`` are not distinct channel numbers, ``rounds`` is negative, or the system is concrete and not
            finite.
    """
    f = system.gram.shape[0]
    check_channels(kept, f)
    k = kept.shape[0]
    rounds = check_whole("rounds", rounds, 0)
    zero, sound = jnp.int32(0), is_finite(system)
    if k == f:
        return Polished(or_none(jnp.arange(f, dtype=jnp.int32), sound), zero, jnp.where(sound, zero, -1))
    absent = jnp.ones(f, bool).at[kept].set(False)
    removed = jnp.flatnonzero(absent, size=f - k).astype(jnp.int32)
    tableau, explained = _tableau(system, kept, removed)
    threshold = TOLERANCE * explained
    floor = smallest_pivot(system)

    def turn(state: _State) -> _State:
        """Counts the improving swaps, and applies some if a round is left."""
        gains = swap_gains(state.tableau, state.kept, state.removed, floor)
        state = state._replace(improving=jnp.sum(gains > threshold, dtype=jnp.int32))
        return _swap(state, gains, threshold, state.rounds < rounds)

    first = _State(tableau, kept.astype(jnp.int32), removed, zero, zero, zero, jnp.bool_(True))
    last = lax.while_loop(lambda state: state.moved, turn, first)
    return Polished(or_none(jnp.sort(last.kept), sound), last.swaps, jnp.where(sound, last.improving, -1))


def swap_gains(tableau: Tableau, kept: Array, removed: Array, floor: float | Array) -> Array:
    """Computes twice the fall of the objective for every swap of a kept for a removed channel.

    Args:
        tableau: The system at an infinite penalty.
        kept: [k] channel numbers.
        removed: [f-k] the other channel numbers.
        floor: Lower bound of a Schur complement.

    Returns:
        [k,f-k] gains.
    """
    matrix, rows, _ = tableau
    diagonal = jnp.diagonal(matrix)
    weights, residuals = rows[kept], rows[removed]
    pivots = diagonal[kept][:, None]
    power = jnp.sum(weights**2, axis=1)[:, None]
    across = -matrix[kept[:, None], removed[None, :]]  # B
    t = across / pivots
    freed = jnp.sum(residuals**2, axis=1)[None, :] + 2 * t * (weights @ residuals.T) + t**2 * power
    schur = jnp.maximum(-diagonal[removed], floor)[None, :]
    return freed / (schur + across * t) - power / pivots


def _tableau(system: System, kept: Array, removed: Array) -> tuple[Tableau, Array]:
    """Builds the tableau of a selection at an infinite penalty, and the explained power <C_S, V_S>, []."""
    gram, cross = system.gram, system.cross
    k = kept.shape[0]
    side = gram[kept[:, None], removed[None, :]]
    factor = jnp.linalg.cholesky(gram[kept[:, None], kept[None, :]])
    # Solve instead of multiplying by the inverse: on a nearly singular system only a solve has a small residual.
    right = jnp.concatenate([jnp.eye(k, dtype=gram.dtype), side, cross[kept]], axis=1)
    inverse, across, weights = jnp.split(cho_solve((factor, True), right), [k, gram.shape[0]], axis=1)
    order = jnp.argsort(jnp.concatenate([kept, removed]))
    schur = gram[removed[:, None], removed[None, :]] - side.T @ across
    matrix = jnp.block([[inverse, -across], [-across.T, -schur]])[order[:, None], order[None, :]]
    rows = jnp.concatenate([weights, cross[removed] - side.T @ weights])[order]
    return Tableau(matrix, rows, jnp.ones(order.shape, bool).at[kept].set(False)), jnp.sum(weights * cross[kept])


def _swap(state: _State, gains: Array, threshold: Array, allowed: Array) -> _State:
    """Applies the best disjoint swaps: as many as possible, halved until they lower the objective as a block."""
    most = max(1, min(gains.shape) // BLOCK)
    out, into, promised = _disjoint_pairs(gains, most)
    leaving, coming = state.kept[out], state.removed[into]
    block = jnp.concatenate([leaving, coming])

    def active(size: Array) -> Array:
        return jnp.tile(jnp.arange(most) < size, 2)

    def pays(size: Array) -> Array:
        return block_gain(state.tableau, block, active(size)) > threshold

    start = jnp.where(allowed, jnp.sum(promised > threshold, dtype=jnp.int32), 0)
    size = lax.while_loop(lambda size: (size > 0) & ~pays(size), lambda size: size // 2, start)
    chosen = jnp.arange(most) < size
    return state._replace(
        tableau=pivot(state.tableau, block, active(size), 0.0),
        kept=state.kept.at[jnp.where(chosen, out, state.kept.size)].set(coming, mode="drop"),
        removed=state.removed.at[jnp.where(chosen, into, state.removed.size)].set(leaving, mode="drop"),
        swaps=state.swaps + size,
        rounds=state.rounds + 1,
        moved=size > 0,
    )


def block_gain(tableau: Tableau, block: Array, active: Array) -> Array:
    """Computes twice the fall of the objective, [], when all active channels of a block change sides together.

    Args:
        tableau: The system at an infinite penalty.
        block: [b] distinct channel numbers, kept and removed.
        active: [b] mask of the channels that change sides.
    """
    both = active[:, None] & active[None, :]
    eye = jnp.eye(block.size, dtype=tableau.matrix.dtype)
    corner = jnp.where(both, tableau.matrix[block[:, None], block[None, :]], eye)
    rows = tableau.rows[block] * active[:, None]
    return -jnp.sum(rows * jnp.linalg.solve(corner, rows))


def _disjoint_pairs(gains: Array, most: int) -> tuple[Array, Array, Array]:
    """Returns the best disjoint pairs in order of gain: [most] rows, [most] columns, [most] gains."""
    width = gains.shape[1]

    def take(left: Array, _) -> tuple[Array, tuple[Array, Array, Array]]:
        i, j = jnp.divmod(jnp.argmax(left), width)
        best = left[i, j]
        return left.at[i, :].set(-jnp.inf).at[:, j].set(-jnp.inf), (i, j, best)

    return lax.scan(take, gains, length=most)[1]
