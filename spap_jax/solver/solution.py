"""`solve`, the solver's entry point: from one layer's second moments to a solution."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from spap_jax.numerics import full_precision
from spap_jax.solver.checks import check_moments, check_positive, check_valid, check_whole
from spap_jax.solver.penalty import select
from spap_jax.solver.problem import Problem, equilibrate, explained, is_valid, refit, relative_error
from spap_jax.solver.swap import polish

_INCONSISTENT = 1e-3
"""Relative excess over the target's power that the channels may appear to explain because of rounding."""


class Solution(NamedTuple):
    """The kept channels of a layer, their weights, and their error.

    If ``solved`` is false, ``kept`` and ``swaps_left`` are -1, ``projection`` and ``error`` are NaN, and the other
    numbers are meaningless.

    Attributes:
        kept: [k] int32 numbers of the kept channels, ascending.
        projection: [k,d] their output projection, which minimises the ridged error.
        error: [] ``|Y - H_S V|^2 / |Y|^2``, relative to ``target_power``; if that was not given, the part of Y that
            all f channels together cannot explain is excluded from both.
        swaps: [] int32 swaps of a kept for a removed channel made after the penalty method.
        swaps_left: [] int32 single swaps that would still lower the objective; 0 certifies a local optimum.
        ridge: [] the ridge used; above the requested one if the moments were too nearly singular for it.
        solved: [] bool, whether the moments were valid and have a solution.
    """

    kept: Array
    projection: Array
    error: Array
    swaps: Array
    swaps_left: Array
    ridge: Array
    solved: Array


def solve(
    gram: ArrayLike,
    cross: ArrayLike,
    weight: ArrayLike,
    keep: int,
    *,
    target_power: ArrayLike | None = None,
    ridge: float | Array = 1e-4,
    penalty: float | Array = 100.0,
    steps: int = 40,
    swap_rounds: int = 8,
) -> Solution:
    """Chooses k of f channels and solves for their output projection.

    The layer has hidden channels H [N,f] and target output Y [N,d]. For a layer with an output bias, subtract their
    means from H and Y; the bias is then ``Y.mean(0) - H.mean(0)[kept] @ projection``.

    The function works under ``jax.jit``, with ``keep``, ``steps`` and ``swap_rounds`` static, and under ``jax.vmap``.
    Invalid values raise an error if they are concrete; under tracing they do not, and ``solved`` is false.

    Args:
        gram: [f,f] H'H / N.
        cross: [f,d] H'Y / N.
        weight: [f,d] the dense output projection, towards which the ridge pulls.
        keep: Number of channels to keep, k, from 1 to f; static.
        target_power: [] mean of ``|y|^2`` over the tokens, to which the error is relative.
        ridge: Pull towards the dense weights, relative to each channel's energy.
        penalty: Weight of the penalty on a removed channel, relative to its energy.
        steps: Number of steps in which the count of penalised channels grows to f - k, at least 1; static.
        swap_rounds: Maximum rounds of exact swaps after that; 0 only counts the improving swaps. Static.

    Raises:
        UserError: shapes or numbers are invalid; the class is a ``ValueError``.
    """
    gram, cross, weight = (jnp.asarray(a, jnp.float32) for a in (gram, cross, weight))
    power = None if target_power is None else jnp.asarray(target_power, jnp.float32)
    check_moments(gram, cross, weight, jnp.float32(0) if power is None else power)
    static = {
        "keep": check_whole("keep", keep, 1, len(gram)),
        "steps": check_whole("steps", steps, 1),
        "swap_rounds": check_whole("swap_rounds", swap_rounds, 0),
    }
    check_positive("ridge", ridge)
    check_positive("penalty", penalty)
    solution = _solve(gram, cross, weight, power, ridge, penalty, **static)
    check_valid(solution.solved)
    return solution


@functools.partial(jax.jit, static_argnames=("keep", "steps", "swap_rounds"))
@full_precision
def _solve(
    gram: Array,
    cross: Array,
    weight: Array,
    target_power: Array | None,
    ridge: float | Array,
    penalty: float | Array,
    keep: int,
    steps: int,
    swap_rounds: int,
) -> Solution:
    problem = Problem(gram, cross, jnp.float32(0) if target_power is None else target_power, weight)
    system = equilibrate(problem, ridge)
    if target_power is None:
        best = system.scale[:, None] * system.dense.rows
        problem = problem._replace(target_power=explained(problem, None, best))
    kept, swaps, left = polish(system, select(system, keep, penalty, steps), swap_rounds)
    projection = refit(system, kept)
    error = relative_error(problem, kept, projection)
    consistent = explained(problem, kept, projection) <= (1 + _INCONSISTENT) * problem.target_power
    finite = jnp.isfinite(projection).all() & jnp.isfinite(error)
    valid = is_valid(problem, system, ridge) & finite & consistent
    return Solution(
        kept=jnp.where(valid, kept, -1),
        projection=jnp.where(valid, projection, jnp.nan),
        error=jnp.where(valid, error, jnp.nan),
        swaps=swaps,
        swaps_left=jnp.where(valid, left, -1),
        ridge=system.ridge,
        solved=valid,
    )
