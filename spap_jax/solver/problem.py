"""One layer's pruning problem in second moments, and the linear system that its kept channels solve.

The layer's error for kept channels S and output projection V is ``|Y - H_S V|^2 / N``. It depends on second moments
only, so a `Problem` is all that the solver needs. A `System` is the same problem with a small ridge towards the dense
weights, rescaled so that every channel has unit energy: outlier channels, a thousand times larger than their neighbours
in real models, would otherwise exhaust float32 precision.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_solve

from spap_jax.numerics import full_precision, is_concrete
from spap_jax.solver.checks import (
    Status,
    check_channels,
    check_moments,
    check_positive,
    check_shape,
    check_status,
    first_status,
)

_RIDGE_GROWTHS = 8
_ROUNDING = 1e-2
"""Limit of a raised ridge: rounding raises it to at most a tenth of this (2048 channels, excited by two tokens)."""

_ASYMMETRY = 1e-4
"""Tolerated difference of symmetric entries of a Gram matrix, relative to the energies of both channels."""

_TINY = 1e-30  # keeps the inverse square root of the diagonal finite for a layer without any energy


class Problem(NamedTuple):
    """Second moments of one layer, float32; H and Y are centred first if the layer has an output bias.

    Attributes:
        gram: [f,f] H'H / N.
        cross: [f,d] H'Y / N.
        target_power: [] mean of ``|y|^2`` over the tokens.
        weight: [f,d] the dense output projection.
    """

    gram: Array
    cross: Array
    target_power: Array
    weight: Array


class System(NamedTuple):
    """A `Problem` with a ridge towards the dense weights, scaled to a unit diagonal.

    Attributes:
        gram: [f,f] unit diagonal; eigenvalues of at least about ridge / (1 + ridge).
        cross: [f,d] right-hand side; its solution V is in the scaled channels, ``scale * V`` in the original ones.
        scale: [f] factor that gives a channel unit energy.
        ridge: [] the ridge used, relative to each channel's energy; above the requested one if that was too small.
        factor: [f,f] lower Cholesky factor of gram.
    """

    gram: Array
    cross: Array
    scale: Array
    ridge: Array
    factor: Array


@full_precision
def equilibrate(problem: Problem, ridge: float | Array) -> System:
    """Adds the ridge and scales to a unit diagonal; a ridge too small for float32 is increased tenfold until it works.

    The ridge adds ``ridge * sum_j D_j |V_j - W_j|^2`` to the error, where D_j is the energy of channel j: a kept
    channel that the calibration never excites keeps its weights.

    Args:
        problem: The layer, f channels.
        ridge: Pull towards the dense weights, relative to each channel's energy.

    Raises:
        UserError: shapes do not match, the ridge is not positive, or the moments are not valid (see `Status`). Under
            tracing, values are unknown: the system then contains NaN, or has a large ridge.
    """
    check_moments(problem.gram, problem.cross, problem.weight, problem.target_power)
    check_positive("ridge", ridge)
    asked = jnp.asarray(ridge, problem.gram.dtype)

    def grow(state: tuple[Array, System]) -> tuple[Array, System]:
        growths, system = state
        return growths + 1, _ridged(problem, system.ridge * 10)

    def unsound(state: tuple[Array, System]) -> Array:
        growths, system = state
        # In exact arithmetic no pivot is below ridge / (1 + ridge): a much smaller one, or NaN, is rounding noise.
        least = jnp.min(jnp.diagonal(system.factor)) ** 2
        return ~(least > 0.5 * smallest_pivot(system)) & (growths < _RIDGE_GROWTHS)

    system = lax.while_loop(unsound, grow, (jnp.int32(0), _ridged(problem, asked)))[1]
    if is_concrete(system):
        check_status(status_of(problem, system, asked))
    return system


def status_of(problem: Problem, system: System, asked: float | Array) -> Array:
    """Checks whether moments are valid second moments: [] int32, a failure's `Status` or SOLVED.

    Args:
        problem: The layer, f channels.
        system: Its ridged system.
        asked: The requested ridge.
    """
    gram = problem.gram
    size = jnp.sqrt(jnp.abs(jnp.diagonal(gram)))
    return first_status(
        (Status.NOT_FINITE, ~jnp.stack([jnp.isfinite(a).all() for a in problem]).all()),
        (Status.NOT_SYMMETRIC, jnp.any(jnp.abs(gram - gram.T) > _ASYMMETRY * size[:, None] * size[None, :])),
        (Status.NOT_POSITIVE, ~jnp.isfinite(jnp.diagonal(system.factor)).all()),
        (Status.NOT_POSITIVE, (system.ridge > _ROUNDING) & (system.ridge > asked)),
        (Status.NOT_FINITE, ~is_finite(system)),
    )


def is_finite(system: System) -> Array:
    """Returns whether a system can be solved, []; otherwise its factorisation is NaN."""
    return jnp.isfinite(jnp.diagonal(system.factor)).all() & jnp.isfinite(system.cross).all()


def smallest_pivot(system: System) -> Array:
    """Lower bound, [], from the ridge on every eigenvalue, pivot and Schur complement of a live channel."""
    return system.ridge / (1 + system.ridge)


def _ridged(problem: Problem, ridge: Array) -> System:
    diagonal = jnp.diagonal(problem.gram)
    energy = jnp.maximum(jnp.maximum(diagonal, 1e-6 * jnp.mean(diagonal)), _TINY)
    scale = lax.rsqrt(diagonal + ridge * energy)
    gram = problem.gram * scale[:, None] * scale[None, :]
    gram = jnp.fill_diagonal(gram, 1.0, inplace=False)
    cross = (problem.cross + (ridge * energy)[:, None] * problem.weight) * scale[:, None]
    return System(gram, cross, scale, ridge, jnp.linalg.cholesky(gram))


@full_precision
def refit(system: System, kept: Array) -> Array:
    """Solves for the optimal output projection of the kept channels, in the original scale.

    Args:
        system: The layer, f channels.
        kept: [k] channel numbers.

    Returns:
        [k,d] minimiser of the ridged error.

    Raises:
        UserError: ``kept`` are not distinct channel numbers.
    """
    check_channels(kept, system.gram.shape[0])
    return system.scale[kept][:, None] * cho_solve((_factor(system, kept), True), system.cross[kept])


@full_precision
def objective(system: System, kept: Array) -> Array:
    """Computes ``-1/2 <C_S, V_S>`` at the refitted V, []: half the ridged error of the kept channels plus a constant.

    Args:
        system: The layer, f channels.
        kept: [k] channel numbers.

    Raises:
        UserError: ``kept`` are not distinct channel numbers.
    """
    check_channels(kept, system.gram.shape[0])
    half = jax.scipy.linalg.solve_triangular(_factor(system, kept), system.cross[kept], lower=True)
    return -0.5 * jnp.sum(half * half)


@full_precision
def relative_error(problem: Problem, kept: Array, projection: Array) -> Array:
    """Computes ``|Y - H_S V|^2 / |Y|^2``, [], without the ridge.

    Args:
        problem: The layer, f channels.
        kept: [k] channel numbers.
        projection: [k,d] output projection of the kept channels, in the original scale.

    Raises:
        UserError: shapes do not match, or ``kept`` are not distinct channel numbers.
    """
    check_moments(problem.gram, problem.cross, problem.weight, problem.target_power)
    check_channels(kept, problem.gram.shape[0])
    check_shape("projection", projection, (len(kept), problem.cross.shape[1]))
    left = problem.target_power - explained(problem, kept, projection)
    return jnp.maximum(left, 0) / jnp.maximum(problem.target_power, _TINY)


def explained(problem: Problem, kept: Array, projection: Array) -> Array:
    """Computes the target power that the kept channels explain: ``|Y|^2 - |Y - H_S V|^2``, [], means over the tokens.

    Args:
        problem: The layer, f channels; its ``target_power`` is not used.
        kept: [k] channel numbers.
        projection: [k,d] output projection of the kept channels, in the original scale.
    """
    cross = problem.cross[kept]
    residual = cross - problem.gram[kept[:, None], kept[None, :]] @ projection
    # Grouped so that the small term, <V, residual>, does not lose precision next to the large ones.
    return jnp.sum(jnp.sum(projection * cross, axis=1)) + jnp.sum(jnp.sum(projection * residual, axis=1))


def _factor(system: System, kept: Array) -> Array:
    return jnp.linalg.cholesky(system.gram[kept[:, None], kept[None, :]])


class Tableau(NamedTuple):
    """The system solved for a split into kept channels S and penalised channels E, ready to be updated.

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


def dense_tableau(system: System) -> Tableau:
    """Builds the tableau that keeps all f channels."""
    f = system.gram.shape[0]
    right = jnp.concatenate([jnp.eye(f, dtype=system.gram.dtype), system.cross], axis=1)
    inverse, rows = jnp.split(cho_solve((system.factor, True), right), [f], axis=1)
    return Tableau(inverse, rows, jnp.zeros(f, bool))


def pivot(tableau: Tableau, block: Array, active: Array, slack: float | Array) -> Tableau:
    """Moves a block of channels to the other side: kept ones become penalised, penalised ones return.

    This is a Woodbury update of A: one [b,b] solve and 2 f^2 b + 2 f d b operations, regardless of earlier updates.

    Args:
        tableau: The system, f channels.
        block: [b] distinct channel numbers.
        active: [b] mask of the channels to move.
        slack: 1 / penalty; 0 removes channels entirely.
    """
    matrix, rows, removed = tableau
    f, b = matrix.shape[0], block.shape[0]
    returning = removed[block]
    sign = jnp.where(returning, -1.0, 1.0).astype(matrix.dtype)
    eye = jnp.eye(b, dtype=matrix.dtype)
    columns = matrix[:, block] * active[None, :]
    corner = jnp.where(active[:, None], columns[block] + jnp.where(returning, 0, slack)[:, None] * eye, eye)
    right = jnp.concatenate([columns.T, rows[block] * active[:, None], eye], axis=1)
    solved = jnp.linalg.solve(corner, right)
    across, projected, inverse = jnp.split(solved, [f, f + rows.shape[1]], axis=1)

    where = jnp.where(active, block, f)  # f is out of range: dropped
    swept = sign[:, None] * across
    swept_corner = -sign[:, None] * sign[None, :] * inverse - jnp.where(returning, slack, 0)[:, None] * eye
    swept = swept.at[:, where].set(swept_corner, mode="drop")
    matrix = matrix - columns @ across
    matrix = matrix.at[where, :].set(swept, mode="drop").at[:, where].set(swept.T, mode="drop")
    rows = (rows - columns @ projected).at[where].set(sign[:, None] * projected, mode="drop")
    return Tableau(matrix, rows, removed.at[where].set(~returning, mode="drop"))
