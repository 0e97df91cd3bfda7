"""Each baseline method's choice, checked against a few lines of float64 NumPy on random layers."""

from functools import partial
from itertools import combinations
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spap_jax.settings import Method, PruneSettings, Update
from spap_jax.solver import criteria, methods
from spap_jax.solver.methods import METHODS, SelectorInputs, select_channels
from spap_jax.solver.problem import Problem, equilibrate, objective

F, D, KEEP, N, RIDGE = 40, 6, 17, 300, 1e-4  # 23 channels are removed, in batches of 3 with a short last one


class Exact(NamedTuple):
    """A layer in float64: hidden [N,f]; weight [f,d]; gram [f,f] and cross [f,d], both ridged."""

    hidden: np.ndarray
    weight: np.ndarray
    gram: np.ndarray
    cross: np.ndarray


@pytest.fixture(scope="module", params=[(0, False), (1, False), (2, True)], ids=["first", "second", "centred"])
def layer(request: pytest.FixtureRequest) -> tuple[Exact, SelectorInputs]:
    """A layer in float64 and in float32; one has centred moments, as layers with an output bias do."""
    seed, centred = request.param
    rng = np.random.default_rng(seed)
    hidden = np.maximum(rng.normal(size=(N, 7)) @ rng.normal(size=(7, F)) + 0.3 * rng.normal(size=(N, F)), 0)
    hidden *= np.exp(rng.normal(size=F))
    weight = rng.normal(size=(F, D))
    h = hidden - hidden.mean(0) if centred else hidden
    target = h @ weight
    moments = (h.T @ h / N, h.T @ target / N, (target**2).sum() / N, weight)
    problem = Problem(*(jnp.asarray(x, jnp.float32) for x in moments))
    mean, variance = (jnp.asarray(x, jnp.float32) for x in (hidden.mean(0), hidden.var(0)))
    gram = moments[0] + RIDGE * np.diag(np.diag(moments[0]))
    found = SelectorInputs(problem, equilibrate(problem, RIDGE), mean, variance, jax.random.key(seed))
    return Exact(hidden, weight, gram, gram @ weight), found


def top(scores: np.ndarray) -> list[int]:
    return sorted(np.argsort(-scores, kind="stable")[:KEEP].tolist())


def costs64(exact: Exact, kept: list[int]) -> np.ndarray:
    """Return the cost of removing each kept channel alone."""
    inverse = np.linalg.inv(exact.gram[np.ix_(kept, kept)])
    return ((inverse @ exact.cross[kept]) ** 2).sum(1) / np.diag(inverse)


def explained64(exact: Exact, kept: list[int]) -> float:
    """Return the power that the kept channels explain: minus twice the objective."""
    return (exact.cross[kept] * np.linalg.solve(exact.gram[np.ix_(kept, kept)], exact.cross[kept])).sum()


def magnitude64(exact: Exact) -> np.ndarray:
    return np.array([sum(w**2 for w in row) for row in exact.weight])


def wanda64(exact: Exact) -> np.ndarray:
    norms = np.linalg.norm(exact.hidden, axis=0)  # of the uncentred channels, even if the moments are centred
    return (np.abs(exact.weight) * norms[:, None]).mean(1)


def flap64(exact: Exact) -> np.ndarray:
    fluctuation = ((exact.hidden - exact.hidden.mean(0)) ** 2).sum(0) / (N - 1)
    return fluctuation * np.linalg.norm(exact.weight, axis=1) ** 2


def obs64(exact: Exact, batches: int = F) -> list[int]:
    kept, size = list(range(F)), int(np.ceil((F - KEEP) / batches))
    while len(kept) > KEEP:
        order = np.argsort(costs64(exact, kept), kind="stable")
        gone = {kept[i] for i in order[: min(size, len(kept) - KEEP)]}
        kept = [j for j in kept if j not in gone]
    return kept


SCORES = {
    "magnitude": (magnitude64, lambda layer: criteria.magnitude(layer.problem.weight)),
    "wanda": (wanda64, lambda layer: criteria.wanda(layer.problem.weight, layer.mean, layer.variance)),
    "flap": (flap64, lambda layer: criteria.flap(layer.problem.weight, layer.variance)),
}
REFERENCES = {
    "magnitude": lambda exact: top(magnitude64(exact)),
    "wanda": lambda exact: top(wanda64(exact)),
    "flap": lambda exact: top(flap64(exact)),
    "fasp": lambda exact: top(wanda64(exact)),
    "obs": obs64,
}
_select = jax.jit(select_channels, static_argnames=("method", "keep", "swap_rounds"))
_select_groups = jax.jit(partial(methods.select_groups, count=8, keep=3), static_argnames=("method",))
_objective = jax.jit(objective)


@pytest.mark.parametrize("criterion", SCORES)
def test_scores_are_those_of_the_paper_up_to_a_factor(criterion: str, layer: tuple[Exact, SelectorInputs]):
    reference, ours = SCORES[criterion]
    expected, found = reference(layer[0]), np.asarray(ours(layer[1]), np.float64)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("method", REFERENCES)
def test_the_choice_is_that_of_the_paper(method: str, layer: tuple[Exact, SelectorInputs]):
    exact, found = layer
    chosen = _select(method, found, KEEP)
    assert chosen.kept.dtype == jnp.int32
    assert chosen.kept.tolist() == REFERENCES[method](exact)
    assert int(chosen.swaps) == 0


def test_osscar_is_batches_and_then_swaps_until_none_improves(layer: tuple[Exact, SelectorInputs]):
    exact, found = layer
    batches = obs64(exact, 10)
    assert criteria.obs_batches(found.system, KEEP).tolist() == batches
    assert batches != obs64(exact)  # otherwise the test could not tell batches from single channels
    assert _select("osscar", found, KEEP, swap_rounds=0).kept.tolist() == batches
    chosen = _select("osscar", found, KEEP, swap_rounds=50)
    kept = chosen.kept.tolist()
    after = explained64(exact, kept)
    assert int(chosen.improving) == 0
    assert int(chosen.swaps) > 0
    assert after > explained64(exact, batches)
    swapped = [explained64(exact, [*(set(kept) - {out}), into]) for out in kept for into in set(range(F)) - set(kept)]
    assert max(swapped) <= after * (1 + 1e-5)


@pytest.mark.parametrize("keep", [1, F - 1, F])
def test_batches_to_the_ends(keep: int, layer: tuple[Exact, SelectorInputs]):
    kept = criteria.obs_batches(layer[1].system, keep).tolist()
    assert len(set(kept)) == keep
    assert kept == sorted(kept)


def group_channels(groups) -> list[int]:
    """Return the channels of some groups of five channels each."""
    return [5 * group + i for group in groups for i in range(5)]


def eliminated64(exact: Exact) -> list[int]:
    """Return the three groups of eight that are left when the cheapest is removed one at a time."""
    kept = list(range(8))
    while len(kept) > 3:
        rests = [[g for g in kept if g != lost] for lost in kept]
        kept = max(rests, key=lambda rest: explained64(exact, group_channels(rest)))
    return kept


@pytest.mark.parametrize("method", get_args(Method))
def test_groups_of_channels(method: str, layer: tuple[Exact, SelectorInputs]):
    exact, found = layer
    select = partial(_select_groups, method)
    chosen = select(found)
    kept = chosen.kept.tolist()
    if method == "random":
        assert len({*(tuple(select(found._replace(key=jax.random.key(i))).kept.tolist()) for i in range(9))}) > 2
    elif METHODS[method].score:
        scores = SCORES[method.replace("fasp", "wanda")][0](exact).reshape(8, 5).sum(1)
        assert kept == sorted(np.argsort(-scores)[:3].tolist())
    elif METHODS[method].swaps:
        best = max(combinations(range(8), 3), key=lambda each: explained64(exact, group_channels(each)))
        assert kept == [*best]
        assert int(chosen.improving) == 0
    else:
        assert kept == eliminated64(exact)


def test_random_is_a_matter_of_its_key_alone(layer: tuple[Exact, SelectorInputs]):
    first, again, other = (
        _select("random", layer[1]._replace(key=jax.random.key(seed)), KEEP).kept.tolist() for seed in (5, 5, 6)
    )
    assert first == again == sorted(set(first))
    assert first != other


def test_random_takes_all_channels_alike():
    keys = jax.random.split(jax.random.key(0), 2000)
    kept = jax.vmap(lambda key: criteria.highest(criteria.random(key, F), KEEP))(keys)
    counts = np.bincount(np.asarray(kept).ravel(), minlength=F)
    spread = np.sqrt(2000 * KEEP / F * (1 - KEEP / F))
    assert (np.abs(counts - 2000 * KEEP / F) < 5 * spread).all()


def test_highest_takes_the_first_among_equals():
    kept = criteria.highest(jnp.array([2.0, 1.0, 3.0, 1.0, 1.0]), 3)
    assert kept.dtype == jnp.int32
    np.testing.assert_array_equal(kept, [0, 1, 2])


def test_the_methods_are_those_of_the_settings_and_their_updates_too():
    assert tuple(METHODS) == get_args(Method)
    assert {method.update for method in METHODS.values()} == set(get_args(Update)) - {"own"}
    own = {name: methods.update_used(PruneSettings(method=name)) for name in get_args(Method)}
    assert own == {
        "spap": "alternate",
        "random": "none",
        "magnitude": "none",
        "wanda": "none",
        "flap": "bias",
        "fasp": "refit",
        "obs": "refit",
        "osscar": "refit",
    }
    for name in get_args(Method):
        for update in set(get_args(Update)) - {"own"}:
            assert methods.update_used(PruneSettings(method=name, update=update)) == update


@pytest.mark.parametrize("method", get_args(Method))
def test_no_choice_is_better_than_ours(layer: tuple[Exact, SelectorInputs], method: str):
    ours, theirs = (_select(name, layer[1], KEEP) for name in ("spap", method))
    low, high = (_objective(layer[1].system, choice.kept) for choice in (ours, theirs))
    assert theirs.kept.tolist() == sorted(set(theirs.kept.tolist()))
    assert theirs.kept.shape == (KEEP,)
    assert int(ours.improving) == 0
    assert METHODS[method].swaps or int(theirs.swaps) == 0
    assert float(low) <= float(high) + 1e-6 * abs(float(high))
