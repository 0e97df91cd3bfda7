import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_problems import CASES, RIDGE, WIDTH, explained64, obs64, scaled64

from spap_jax.solver.penalty import _State, _step, removal_costs, return_gains, select
from spap_jax.solver.problem import equilibrate
from spap_jax.solver.tableau import pivot

_equilibrate = jax.jit(equilibrate)
_pivot = jax.jit(pivot)
_select = jax.jit(select, static_argnums=(1, 3))
_turn = jax.jit(_step, static_argnums=(2, 3))
cases = pytest.mark.parametrize("problem", CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize(("keep", "steps"), [(1, 5), (9, 1), (WIDTH, 5)])
def test_keeps_exactly_k_channels_in_order(problem, keep, steps):
    kept = np.asarray(_select(_equilibrate(problem, RIDGE), keep, 100.0, steps))
    assert kept.dtype == np.int32
    assert kept.shape == (keep,)
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < WIDTH


@cases
@pytest.mark.parametrize("keep", [6, 18])
def test_explains_as_much_as_one_at_a_time_elimination(problem, keep):
    system = _equilibrate(problem, RIDGE)
    gram, cross = scaled64(system)
    everything = explained64(gram, cross, range(WIDTH))
    lost = everything - explained64(gram, cross, _select(system, keep, 100.0, 5))
    lost_obs = everything - explained64(gram, cross, obs64(gram, cross, keep))
    assert lost <= 1.01 * lost_obs + 1e-5 * everything


def test_dead_channels_go_first():
    system = _equilibrate(CASES["dead channels"], RIDGE)
    kept = np.asarray(_select(system, WIDTH - 4, 100.0, 2))
    assert not set(kept) & {1, 5, 6, 17}


def test_one_of_each_pair_of_duplicates_stays():
    system = _equilibrate(CASES["duplicated channels"], RIDGE)
    for steps in (1, 40):
        assert sorted(np.asarray(_select(system, WIDTH // 2, 100.0, steps)) // 2) == list(range(WIDTH // 2))


def test_scores_are_the_marginal_costs_at_a_finite_penalty():
    system = _equilibrate(CASES["ordinary"], RIDGE)
    gram, cross = scaled64(system)
    removed = np.array([2, 3, 11])
    penalty = np.zeros(WIDTH)
    penalty[removed] = 100.0
    tableau = _pivot(system.dense, jnp.asarray(removed), jnp.ones(3, bool), 1 / 100)

    def explained(diagonal):
        return (cross * np.linalg.solve(gram + np.diag(diagonal), cross)).sum()

    for j in range(WIDTH):
        free, lost = penalty.copy(), penalty.copy()
        free[j], lost[j] = 0, 1e12
        expected = explained(free) - explained(lost)
        kept = j not in removed
        actual = removal_costs(tableau)[j] if kept else return_gains(tableau, 1 / 100)[j]
        other = return_gains(tableau, 1 / 100)[j] if kept else removal_costs(tableau)[j]
        np.testing.assert_allclose(actual, expected, rtol=2e-3)
        assert other == (-np.inf if kept else np.inf)


def test_a_wrongly_penalised_channel_returns_once():
    system = _equilibrate(CASES["independent"], RIDGE)
    dearest = jnp.argmax(removal_costs(system.dense))
    wrong = _pivot(system.dense, dearest[None], jnp.ones(1, bool), 1 / 100)
    state = _turn(_State(wrong, jnp.zeros(WIDTH, bool)), jnp.int32(3), 2, 1, 1 / 100)
    assert not state.tableau.removed[dearest]
    assert state.returned[dearest]
    assert int(state.tableau.removed.sum()) == 3
    again = state._replace(tableau=_pivot(state.tableau, dearest[None], jnp.ones(1, bool), 1 / 100))
    assert _turn(again, jnp.int32(5), 2, 1, 1 / 100).tableau.removed[dearest]
