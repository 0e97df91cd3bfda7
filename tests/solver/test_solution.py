"""The solver's public API: the single call, its parts, and their errors for bad input."""

import doctest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_problems import CASES, RIDGE, WIDTH

from spap_jax import UserError, solver
from spap_jax.solver import Problem, Solution

KEEP = 9
GOOD = CASES["target is not the dense output"]
NAN, INFINITE = jnp.float32(jnp.nan), jnp.float32(jnp.inf)
FAULTS = {
    "nan in gram": GOOD._replace(gram=GOOD.gram.at[2, 2].set(NAN)),
    "nan in cross": GOOD._replace(cross=GOOD.cross.at[3, 1].set(NAN)),
    "infinite weight": GOOD._replace(weight=GOOD.weight * INFINITE),
    "nan power": GOOD._replace(target_power=NAN),
    "asymmetric": GOOD._replace(gram=GOOD.gram.at[0, 1].add(0.01)),
    "negative": GOOD._replace(gram=-GOOD.gram),
    "indefinite": GOOD._replace(gram=GOOD.gram - jnp.eye(WIDTH)),
    "power too small": GOOD._replace(target_power=GOOD.target_power / 2),
}


def solved(problem: Problem, keep: Any = KEEP, **settings) -> Solution:
    gram, cross, power, weight = problem
    return solver.solve(gram, cross, weight, keep, target_power=power, **settings)


def error64(problem: Problem, kept: jax.Array, projection: jax.Array) -> float:
    """Compute the relative error in float64."""
    gram, cross, power, _ = (np.asarray(a, np.float64) for a in problem)
    channels, v = np.asarray(kept), np.asarray(projection, np.float64)
    explained = 2 * (v * cross[channels]).sum() - (v * (gram[np.ix_(channels, channels)] @ v)).sum()
    return float((power - explained) / power)


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES)
def test_a_solution_is_what_its_parts_make(problem: Problem):
    solution = solved(problem)
    system = jax.jit(solver.equilibrate)(problem, RIDGE)
    polished = jax.jit(solver.polish, static_argnums=2)(
        system, jax.jit(solver.select, static_argnums=(1, 3))(system, KEEP, 100.0, 40), 8
    )
    np.testing.assert_array_equal(solution.kept, polished.kept)
    np.testing.assert_allclose(solution.projection, solver.refit(system, polished.kept), rtol=1e-4, atol=1e-5)
    assert (solution.swaps, solution.swaps_left) == (polished.swaps, polished.improving)
    assert solution.ridge == system.ridge
    assert solution.solved
    if problem.target_power > 0:
        assert solution.error == pytest.approx(error64(problem, solution.kept, solution.projection), abs=2e-5)


def test_without_a_power_the_error_is_relative_to_what_all_channels_explain():
    given, not_given = solved(GOOD), solved(GOOD._replace(target_power=None))
    best = np.linalg.solve(*(np.asarray(a, np.float64) for a in (GOOD.gram, GOOD.cross)))
    everything = (best * np.asarray(GOOD.cross, np.float64)).sum()
    power = float(GOOD.target_power)
    assert everything < 0.97 * power
    np.testing.assert_array_equal(given.kept, not_given.kept)
    assert not_given.error == pytest.approx(1 - (1 - float(given.error)) * power / everything, rel=1e-3)
    assert solved(GOOD._replace(target_power=None), WIDTH).error == pytest.approx(0, abs=1e-5)


def test_swaps_that_are_left_are_counted():
    counts = solved(GOOD, swap_rounds=0)
    assert counts.swaps == 0
    assert counts.swaps_left > 0
    assert counts.solved


@pytest.mark.parametrize("problem", FAULTS.values(), ids=FAULTS)
def test_moments_that_are_none_are_an_error_and_under_jit_a_flag(problem: Problem):
    with pytest.raises(UserError, match="moments"):
        solved(problem)
    solution = jax.jit(solved)(problem)
    assert not solution.solved
    assert solution.swaps_left == -1
    assert (solution.kept == -1).all()
    assert jnp.isnan(solution.projection).all()
    assert jnp.isnan(solution.error)


def test_layers_that_are_mapped_over_are_solved_each_by_itself():
    problems = [CASES["ordinary"], FAULTS["nan in gram"], CASES["redundant"]]
    together = jax.vmap(solved)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems))
    assert together.solved.tolist() == [True, False, True]
    for index in (0, 2):
        alone = solved(problems[index])
        np.testing.assert_array_equal(together.kept[index], alone.kept)
        np.testing.assert_allclose(together.error[index], alone.error, rtol=1e-4)


def test_numbers_that_decide_shapes_are_static():
    jitted = jax.jit(solver.solve, static_argnames="keep")
    np.testing.assert_array_equal(jitted(*GOOD[:2], GOOD.weight, keep=KEEP).kept, solved(GOOD).kept)
    with pytest.raises(UserError, match="keep is traced, and decides the shapes of arrays: name it in static_argnames"):
        jax.jit(solver.solve)(*GOOD[:2], GOOD.weight, KEEP)


def test_float64_and_lists_are_taken():
    arrays = (np.asarray(GOOD.gram, np.float64), np.asarray(GOOD.cross, np.float64), np.asarray(GOOD.weight).tolist())
    np.testing.assert_array_equal(solver.solve(*arrays, keep=KEEP).kept, solved(GOOD).kept)


SYSTEM = jax.jit(solver.equilibrate)(GOOD, RIDGE)
BROKEN = jax.jit(solver.equilibrate)(FAULTS["nan in gram"], RIDGE)
SOME = jnp.arange(KEEP)
WIDE = GOOD._replace(gram=GOOD.gram[:, :-1])
REFUSED = {
    "no channels": (lambda: solved(GOOD, 0), "keep must be a whole number from 1 to 24, not 0"),
    "half a channel": (lambda: solved(GOOD, 8.0), "keep"),
    "negative rounds": (lambda: solved(GOOD, swap_rounds=-1), "swap_rounds"),
    "no ridge": (lambda: solved(GOOD, ridge=0.0), "ridge"),
    "nan penalty": (lambda: solved(GOOD, penalty=float("nan")), "penalty"),
    "gram not square": (lambda: solved(WIDE), r"shapes \[f, f\]"),
    "a batch": (lambda: solved(jax.tree.map(lambda a: a[None], GOOD)), "vmap"),
    "no arrays": (lambda: solver.solve(1.0, 2.0, 3.0, 1), r"\[f, f\]"),
    "equilibrate: nan": (lambda: solver.equilibrate(FAULTS["nan in gram"], RIDGE), "moments"),
    "select: no steps": (lambda: solver.select(SYSTEM, KEEP, 100.0, 0), "steps"),
    "select: broken, all kept": (lambda: solver.select(BROKEN, WIDTH, 100.0, 40), "moments"),
    "polish: twice": (lambda: solver.polish(SYSTEM, jnp.zeros(3, int), 8), "distinct channel numbers"),
    "polish: none": (lambda: solver.polish(SYSTEM, SOME[:0], 8), "channel numbers"),
    "polish: a mask": (lambda: solver.polish(SYSTEM, jnp.ones(WIDTH, bool), 8), "bool"),
    "refit: outside": (lambda: solver.refit(SYSTEM, SOME - 1), "distinct channel numbers"),
    "objective: outside": (lambda: solver.objective(SYSTEM, SOME + 20), "distinct channel numbers"),
    "relative_error: projection": (lambda: solver.relative_error(GOOD, SOME, GOOD.weight), "projection"),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused(call, words: str):
    with pytest.raises(UserError, match=words):
        call()


def test_parts_of_a_broken_system_name_no_channel_under_jit():
    assert (jax.jit(solver.select, static_argnums=(1, 3))(BROKEN, KEEP, 100.0, 40) == -1).all()
    polished = jax.jit(solver.polish, static_argnums=2)(BROKEN, SOME, 8)
    assert (polished.kept == -1).all()
    assert polished.improving == -1


def test_the_example_of_the_package_runs():
    assert doctest.testmod(solver).failed == 0
