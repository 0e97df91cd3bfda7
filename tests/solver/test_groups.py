"""Groups of channels: each choice is compared with all possible ones, in float64 NumPy."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_problems import CASES, RIDGE, WIDTH, explained64, problem_of, scaled64, tokens

from spap_jax.solver import groups
from spap_jax.solver.problem import equilibrate

_equilibrate = jax.jit(equilibrate)
_eliminate = jax.jit(groups.eliminate, static_argnums=(1, 2))
_polish = jax.jit(groups.polish, static_argnums=(1, 3))
cases = pytest.mark.parametrize("problem", CASES.values(), ids=CASES)


def explained(system, size: int, chosen) -> float:
    """Return the power that some groups explain when refitted: minus twice the objective."""
    channels = [group * size + i for group in chosen for i in range(size)]
    return explained64(*scaled64(system), channels)


def improving(system, m: int, kept, threshold: float) -> int:
    """Count the single swaps that would explain more than the kept groups do."""
    size = system.scale.size // m
    removed = np.setdiff1d(np.arange(m), kept)
    now = explained(system, size, kept)
    swapped = [[*np.delete(kept, i), j] for i in range(len(kept)) for j in removed]
    return sum(explained(system, size, other) - now > threshold * now for other in swapped)


@cases
@pytest.mark.parametrize("m", [2, 8])
def test_costs_of_groups_are_exact(problem, m: int):
    system = _equilibrate(problem, RIDGE)
    costs = jax.jit(groups.removal_costs, static_argnums=1)(system.dense, m)
    whole = explained(system, WIDTH // m, range(m))
    expected = [whole - explained(system, WIDTH // m, [g for g in range(m) if g != lost]) for lost in range(m)]
    np.testing.assert_allclose(costs, expected, rtol=1e-3, atol=2e-5 * whole)


@cases
@pytest.mark.parametrize(("m", "keep"), [(2, 1), (8, 4), (8, 7)])
def test_the_choice_is_the_best_of_all(problem, m: int, keep: int):
    system = _equilibrate(problem, RIDGE)
    chosen = _polish(system, m, _eliminate(system, m, keep), 8)
    kept = np.asarray(chosen.kept)
    assert kept.shape == (keep,)
    assert (np.diff(kept) > 0).all()
    size = WIDTH // m
    best = max(explained(system, size, each) for each in combinations(range(m), keep))
    assert explained(system, size, kept) >= (1 - 2e-5) * best
    assert int(chosen.improving) == 0


@cases
def test_swaps_end_where_none_improves(problem):
    system = _equilibrate(problem, RIDGE)
    worst = min(combinations(range(8), 4), key=lambda each: explained(system, 3, each))
    before = _polish(system, 8, jnp.asarray(worst), 0)
    assert tuple(before.kept.tolist()) == worst
    assert int(before.swaps) == 0
    assert int(before.improving) == improving(system, 8, worst, 1e-6)
    after = _polish(system, 8, jnp.asarray(worst), 20)
    assert int(after.improving) == 0
    assert improving(system, 8, np.asarray(after.kept), 2e-5) == 0
    assert bool(after.swaps) == bool(before.improving)
    fewer = _polish(system, 8, jnp.asarray(worst), 1)
    assert int(fewer.swaps) == min(1, int(after.swaps))


def test_many_problems_end_at_their_best_choice():
    """Elimination alone or single swaps alone may stop short of the best choice; together they rarely do."""
    gaps = []
    for seed in range(40):
        system = _equilibrate(problem_of(*tokens(1000 + seed, f=24, d=4, n=200)), RIDGE)
        values = {each: explained(system, 3, each) for each in combinations(range(8), 4)}
        kept = tuple(_polish(system, 8, _eliminate(system, 8, 4), 8).kept.tolist())
        gaps.append((max(values.values()) - values[kept]) / max(values.values()))
    assert np.mean(np.array(gaps) < 1e-6) >= 0.95, gaps
