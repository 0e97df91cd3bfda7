"""One layer's pruning problem in second moments, and the linear system that its kept channels solve.

The layer's error for kept channels S and output projection V, ``|Y - H_S V|^2 / N``, depends on second moments only: a
`Problem`. A `System` adds a small ridge towards the dense weights and gives every channel unit energy: outlier
channels, a thousand times larger than their neighbours in real models, would otherwise exhaust float32 precision.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from spap_jax.numerics import full_precision, is_concrete
from spap_jax.solver.checks import check_channels, check_moments, check_positive, check_shape, check_valid
from spap_jax.solver.tableau import Tableau, solved

_RIDGE_GROWTHS = 8
_ROUNDING = 1e-2
"""Limit of a raised ridge; rounding raises it to at most a tenth of this."""

_ASYMMETRY = 1e-4
"""Tolerated difference of symmetric entries of a Gram matrix, relative to the energies of both channels."""

_NOISE = 2e-5
"""Rounding of a float32 sum of squares over some ten thousand tokens, relative to the sum."""

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

    def centred(self, hidden_mean: Array, target_mean: Array) -> "Problem":
        """Returns the moments of centred H and Y, from their means [f] and [d].

        What is left of a channel that is constant is rounding noise, which would make the system indefinite.
        """
        gram = self.gram - hidden_mean[:, None] * hidden_mean[None, :]
        cross = self.cross - hidden_mean[:, None] * target_mean[None, :]
        varies = jnp.diagonal(gram) > _NOISE * jnp.square(hidden_mean)
        return self._replace(
            gram=jnp.where(varies[:, None] & varies[None, :], gram, 0),
            cross=jnp.where(varies[:, None], cross, 0),
            target_power=self.target_power - jnp.square(target_mean).sum(),
        )


class Scaled(NamedTuple):
    """A `Problem` with a ridge towards the dense weights, scaled to a unit diagonal.

    Attributes:
        gram: [f,f] unit diagonal; eigenvalues of at least about ridge / (1 + ridge).
        cross: [f,d] right-hand side; its solution V is in the scaled channels, ``scale * V`` in the original ones.
        scale: [f] factor that gives a channel unit energy.
    """

    gram: Array
    cross: Array
    scale: Array


class System(NamedTuple):
    """A `Scaled` problem, solved for all channels.

    Attributes:
        gram: [f,f] as in `Scaled`, and so are ``cross`` [f,d] and ``scale`` [f].
        ridge: [] the ridge used, relative to each channel's energy; above the requested one if that was too small.
        least: [] smallest pivot of the elimination; NaN or infinite if it failed.
    """

    gram: Array
    cross: Array
    scale: Array
    ridge: Array
    dense: Tableau
    least: Array


class _Attempt(NamedTuple):
    """Number of attempts to solve the system, and the ridge, the tableau and the smallest pivot of the last one."""

    tried: Array
    ridge: Array
    dense: Tableau
    least: Array


@full_precision
def equilibrate(problem: Problem, ridge: float | Array) -> System:
    """Adds the ridge and scales to a unit diagonal; a ridge too small for float32 is increased tenfold until it works.

    The ridge adds ``ridge * sum_j D_j |V_j - W_j|^2`` to the error, where D_j is the energy of channel j: a kept
    channel that the calibration never excites keeps its weights. Under tracing, invalid moments give NaN or a large
    ridge.

    Raises:
        UserError: shapes do not match, the ridge is not positive, or the moments are not valid.
    """
    check_moments(problem.gram, problem.cross, problem.weight, problem.target_power)
    check_positive("ridge", ridge)
    asked = jnp.asarray(ridge, problem.gram.dtype)
    f = problem.gram.shape[0]

    def attempt(state: _Attempt) -> _Attempt:
        larger = jnp.where(unsound(state), state.ridge * 10, state.ridge)
        ridge = jnp.where(state.tried == 0, asked, larger)
        gram, cross, _ = scaled(problem, ridge)
        return _Attempt(state.tried + 1, ridge, *solved(gram, cross, jnp.arange(f)))

    def unsound(state: _Attempt) -> Array:
        # In exact arithmetic no pivot is below ridge / (1 + ridge): a much smaller one, or NaN, is rounding noise.
        return ~(state.least > 0.5 * smallest_pivot(state.ridge))

    def unfinished(state: _Attempt) -> Array:
        return unsound(state) & (state.tried <= _RIDGE_GROWTHS)

    none = Tableau(jnp.zeros_like(problem.gram), jnp.zeros_like(problem.cross), jnp.zeros(f, bool))
    last = lax.while_loop(unfinished, attempt, _Attempt(jnp.int32(0), asked, none, jnp.zeros_like(asked)))
    system = System(*scaled(problem, last.ridge), last.ridge, last.dense, last.least)
    if is_concrete(system):
        check_valid(is_valid(problem, system, asked))
    return system


def is_valid(problem: Problem, system: System, asked: float | Array) -> Array:
    """Returns whether moments are second moments, and their system was solved with little more ridge than asked, []."""
    gram = problem.gram
    size = jnp.sqrt(jnp.abs(jnp.diagonal(gram)))
    finite = jnp.stack([jnp.isfinite(a).all() for a in problem]).all() & is_finite(system)
    symmetric = jnp.all(jnp.abs(gram - gram.T) <= _ASYMMETRY * size[:, None] * size[None, :])
    return finite & symmetric & ((system.ridge <= _ROUNDING) | (system.ridge <= asked))


def is_finite(system: System) -> Array:
    """Returns whether a system was solved, []."""
    return jnp.isfinite(system.least) & (system.least > 0) & jnp.isfinite(system.dense.rows).all()


def smallest_pivot(ridge: Array) -> Array:
    """Lower bound, [], from the ridge on every eigenvalue, pivot and Schur complement of a live channel."""
    return ridge / (1 + ridge)


def scaled(problem: Problem, ridge: float | Array) -> Scaled:
    """Adds the ridge [] and scales to a unit diagonal."""
    diagonal = jnp.diagonal(problem.gram)
    energy = jnp.maximum(jnp.maximum(diagonal, 1e-6 * jnp.mean(diagonal)), _TINY)
    scale = lax.rsqrt(diagonal + ridge * energy)
    gram = problem.gram * scale[:, None] * scale[None, :]
    gram = jnp.where(jnp.eye(gram.shape[0], dtype=bool), 1.0, gram)
    cross = (problem.cross + (ridge * energy)[:, None] * problem.weight) * scale[:, None]
    return Scaled(gram, cross, scale)


@full_precision
def refit(system: System | Scaled, kept: Array | None = None) -> Array:
    """Solves for the output projection [k,d] of kept channels [k], by default all, in the original scale.

    Raises:
        UserError: ``kept`` are not distinct channel numbers.
    """
    f = system.gram.shape[0]
    kept = jnp.arange(f) if kept is None else kept
    check_channels(kept, f)
    return system.scale[kept][:, None] * _weights(system, kept)


@full_precision
def objective(system: System | Scaled, kept: Array) -> Array:
    """Computes ``-1/2 <C_S, V_S>`` at the refitted V of kept channels [k], []: half the ridged error plus a constant.

    Raises:
        UserError: ``kept`` are not distinct channel numbers.
    """
    check_channels(kept, system.gram.shape[0])
    return -0.5 * jnp.sum(system.cross[kept] * _weights(system, kept))


@full_precision
def relative_error(problem: Problem, kept: Array, projection: Array) -> Array:
    """Computes ``|Y - H_S V|^2 / |Y|^2``, [], without the ridge, of channels [k] and a projection [k,d] in the original
    scale.

    Raises:
        UserError: shapes do not match, or ``kept`` are not distinct channel numbers.
    """
    check_moments(problem.gram, problem.cross, problem.weight, problem.target_power)
    check_channels(kept, problem.gram.shape[0])
    check_shape("projection", projection, (len(kept), problem.cross.shape[1]))
    left = problem.target_power - explained(problem, kept, projection)
    return jnp.maximum(left, 0) / jnp.maximum(problem.target_power, _TINY)


def explained(problem: Problem, kept: Array | None, projection: Array) -> Array:
    """Computes the target power that the kept channels explain: ``|Y|^2 - |Y - H_S V|^2``, [], means over the tokens.

    Args:
        problem: The layer, f channels; its ``target_power`` is not used.
        kept: [k] channel numbers; None if all are kept.
        projection: [k,d] output projection of the kept channels, in the original scale.
    """
    if kept is not None:
        projection = jnp.zeros_like(problem.cross).at[kept].set(projection)
    residual = problem.cross - problem.gram @ projection
    # Summed apart, so that the small term, <V, residual>, does not lose precision next to the large one.
    linear, left = (jnp.sum(jnp.sum(projection * each, axis=1)) for each in (problem.cross, residual))
    return linear + left


def _weights(system: System | Scaled, kept: Array) -> Array:
    """Solves for the projection [k,d] of kept channels, in the scaled channels; NaN if rounding left no solution."""
    tableau, least = solved(system.gram, system.cross, kept)
    return jnp.where(least > 0, tableau.rows[kept], jnp.nan)
