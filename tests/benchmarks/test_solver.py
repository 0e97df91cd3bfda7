"""The random layer of the solver's benchmark, and the limits that its times are compared with."""

import jax
import numpy as np
import pytest

from benchmarks.prune_time import seconds_of
from benchmarks.solver import TOKENS, memory_rate, random_moments
from spap_jax.solver.problem import equilibrate


def test_moments_are_those_of_tokens():
    f, d, count = 48, 8, 3
    seen = jax.device_get(random_moments(jax.random.key(0), f, d, count))
    gram, weight = seen.problem.gram, seen.problem.weight
    np.testing.assert_allclose(np.diagonal(gram), seen.variance + seen.hidden_mean**2, rtol=1e-5)
    np.testing.assert_allclose(seen.problem.cross, gram @ weight, rtol=1e-4, atol=1e-4)
    assert seen.problem.target_power == pytest.approx((weight * (gram @ weight)).sum(), rel=1e-4)
    assert np.linalg.eigvalsh(gram).min() > 0  # more tokens than channels
    assert (seen.hidden_mean > 0).all()
    assert count * TOKENS > f
    assert equilibrate(seen.problem, 1e-4).ridge == pytest.approx(1e-4)


def test_a_rate_is_of_what_is_read_and_written():
    seconds = seconds_of(lambda: jax.numpy.ones(3), 3)
    assert 0 < seconds < 60
    assert memory_rate(64) > 0
