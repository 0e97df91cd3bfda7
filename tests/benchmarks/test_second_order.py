"""The second-order alternatives to the built-in step work: started near a solution, they find it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.updates import gauss_newton, lbfgs
from spap_jax.numerics import full_precision
from spap_jax.solver import alternating
from spap_jax.solver.alternating import MlpFunctions, Tokens, Weights


def gated(inner, residual):
    return jax.nn.silu(residual @ inner["gate"]) * (residual @ inner["up"])


def near_a_solution() -> tuple[Weights, Tokens]:
    """Return slightly perturbed weights, and tokens whose target the unperturbed weights produce exactly."""
    rng = np.random.default_rng(0)
    inner = {name: jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for name in ("gate", "up")}
    exact = Weights(inner, jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), None)
    residual = jnp.asarray(rng.normal(size=(3, 50, 4)), jnp.float32)
    aside = jax.tree.map(lambda w: w + 0.1 * jnp.asarray(rng.normal(size=w.shape), jnp.float32), exact)
    return aside, Tokens(residual, residual + alternating.output(gated, exact, residual))


@pytest.mark.parametrize(
    ("way", "left"),
    [
        (functools.partial(lbfgs, iterations=60), 0.03),
        (functools.partial(gauss_newton, iterations=8, inner=40), 1e-4),
    ],
)
def test_the_error_nearly_vanishes(way, left: float):
    weights, tokens = near_a_solution()
    none = jax.tree.map(lambda a: a[:0], tokens)
    done = jax.jit(full_precision(functools.partial(way, MlpFunctions(gated))))(weights, tokens, none)
    before, after = (float(alternating.relative_error(MlpFunctions(gated), w, tokens)) for w in (weights, done))
    assert before > 1e-3
    assert after < left * before
