"""Systems solved in panels, as on a CPU and as on an accelerator, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_problems import CASES, RIDGE, WIDTH, scaled64

from spap_jax.backend import traced_for
from spap_jax.solver import tableau
from spap_jax.solver.problem import Scaled, equilibrate, refit

KEPT = np.array([0, 3, 4, 8, 9, 13, 14, 15, 20, 22])
_equilibrate = jax.jit(equilibrate)


def expected(gram, cross, kept):
    """Return the tableau's matrix, rows and smallest pivot for the kept channels, by definition."""
    rest = np.setdiff1d(np.arange(WIDTH), kept)
    inverse = np.linalg.inv(gram[np.ix_(kept, kept)])
    side = gram[np.ix_(kept, rest)]
    matrix, rows = np.zeros_like(gram), np.zeros_like(cross)
    matrix[np.ix_(kept, kept)] = inverse
    matrix[np.ix_(kept, rest)] = -inverse @ side
    matrix[np.ix_(rest, kept)] = matrix[np.ix_(kept, rest)].T
    matrix[np.ix_(rest, rest)] = side.T @ inverse @ side - gram[np.ix_(rest, rest)]
    rows[kept] = inverse @ cross[kept]
    rows[rest] = cross[rest] - side.T @ rows[kept]
    return matrix, rows, np.diag(np.linalg.cholesky(gram[np.ix_(kept, kept)])).min() ** 2


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_system_is_solved_in_panels(platform: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tableau, "PANEL", 4)  # the last panel is not full
    with traced_for(platform):
        solved = jax.jit(lambda *given: tableau.solved(*given))
        for name, problem in CASES.items():
            system = _equilibrate(problem, RIDGE)
            found, least = solved(system.gram, system.cross, jnp.asarray(KEPT))
            matrix, rows, smallest = expected(*scaled64(system), KEPT)
            np.testing.assert_array_equal(np.flatnonzero(~found.removed), KEPT)
            tolerance = 1e-6 * np.linalg.cond(scaled64(system)[0][np.ix_(KEPT, KEPT)])
            np.testing.assert_allclose(found.matrix, matrix, atol=tolerance * np.abs(matrix).max(), err_msg=name)
            np.testing.assert_allclose(found.rows, rows, atol=tolerance * np.abs(rows).max(), err_msg=name)
            np.testing.assert_allclose(least, smallest, rtol=0.05, err_msg=name)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_an_indefinite_system_shows_in_its_smallest_pivot_and_has_no_solution(platform: str):
    gram, cross = jnp.eye(6).at[2, 3].set(2.0).at[3, 2].set(2.0), jnp.ones((6, 2))
    with traced_for(platform):
        assert jax.jit(lambda *given: tableau.solved(*given))(gram, cross, jnp.arange(6))[1] == -3
        found = jax.jit(lambda *given: refit(Scaled(*given)))(gram, cross, jnp.ones(6))
    assert np.isnan(found).all()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_solutions_are_those_of_a_factorisation(platform: str):
    system = _equilibrate(CASES["fewer tokens than channels"], RIDGE)._replace(scale=jnp.ones(WIDTH))
    with traced_for(platform):
        found = jax.jit(lambda given: refit(given))(system)
    gram, cross = scaled64(system)
    assert np.abs(gram @ np.asarray(found, np.float64) - cross).max() < 1e-5 * np.abs(cross).max()
