"""The recovered weights are never worse than those they started from."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spap_jax.numerics import full_precision
from spap_jax.solver import alternating
from spap_jax.solver.alternating import MlpFunctions, RoundSchedule, Tokens, Weights

WIDTH, CHANNELS, RIDGE = 8, 12, 1e-4
KINDS = ("silu", "relu")


def gated(inner, residual):
    return jax.nn.silu(residual @ inner["gate"]) * (residual @ inner["up"])


def biased_relu(inner, residual):
    return jax.nn.relu(residual @ inner["up"] + inner["up_bias"].reshape((1,) * (residual.ndim - 1) + (-1,)))


HIDDEN = {"silu": gated, "relu": biased_relu}


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def random_weights(kind: str, channels: int, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    inner = {"up": draw(rng, WIDTH, channels)}
    inner |= {"gate": draw(rng, WIDTH, channels)} if kind == "silu" else {"up_bias": draw(rng, channels)}
    return Weights(inner, draw(rng, channels, WIDTH), draw(rng, WIDTH) if kind == "relu" else None)


def tokens_of(kind: str, count: int, seed: int, chunks: int = 4) -> Tokens:
    """Return tokens whose target is the output of a wider MLP plus noise."""
    rng = np.random.default_rng(seed)
    residual = draw(rng, chunks, count // chunks, WIDTH)
    target = alternating.output(HIDDEN[kind], random_weights(kind, 2 * CHANNELS, 99), residual)
    return Tokens(residual, residual + target + 0.3 * draw(rng, *target.shape))


NONE = Tokens(jnp.zeros((0, 4, WIDTH)), jnp.zeros((0, 4, WIDTH)))


@functools.partial(jax.jit, static_argnames="kind")
@full_precision
def closed_form(kind, weights, tokens, ridge=RIDGE):
    return alternating.closed_form(MlpFunctions(HIDDEN[kind]), weights, tokens, ridge)


@functools.partial(jax.jit, static_argnames="kind")
@full_precision
def error(kind, weights, tokens):
    return alternating.relative_error(MlpFunctions(HIDDEN[kind]), weights, tokens)


@functools.partial(jax.jit, static_argnames=("kind", "schedule"))
@full_precision
def recover(kind, weights, calibration, held_out, schedule, seed=3):
    mlp, key = MlpFunctions(HIDDEN[kind]), jax.random.key(seed)
    own, other = (alternating.relative_error(mlp, weights, tokens) for tokens in (calibration, held_out))
    errors = own, other if held_out.residual.size else jax.numpy.float32(0)
    return alternating.recover(mlp, weights, errors, calibration, held_out, schedule, RIDGE, key)


def refitted(kind: str, calibration: Tokens) -> Weights:
    return closed_form(kind, random_weights(kind, CHANNELS, 5), calibration).weights


def same(one: Weights, other: Weights) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_relative_error_is_that_of_numpy(kind: str):
    weights, tokens = random_weights(kind, CHANNELS, 1), tokens_of(kind, 400, 2)
    output = np.asarray(alternating.output(HIDDEN[kind], weights, tokens.residual), np.float64)
    target = np.asarray(tokens.target, np.float64)
    np.testing.assert_allclose(
        error(kind, weights, tokens), ((target - output) ** 2).sum() / (target**2).sum(), rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_the_least_squares_solution(kind: str):
    weights, tokens = random_weights(kind, CHANNELS, 1), tokens_of(kind, 400, 2)
    hidden = np.asarray(HIDDEN[kind](weights.inner, tokens.residual), np.float64).reshape(400, -1)
    target = np.asarray(tokens.target, np.float64).reshape(400, -1)
    biases = int(kind == "relu")
    constant = np.ones((400, biases))
    # The ridge as additional rows: it pulls each row of the projection to its old value, and does not pull the bias.
    energy = hidden.var(axis=0) if kind == "relu" else (hidden**2).mean(axis=0)
    pull = np.diag(np.sqrt(400 * RIDGE * energy))
    design = np.block([[hidden, constant], [pull, np.zeros((CHANNELS, biases))]])
    right = np.concatenate([target, pull @ np.asarray(weights.down, np.float64)])
    solution = np.linalg.lstsq(design, right)[0]
    fitted, before, after = closed_form(kind, weights, tokens)
    np.testing.assert_allclose([before, after], [error(kind, w, tokens) for w in (weights, fitted)], rtol=1e-5)
    np.testing.assert_allclose(fitted.down, solution[:CHANNELS], rtol=0, atol=1e-4)
    if fitted.bias is not None:
        np.testing.assert_allclose(fitted.bias, solution[CHANNELS], rtol=0, atol=3e-4)
    assert fitted.inner.keys() == weights.inner.keys()


def test_the_least_squares_weigh_each_token():
    weights, tokens = random_weights("silu", CHANNELS, 1), tokens_of("silu", 400, 2)
    sizes = jnp.geomspace(0.01, 100, 400).reshape(4, 100, 1)
    output = tokens.target * sizes
    normed = tokens._replace(output=output, weights=jax.lax.rsqrt(jnp.square(output).mean(axis=-1)))
    hidden, target = (
        np.asarray(a, np.float64).reshape(400, -1) for a in (gated(weights.inner, tokens.residual), normed.target)
    )
    size = np.sqrt((target**2).mean(axis=1, keepdims=True))
    hidden, target = hidden / size, target / size
    solution = np.linalg.lstsq(hidden, target)[0]
    fitted, before, after = closed_form("silu", weights, normed, 1e-7)
    np.testing.assert_allclose(fitted.down, solution, rtol=0, atol=1e-3 * np.abs(solution).max())
    for found, down in ((before, weights.down), (after, solution)):
        expected = ((target - hidden @ np.asarray(down)) ** 2).sum() / (target**2).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose([before, after], [error("silu", w, normed) for w in (weights, fitted)], rtol=1e-4)


ROUND = RoundSchedule(1, 10, 128, 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rounds_lower_both_errors(kind: str):
    calibration, held_out = tokens_of(kind, 800, 2), tokens_of(kind, 400, 3)
    start = refitted(kind, calibration)
    runs = [recover(kind, start, calibration, held_out, ROUND._replace(rounds=rounds)) for rounds in (0, 1, 4)]
    assert same(runs[0].weights, start)
    assert [int(run.rounds) for run in runs[:2]] == [0, 1]
    assert int(runs[2].rounds) > 1
    for tokens in (calibration, held_out):
        errors = [float(error(kind, run.weights, tokens)) for run in runs]
        assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
        assert errors[-1] < 0.9 * errors[0]


def test_a_round_that_overfits_is_refused():
    calibration, held_out = tokens_of("silu", 16, 2), tokens_of("silu", 400, 3)
    start, schedule = refitted("silu", calibration), RoundSchedule(2, 10, 16, 0.5)
    unguarded = recover("silu", start, calibration, NONE, schedule)
    assert int(unguarded.rounds) > 0
    assert error("silu", unguarded.weights, calibration) < error("silu", start, calibration)
    assert error("silu", unguarded.weights, held_out) > error("silu", start, held_out)
    guarded = recover("silu", start, calibration, held_out, schedule)
    assert int(guarded.rounds) == 0
    assert same(guarded.weights, start)


def test_a_refused_round_is_tried_again_with_half_the_step():
    calibration, held_out = tokens_of("silu", 800, 2), tokens_of("silu", 400, 3)
    run = recover("silu", refitted("silu", calibration), calibration, held_out, RoundSchedule(10, 10, 128, 8.0))
    assert 0 < int(run.rounds) <= 8  # the first are refused, and all would be at that step size


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_channel_makes_no_nan(kind: str):
    calibration, held_out = tokens_of(kind, 800, 2), tokens_of(kind, 400, 3)
    weights = random_weights(kind, CHANNELS, 5)
    weights = weights._replace(inner={name: array.at[..., 4].set(0) for name, array in weights.inner.items()})
    start = closed_form(kind, weights, calibration).weights
    np.testing.assert_allclose(start.down[4], weights.down[4], rtol=1e-6)  # no token contradicts them
    run = recover(kind, start, calibration, held_out, ROUND)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.weights))
    assert int(run.rounds) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_padding(kind: str):
    calibration, held_out = tokens_of(kind, 400, 2), tokens_of(kind, 400, 3)
    start, schedule = random_weights(kind, CHANNELS, 5), RoundSchedule(2, 10, 128, 0.05)
    runs = []
    for parts in ((calibration, held_out), (padded(calibration), padded(held_out))):
        fitted, before, after = closed_form(kind, start, parts[0])
        recovered = recover(kind, fitted, *parts, schedule)
        errors = [error(kind, recovered.weights, part) for part in parts]
        runs.append((fitted, before, after, recovered, errors))
    assert int(runs[0][3].rounds) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *runs)


def padded(tokens: Tokens) -> Tokens:
    """Return tokens in chunks of 150, the last of which is filled up with numbers that are not finite."""
    count = tokens.residual.size // WIDTH
    rest = -count % 150
    residual, total = (
        jnp.pad(a.reshape(-1, WIDTH), ((0, rest), (0, 0)), constant_values=jnp.nan).reshape(-1, 150, WIDTH)
        for a in tokens[:2]
    )
    counted = (jnp.arange(count + rest) < count).reshape(-1, 150).astype(jnp.float32)
    return Tokens(residual, total, weights=counted)


def test_without_a_target_no_error_is_left():
    weights = random_weights("silu", CHANNELS, 1)
    residual = tokens_of("silu", 16, 2).residual
    silent = Tokens(residual, residual)
    assert float(error("silu", weights._replace(down=jnp.zeros((CHANNELS, WIDTH))), silent)) == 0
