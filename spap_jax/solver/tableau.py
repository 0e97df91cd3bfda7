"""The tableau of a linear system: solved for a split of its channels, and updated in place as channels change sides.

Everything is matrix products on panels of channels in loops, so that programs are small and the tableau is the only
[f,f] array that they write. Its rows may be divided among all devices of a mesh: a pivot exchanges only the rows of its
panel.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from spap_jax import backend
from spap_jax.parallel import mesh

PANEL = 256
"""Channels that change sides together when a system is solved: enough to keep matrix units busy."""


class Tableau(NamedTuple):
    """A system G V = C solved for a split into kept channels S and penalised channels E, ready to be updated.

    With A = (G + q diag(E))^-1, q the penalty, and V = A C, it stores the parts of A and V in a form that stays finite
    as q grows and needs no subtraction to score a channel: the regularised form of the sweep operator (Goodnight,
    "A tutorial on the SWEEP operator", 1979). Brackets show the limit of an infinite penalty.

    Attributes:
        matrix: [f,f] symmetric; SS: A [G_SS^-1]; SE: q A [-G_SS^-1 G_SE]; EE: q^2 A - q I [minus the Schur complement
            of G_SS].
        rows: [f,d] S: V, the refitted projection; E: q V [the residual's correlation with the penalised channels].
        removed: [f] true for the channels of E.
    """

    matrix: Array
    rows: Array
    removed: Array


def solved(gram: Array, cross: Array, kept: Array) -> tuple[Tableau, Array]:
    """Solves a system for its kept channels, at an infinite penalty on the others: Gauss-Jordan elimination in panels.

    It needs 2 f (f + d) k operations, and no pivoting, since gram [f,f] is positive definite. cross: [f,d], kept: [k].

    Returns:
        The tableau, and the smallest pivot [], which is not positive or NaN if rounding leaves the system indefinite.
    """
    f, k = gram.shape[0], kept.shape[0]
    b = min(PANEL, k)
    panels = -(-k // b)
    kept = jnp.concatenate([kept, jnp.full(panels * b - k, f, kept.dtype)])

    def add(panel: Array, state: tuple[Tableau, Array]) -> tuple[Tableau, Array]:
        tableau, least = state
        block = lax.dynamic_slice(kept, (panel * b,), (b,))
        tableau, pivots = _pivot(tableau, jnp.minimum(block, f - 1), block < f, 0.0)
        return tableau, jnp.minimum(least, jnp.min(jnp.where(block < f, -pivots, jnp.inf)))

    nothing = Tableau(mesh.shard_rows(-gram), mesh.shard_rows(cross), jnp.ones(f, bool))
    return lax.fori_loop(0, panels, add, (nothing, jnp.array(jnp.inf, gram.dtype)))


def pivot(tableau: Tableau, block: Array, active: Array, slack: float | Array) -> Tableau:
    """Moves a block of channels to the other side: kept ones become penalised, penalised ones return.

    This is a Woodbury update of A: one [b,b] inverse and 2 f^2 b + 2 f d b operations, regardless of earlier updates.

    Args:
        block: [b] distinct channel numbers.
        active: [b] mask of the channels to move.
        slack: 1 / penalty; 0 removes channels entirely.
    """
    return _pivot(tableau, block, active, slack)[0]


def _pivot(tableau: Tableau, block: Array, active: Array, slack: float | Array) -> tuple[Tableau, Array]:
    """Returns the tableau of ``pivot`` and the pivots [b] of the block's elimination; inactive channels may repeat."""
    matrix, rows, removed = tableau
    f, b = matrix.shape[0], block.shape[0]
    returning = removed[block]
    sign = jnp.where(returning, -1.0, 1.0).astype(matrix.dtype)
    eye = jnp.eye(b, dtype=matrix.dtype)
    panel = jnp.where(active[:, None], matrix[block], 0)
    corner = jnp.where(active[None, :], panel.T[block].T + jnp.where(returning, 0, slack)[:, None] * eye, 0)
    corner = jnp.where(active[:, None], corner, eye)
    right = jnp.concatenate([panel, jnp.where(active[:, None], rows[block], 0)], axis=1)
    inverse, pivots = inverted(corner)
    solution = inverse @ right
    # Corrected once, so that the residual is as small as a factorisation's, even if the corner is nearly singular.
    solution = solution + inverse @ (right - corner @ solution)
    across, projected = jnp.split(solution, [f], axis=1)

    where = jnp.where(active, block, f)  # f is out of range: dropped
    swept = sign[:, None] * across
    swept_corner = -sign[:, None] * sign[None, :] * inverse - jnp.where(returning, slack, 0)[:, None] * eye
    swept = swept.T.at[where].set(swept_corner, mode="drop").T
    matrix = mesh.shard_rows(_updated(matrix, panel, across, swept, where))
    rows = mesh.shard_rows(rows - panel.T @ projected).at[where].set(sign[:, None] * projected, mode="drop")
    return Tableau(matrix, mesh.shard_rows(rows), removed.at[where].set(~returning, mode="drop")), pivots


def _updated(matrix: Array, panel: Array, across: Array, swept: Array, where: Array) -> Array:
    """Computes ``matrix - panel' @ across``, with the rows and columns ``where`` [b] replaced by ``swept`` [b,f]."""
    if backend.platform() == "cpu":
        matrix = matrix - panel.T @ across
        return matrix.at[where, :].set(swept, mode="drop").at[:, where].set(swept.T, mode="drop")
    # Accelerators copy a matrix to scatter columns: the product writes them, and ones choose their places.
    f = matrix.shape[0]
    ones = (where[:, None] == jnp.arange(f)[None, :]).astype(matrix.dtype)
    inside = jnp.zeros(f, bool).at[where].set(True, mode="drop")[None, :]
    left, right = jnp.concatenate([panel, -swept]), jnp.concatenate([jnp.where(inside, 0, across), ones])
    return (jnp.where(inside, 0, matrix) - left.T @ right).at[where, :].set(swept, mode="drop")


def inverted(matrix: Array) -> tuple[Array, Array]:
    """Inverts a symmetric, quasi-definite matrix [b,b] by sweeps -> the inverse, and the pivots [b] of its LDL'
    factorisation.

    Such a matrix, as every block of a tableau, is positive definite for its kept channels and negative definite for the
    others, and needs no pivoting (Vanderbei, "Symmetric quasidefinite matrices", 1995).
    """
    number = jnp.arange(matrix.shape[0])

    def sweep(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, pivots = state
        row = matrix[j]
        ratio = jnp.where(number == j, -1, row) / row[j]
        own = (number == j)[:, None] | (number == j)[None, :]
        matrix = jnp.where(own, jnp.where((number == j)[:, None], ratio[None, :], ratio[:, None]),
                           matrix - row[:, None] * ratio[None, :])  # fmt: skip
        return _whole(matrix), pivots.at[j].set(row[j])

    swept, pivots = lax.fori_loop(0, matrix.shape[0], sweep, (_whole(matrix), jnp.zeros(matrix.shape[0], matrix.dtype)))
    return -swept, pivots


def _whole(matrix: Array) -> Array:
    """Replicates a small matrix over a mesh, as it would otherwise be gathered in every iteration of a sweep."""
    return mesh.constrain_replicated(matrix) if mesh.row_axes(0) else matrix
