import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import CASES, RIDGE, WIDTH, best64, explained64, problem_of, scaled64, tokens

from spap_jax.solver.penalty import select
from spap_jax.solver.problem import equilibrate, smallest_pivot
from spap_jax.solver.swap import block_gain, explained_by, polish, swap_gains
from spap_jax.solver.tableau import solved

_block_gain, _swap_gains = jax.jit(block_gain), jax.jit(swap_gains)
_equilibrate = jax.jit(equilibrate)
_polish = jax.jit(polish, static_argnums=2)
_solved = jax.jit(solved)
cases = pytest.mark.parametrize("problem", CASES.values(), ids=CASES)
KEPT = np.array([0, 3, 4, 8, 9, 13, 14, 15, 20, 22])
REMOVED = np.setdiff1d(np.arange(WIDTH), KEPT)


def _gains64(gram, cross, kept, removed):
    base = explained64(gram, cross, kept)
    swapped = [[explained64(gram, cross, [*np.delete(kept, i), j]) for j in removed] for i in range(len(kept))]
    return np.array(swapped) - base


@cases
def test_gains_of_all_pairs_are_exact(problem):
    system = _equilibrate(problem, RIDGE)
    gram, cross = scaled64(system)
    tableau = _solved(system.gram, system.cross, jnp.asarray(KEPT))[0]
    explained = explained_by(tableau, system.cross)
    gains = _swap_gains(tableau, jnp.asarray(KEPT), jnp.asarray(REMOVED), smallest_pivot(system.ridge)).T
    expected = _gains64(gram, cross, KEPT, REMOVED)
    np.testing.assert_allclose(explained, explained64(gram, cross, KEPT), rtol=1e-5)
    np.testing.assert_allclose(gains, expected, rtol=1e-3, atol=2e-5 * float(explained))


@settings(max_examples=20, deadline=None)
@given(
    out=st.lists(st.sampled_from(KEPT.tolist()), min_size=3, max_size=3, unique=True),
    into=st.lists(st.sampled_from(REMOVED.tolist()), min_size=3, max_size=3, unique=True),
    size=st.integers(1, 3),
)
def test_gain_of_a_block_is_exact(out, into, size):
    system = _equilibrate(CASES["ordinary"], RIDGE)
    gram, cross = scaled64(system)
    tableau = _solved(system.gram, system.cross, jnp.asarray(KEPT))[0]
    explained = explained_by(tableau, system.cross)
    gain = _block_gain(tableau, jnp.array(out + into), jnp.tile(jnp.arange(3) < size, 2))
    after = np.concatenate([np.setdiff1d(KEPT, out[:size]), into[:size]])
    expected = explained64(gram, cross, after) - explained64(gram, cross, KEPT)
    np.testing.assert_allclose(gain, expected, rtol=1e-3, atol=1e-5 * float(explained))


@cases
@pytest.mark.parametrize("start", [KEPT, np.arange(10)], ids=["scattered", "first"])
def test_polish_lowers_the_objective_until_no_swap_does(problem, start):
    system = _equilibrate(problem, RIDGE)
    gram, cross = scaled64(system)
    result = _polish(system, jnp.asarray(start), 50)
    kept = np.asarray(result.kept)
    before, after = explained64(gram, cross, start), explained64(gram, cross, kept)
    assert kept.shape == start.shape
    assert (np.diff(kept) > 0).all()
    assert int(result.improving) == 0
    assert after > before if result.swaps else (kept == start).all()
    left = _gains64(gram, cross, kept, np.setdiff1d(np.arange(WIDTH), kept))
    assert left.max() <= 2e-5 * after


@cases
def test_every_round_lowers_the_objective(problem):
    system = _equilibrate(problem, RIDGE)
    gram, cross = scaled64(system)
    powers = [explained64(gram, cross, _polish(system, jnp.asarray(KEPT), rounds).kept) for rounds in range(4)]
    assert (np.diff(powers) >= 0).all()


def test_no_rounds_only_count():
    system = _equilibrate(CASES["ordinary"], RIDGE)
    gram, cross = scaled64(system)
    result = _polish(system, jnp.asarray(KEPT[::-1]), 0)
    improving = _gains64(gram, cross, KEPT, REMOVED) > 1e-6 * explained64(gram, cross, KEPT)
    np.testing.assert_array_equal(result.kept, KEPT)
    assert int(result.swaps) == 0
    assert int(result.improving) == improving.sum() > 0


@cases
@pytest.mark.parametrize("keep", [1, WIDTH])
def test_extreme_counts(problem, keep):
    result = _polish(_equilibrate(problem, RIDGE), jnp.arange(keep), 30)
    assert len(set(np.asarray(result.kept).tolist())) == keep
    assert int(result.improving) == 0


@pytest.mark.parametrize(("f", "keep"), [(8, 5), (12, 7)])
def test_polished_selections_are_all_but_optimal(f, keep):
    problems = [problem_of(*tokens(100 * f + i, f=f, d=4, n=200)) for i in range(17)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    systems = jax.jit(jax.vmap(equilibrate, in_axes=(0, None)))(stack, RIDGE)
    choices = jax.jit(jax.vmap(lambda system: polish(system, select(system, keep, 100.0, 40), 20)))(systems)
    gaps = []
    for i, kept in enumerate(choices.kept):
        gram, cross = scaled64(jax.tree.map(lambda leaf, i=i: leaf[i], systems))
        best = best64(gram, cross, keep)
        gaps.append((best - explained64(gram, cross, kept)) / (explained64(gram, cross, range(f)) - best))
    assert np.mean(gaps) < 0.01, gaps
