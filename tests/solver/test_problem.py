import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import CASES, RIDGE, WIDTH, problem_of, scaled64, system64, tokens

from spap_jax.solver.problem import Problem, equilibrate, objective, refit, relative_error
from spap_jax.solver.tableau import pivot

ALL = jnp.arange(WIDTH)
_equilibrate, _refit, _objective = jax.jit(equilibrate), jax.jit(refit), jax.jit(objective)
cases = pytest.mark.parametrize("problem", CASES.values(), ids=CASES)


@cases
def test_system_is_the_ridged_problem_with_a_unit_diagonal(problem):
    system = _equilibrate(problem, RIDGE)
    gram, cross = system64(problem)
    scale = 1 / np.sqrt(np.diag(gram))
    np.testing.assert_allclose(system.ridge, RIDGE, rtol=1e-6)
    np.testing.assert_allclose(np.diag(system.gram), 1)
    np.testing.assert_allclose(system.gram, gram * scale[:, None] * scale, atol=1e-6)
    scaled = cross * scale[:, None]
    np.testing.assert_allclose(system.cross, scaled, atol=1e-6 * np.abs(scaled).max())


@pytest.mark.parametrize("constants", [(1.37, 1.74, 2.11, 5.0), (30.0, 100.0, 10.0)])
def test_constant_channels_are_left_out_of_a_centred_problem(constants):
    """Their variance is rounding noise of either sign, and the noise of two of them is no correlation."""
    rng = np.random.default_rng(0)
    hidden = np.maximum(rng.normal(size=(32, 1024, 24)) @ rng.normal(size=(24, 24)), 0).astype(np.float32)
    hidden[..., : len(constants)] = constants
    target, weight = hidden @ rng.normal(size=(24, 8)).astype(np.float32), jnp.ones((24, 8))

    def moments(hidden):
        gram, cross = sum(h.T @ h for h in hidden), sum(h.T @ y for h, y in zip(hidden, target, strict=True))
        count, power = hidden[..., 0].size, jnp.square(target).sum()
        problem = Problem(gram / count, cross / count, power / count, weight)
        return problem.centred(hidden.sum((0, 1)) / count, target.sum((0, 1)) / count)

    found, without = moments(jnp.asarray(hidden)), moments(jnp.asarray(hidden).at[..., : len(constants)].set(0))
    system = _equilibrate(found, RIDGE)
    np.testing.assert_allclose(system.ridge, RIDGE, rtol=1e-6)
    np.testing.assert_allclose(_refit(system), _refit(_equilibrate(without, RIDGE)), rtol=0, atol=2e-4)


def test_ridge_grows_until_the_elimination_is_sound():
    problem = CASES["rank deficient"]
    noise = 1e-4 * np.diag(np.asarray(problem.gram)).mean()
    shaken = problem._replace(gram=problem.gram - noise * jnp.eye(WIDTH))  # has negative eigenvalues
    system = _equilibrate(shaken, 1e-9)
    assert 1e-9 < float(system.ridge) < 0.1
    assert np.isfinite(system.dense.matrix).all()


def test_ridge_stops_growing_on_a_hopeless_gram():
    problem = CASES["ordinary"]
    system = _equilibrate(problem._replace(gram=problem.gram * jnp.nan), RIDGE)
    np.testing.assert_allclose(system.ridge, RIDGE * 1e8, rtol=1e-5)


def test_a_dead_channel_keeps_its_weights():
    problem = CASES["dead channels"]
    kept = jnp.array([0, 1, 2, 6, 9])
    projection = _refit(_equilibrate(problem, RIDGE), kept)
    np.testing.assert_allclose(projection[jnp.array([1, 3])], problem.weight[jnp.array([1, 6])], rtol=1e-5)


@cases
def test_refit_solves_the_ridged_system(problem):
    kept = np.arange(0, WIDTH, 2)
    gram, cross = system64(problem)
    projection = np.asarray(_refit(_equilibrate(problem, RIDGE), jnp.asarray(kept)), np.float64)
    residual = cross[kept] - gram[np.ix_(kept, kept)] @ projection
    bound = np.sqrt(np.diag(gram))[kept, None] * np.sqrt((cross**2 / np.diag(gram)[:, None]).max())
    assert (np.abs(residual) <= 2e-5 * bound).all()


@settings(max_examples=30, deadline=None)
@given(case=st.sampled_from(sorted(CASES)), order=st.permutations(range(WIDTH)))
def test_objective_falls_as_channels_are_added(case, order):
    system = _equilibrate(CASES[case], RIDGE)
    values = [float(_objective(system, jnp.array(order[:k]))) for k in (1, 4, 12, 20, WIDTH)]
    assert np.isfinite(values).all()
    assert (np.diff(values) <= 2e-6 * abs(values[-1])).all()


def test_relative_error_is_that_of_the_tokens():
    hidden, weight = tokens(11)
    kept = np.arange(0, WIDTH, 3)
    problem = problem_of(hidden, weight)
    projection = refit(equilibrate(problem, RIDGE), jnp.asarray(kept))
    target = hidden @ weight
    expected = ((target - hidden[:, kept] @ np.asarray(projection)) ** 2).sum() / (target**2).sum()
    np.testing.assert_allclose(relative_error(problem, jnp.asarray(kept), projection), expected, rtol=1e-3)


def _tableau64(system, removed, penalty):
    """Compute the tableau from its definition."""
    gram, cross = scaled64(system)
    weight = np.where(removed, penalty, 0)
    inverse = np.linalg.inv(gram + np.diag(weight))
    factor = np.where(removed, penalty, 1)
    return inverse * factor[:, None] * factor - np.diag(weight), inverse @ cross * factor[:, None]


_pivot = jax.jit(pivot)
_block = st.lists(st.tuples(st.integers(0, WIDTH - 1), st.booleans()), min_size=6, max_size=6, unique_by=lambda x: x[0])


@settings(max_examples=30, deadline=None)
@given(blocks=st.lists(_block, min_size=1, max_size=4), penalty=st.sampled_from([1.0, 100.0]))
def test_pivots_in_any_order_give_the_tableau_of_the_split(blocks, penalty):
    system = _equilibrate(CASES["ordinary"], RIDGE)
    tableau, removed = system.dense, np.zeros(WIDTH, bool)
    for block in blocks:
        channels, active = (np.array(x) for x in zip(*block, strict=True))
        tableau = _pivot(tableau, jnp.asarray(channels), jnp.asarray(active), 1 / penalty)
        removed[channels[active]] ^= True
    matrix, rows = _tableau64(system, removed, penalty)
    np.testing.assert_array_equal(tableau.removed, removed)
    np.testing.assert_allclose(tableau.matrix, matrix, atol=2e-4 * np.abs(matrix).max())
    np.testing.assert_allclose(tableau.rows, rows, atol=2e-4 * np.abs(rows).max())
