"""Elimination to several widths, against float64 NumPy and the one-at-a-time rule; widths, against all choices."""

import itertools

import jax
import numpy as np
import pytest
from solver_problems import CASES, RIDGE, WIDTH, explained64, problem_of, scaled64, tokens

from spap_jax.solver import allocation, criteria
from spap_jax.solver.problem import equilibrate

WIDTHS = (20, 13, 12, 3)

_equilibrate = jax.jit(equilibrate)
_path = jax.jit(allocation.path, static_argnames="widths")
_obs = jax.jit(criteria.obs, static_argnames="keep")


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES)
def test_every_width_is_solved_for(problem):
    """The projection at a width is the least-squares solution for the channels that are left, and zero for the rest."""
    system = _equilibrate(problem, RIDGE)
    found = np.asarray(_path(system, WIDTHS), np.float64)
    assert found.shape == (len(WIDTHS), WIDTH, problem.weight.shape[1])
    gram, cross = scaled64(system)
    left = set(range(WIDTH))
    for width, projection in zip(WIDTHS, found, strict=True):
        kept = np.flatnonzero((projection != 0).any(axis=1))
        assert len(kept) == width
        assert left >= set(kept)
        left = set(kept)
        scaled = projection[kept] / np.asarray(system.scale, np.float64)[kept, None]
        gained = 2 * (scaled * cross[kept]).sum() - (scaled * (gram[np.ix_(kept, kept)] @ scaled)).sum()
        assert gained == pytest.approx(explained64(gram, cross, kept), rel=1e-4)


def test_the_cheapest_go_first():
    system = _equilibrate(problem_of(*tokens(11, f=48)), RIDGE)
    for projection, width in zip(np.asarray(_path(system, (40, 24, 7))), (40, 24, 7), strict=True):
        assert np.flatnonzero(projection.any(axis=1)).tolist() == _obs(system, width).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed: int):
    rng = np.random.default_rng(seed)
    losses = rng.random((4, 5)) if seed % 2 else rng.integers(0, 4, (4, 5)).astype(float)
    if seed % 3 == 0:
        losses[rng.random((4, 5)) < 0.2] = np.inf
    losses[:, 0] = 9
    for total in (0, 1, 6, 11, 16, 40):
        chosen = allocation.allocate(losses, total)
        assert chosen.shape == (4,)
        assert chosen.sum() <= total
        every = (each for each in itertools.product(range(5), repeat=4) if sum(each) <= total)
        best = min(losses[range(4), each].sum() for each in every)
        assert losses[range(4), chosen].sum() == pytest.approx(best)
