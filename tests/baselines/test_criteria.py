from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spap_jax.baselines import SELECTORS, criteria, select_channels
from spap_jax.settings import METHODS
from spap_jax.solver.problem import Problem, equilibrate, objective

F, D, KEEP = 20, 6, 12


@pytest.fixture(scope="module", params=[0, 1, 2])
def layer(request):
    """Hidden channels [N,f] with a mean, the projection, and their Problem; float64 beside float32."""
    rng = np.random.default_rng(request.param)
    hidden = np.maximum(rng.normal(size=(300, 7)) @ rng.normal(size=(7, F)) + rng.normal(size=(300, F)), 0)
    hidden *= np.exp(rng.normal(size=F))
    weight = rng.normal(size=(F, D))
    target = hidden @ weight
    moments = (hidden.T @ hidden / 300, hidden.T @ target / 300, (target**2).sum() / 300, weight)
    return hidden, weight, Problem(*(jnp.asarray(x, jnp.float32) for x in moments))


def test_magnitude(layer):
    _, weight, problem = layer
    expected = [sum(w**2 for w in row) for row in weight]
    np.testing.assert_allclose(criteria.magnitude(problem), expected, rtol=1e-5)


def test_wanda(layer):
    hidden, weight, problem = layer
    norms = np.sqrt((hidden**2).mean(0))
    expected = np.abs(weight * norms[:, None]).sum(1)  # the metric of every single weight, summed over the channel
    np.testing.assert_allclose(criteria.wanda(problem), expected, rtol=1e-5)


def test_flap(layer):
    hidden, weight, problem = layer
    expected = np.linalg.norm(weight, axis=1) ** 2 * hidden.var(0)
    np.testing.assert_allclose(criteria.flap(problem, jnp.asarray(hidden.var(0), jnp.float32)), expected, rtol=1e-5)


def test_obs(layer):
    hidden, weight, problem = layer
    gram = hidden.T @ hidden / 300
    gram += 1e-4 * np.diag(np.diag(gram))
    kept = list(range(F))
    target = gram @ weight
    while len(kept) > KEEP:
        inverse = np.linalg.inv(gram[np.ix_(kept, kept)])
        projection = inverse @ target[kept]
        kept.pop(int(((projection**2).sum(1) / np.diag(inverse)).argmin()))
    np.testing.assert_array_equal(criteria.obs(equilibrate(problem, 1e-4), KEEP), kept)


def test_highest_takes_the_first_among_equals():
    kept = criteria.highest(jnp.array([2.0, 1.0, 3.0, 1.0, 1.0]), 3)
    assert kept.dtype == jnp.int32
    np.testing.assert_array_equal(kept, [0, 1, 2])


def test_selectors_are_the_methods_of_the_settings():
    assert set(SELECTORS) == set(METHODS)


@partial(jax.jit, static_argnames="method")
def _against_spap(problem, variance, method):
    system = equilibrate(problem, 1e-4)
    ours = select_channels("spap", problem, system, variance, KEEP)
    theirs = select_channels(method, problem, system, variance, KEEP)
    return ours, theirs, objective(system, ours.kept), objective(system, theirs.kept)


@pytest.mark.parametrize("method", METHODS)
def test_select_channels(layer, method):
    hidden, _, problem = layer
    variance = jnp.asarray(hidden.var(0), jnp.float32)
    ours, theirs, low, high = _against_spap(problem, variance, method)
    assert theirs.kept.tolist() == sorted(set(theirs.kept.tolist()))
    assert theirs.kept.shape == (KEEP,)
    assert int(ours.improving) == 0
    assert method == "spap" or int(theirs.swaps) == 0
    assert float(low) <= float(high) + 1e-6 * abs(float(high))
