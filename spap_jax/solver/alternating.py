"""Alternating minimisation of a pruned MLP's weights: closed-form output projection, gradient steps on the rest.

With the channels fixed, the block's output is H(inner) V + b. Given the inner projections, V and b solve a linear
least-squares problem; given those, the inner projections descend on the same objective (``docs/method.md``). A round
does both. It is accepted only if the error falls on the calibration tokens and does not rise on the held-out tokens, so
the sequence is monotone and never ends above the closed-form refit it started from.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from spap_jax.numerics import forward_precision, in_float32, moments_precision
from spap_jax.parallel import collectives
from spap_jax.solver.problem import Problem, explained, refit, scaled

_TINY = jnp.finfo(jnp.float32).tiny

Inner = dict[str, jax.Array]
Hidden = Callable[[Inner, jax.Array], jax.Array]


class Tokens(NamedTuple):
    """Inputs and targets for fitting an MLP, converted to float32 when a chunk is used.

    Attributes:
        residual: [C, ..., d] residual stream before the MLP's addition, in chunks that fit in memory.
        total: [C, ..., d] desired stream after the addition.
        output: [C, ..., d] desired output of the MLP; None if it is ``total - residual``, computed per chunk.
        weights: [C, ...] weights of the tokens' errors; 0 for padding, which comes last. None if all are 1.
    """

    residual: jax.Array
    total: jax.Array
    output: jax.Array | None = None
    weights: jax.Array | None = None

    @property
    def target(self) -> jax.Array:
        """Desired output of the MLP, [..., d]."""
        tokens = in_float32(self)
        return tokens.total - tokens.residual if tokens.output is None else tokens.output

    @property
    def real(self) -> int | jax.Array:
        """Number of tokens without padding, []."""
        return math.prod(self.residual.shape[:-1]) if self.weights is None else (self.weights > 0).sum()

    def weighted(self, rows: jax.Array) -> jax.Array:
        """Multiplies rows [..., any] by the weights of their tokens, so that those of padding become zero."""
        if self.weights is None:
            return rows
        return jnp.where(self.weights[..., None] > 0, rows * self.weights[..., None], 0)

    def flat(self) -> "Tokens":
        """Returns the same tokens, flattened to [N, d]."""
        axes = self.residual.ndim - 1
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[axes:]), self)


class MlpFunctions(NamedTuple):
    """An MLP whose weights are fitted, as functions.

    Attributes:
        hidden: (inner, residual [..., d]) -> hidden channels [..., k].
        target: Returns the desired output [..., d] of some tokens.
    """

    hidden: Hidden
    target: Callable[[Tokens], jax.Array] = lambda tokens: tokens.target


class Weights(NamedTuple):
    """Weights of a pruned MLP: inner projections, down [k, d], and bias [d] or None."""

    inner: Inner
    down: jax.Array
    bias: jax.Array | None


class RoundSchedule(NamedTuple):
    """Optimisation schedule: rounds, steps per round, tokens per step, step size relative to the weights."""

    rounds: int
    steps: int
    step_tokens: int
    learning_rate: float


class Fitted(NamedTuple):
    """Weights with the output projection in closed form.

    Attributes:
        before: [] relative error of the initial weights on the tokens that the new weights were fitted to.
        after: [] relative error of the new weights on the same tokens.
    """

    weights: Weights
    before: jax.Array
    after: jax.Array


class Recovered(NamedTuple):
    """Recovered weights, the number of accepted rounds, and the relative errors on calibration and held-out tokens."""

    weights: Weights
    rounds: jax.Array
    error: jax.Array
    held_out: jax.Array


def output(hidden: Hidden, weights: Weights, residual: jax.Array) -> jax.Array:
    """Computes the MLP's output. residual: [..., d] -> [..., d]."""
    return _projected(weights, hidden(weights.inner, residual))


def _projected(weights: Weights, channels: jax.Array) -> jax.Array:
    y = jnp.einsum("...k,kd->...d", channels, weights.down)
    return y if weights.bias is None else y + weights.bias.reshape((1,) * (y.ndim - 1) + (-1,))


@forward_precision
def relative_error(mlp: MlpFunctions, weights: Weights, tokens: Tokens) -> jax.Array:
    """Computes the squared error over the squared target, summed over all tokens, []."""

    def add(total: jax.Array, chunk: Tokens) -> tuple[jax.Array, None]:
        chunk = in_float32(chunk)
        return total + _squares(chunk, mlp.target(chunk), output(mlp.hidden, weights, chunk.residual)), None

    start = jnp.zeros(2, jnp.float32)
    power, error = collectives.psum_over_chunks(lambda own: jax.lax.scan(add, start, own)[0], tokens)
    return error / jnp.maximum(power, _TINY)  # a layer that adds nothing has no target


def _squares(tokens: Tokens, target: jax.Array, made: jax.Array) -> jax.Array:
    """Computes the weighted sums of the squared target, and of the squared error of an output."""
    return jnp.stack([jnp.square(tokens.weighted(each)).sum() for each in (target, target - made)])


def mean_products(
    seen: Callable[[Tokens], tuple[jax.Array, jax.Array, jax.Array]],
    tokens: Tokens,
    f: int,
    d: int,
    squares: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Accumulates the moments of a least-squares problem in one pass; no activation is kept beyond its chunk.

    Args:
        seen: Returns the channels h [N, f] and the targets y [N, d] of a chunk, both weighted, and sums of squares;
            it is a forward pass, and has the precision of one.

    Returns:
        Means over the tokens: of h'h [f, f] and h'y [f, d], sharded along the rows, h [f], y [d], and the squares.
    """

    def add(total: tuple, chunk: Tokens) -> tuple[tuple, None]:
        h, y, own = forward_precision(seen)(in_float32(chunk))
        parts = (*products(h, y), h.sum(axis=0), y.sum(axis=0), own)
        return jax.tree.map(jnp.add, total, parts), None

    @moments_precision
    def products(h: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Materialise the transpose: XLA:CPU is twice as slow at a product that contracts the rows of a large array.
        across = jax.lax.optimization_barrier(h.T)
        return across @ h, across @ y

    def sums(own: Tokens) -> tuple:
        start = tuple(jnp.zeros(shape, jnp.float32) for shape in ((f, f), (f, d), f, d, squares))
        gram, cross, *others = jax.lax.scan(add, start, own)[0]
        return (gram, cross), others

    totals = collectives.psum_scatter_over_chunks(sums, tokens)
    (gram, cross), (h_mean, y_mean, own) = jax.tree.map(lambda total: total / tokens.real, totals)
    return gram, cross, h_mean, y_mean, own


def closed_form(mlp: MlpFunctions, weights: Weights, tokens: Tokens, ridge: float | jax.Array) -> Fitted:
    """Solves for the optimal output projection and bias, given the inner projections, in one pass over the tokens.

    The ridge pulls towards the current projection, so that the error cannot rise.
    """

    def seen(chunk: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
        chunk = chunk.flat()
        target = mlp.target(chunk)
        channels = mlp.hidden(weights.inner, chunk.residual)  # not twice, as XLA did
        # Solve for the correction of the output, not the output: its right-hand side is small, and so is its rounding.
        e = chunk.weighted(target - _projected(weights, channels))
        powers = jnp.stack([jnp.square(e).sum(), jnp.square(chunk.weighted(target)).sum()])
        return chunk.weighted(channels), e, powers

    gram, cross, h_mean, e_mean, (error, power) = mean_products(seen, tokens, *weights.down.shape, squares=(2,))
    problem = Problem(gram, cross, error, weight=jnp.zeros_like(cross))
    if weights.bias is not None:
        problem = problem.centred(h_mean, e_mean)
    change = refit(scaled(problem, ridge))
    bias = None if weights.bias is None else weights.bias + e_mean - h_mean @ change
    remains = problem.target_power - explained(problem, None, change)
    before, after = (jnp.maximum(e, 0) / jnp.maximum(power, _TINY) for e in (error, remains))
    return Fitted(Weights(weights.inner, weights.down + change, bias), before, after)


def descend(
    mlp: MlpFunctions, weights: Weights, tokens: Tokens, schedule: RoundSchedule, rate: jax.Array, key: jax.Array
) -> Weights:
    """Runs minibatch steps on all weights jointly; the step size decays to zero over the round, for convergence."""
    count = tokens.real  # padding comes last, and is never drawn
    decay = optax.cosine_decay_schedule(1.0, schedule.steps)
    # Steps are relative to the scale of the weights, so that one rate suits every layer of any model.
    optimizer = optax.chain(optax.scale_by_adam(b2=0.99), optax.scale_by_param_block_rms())

    def loss(weights: Weights, drawn: Tokens) -> jax.Array:
        power, error = _squares(drawn, mlp.target(drawn), output(mlp.hidden, weights, drawn.residual))
        return error / power

    def step(carry: tuple[Any, Any], now: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], None]:
        weights, state = carry
        number, key = now
        index = jax.random.randint(key, (schedule.step_tokens,), 0, count)
        drawn = in_float32(collectives.take_from_chunks(tokens, jnp.unravel_index(index, tokens.residual.shape[:-1])))
        with jax.default_matmul_precision("default"):  # as in other steps: the closed form that follows is exact
            gradient = jax.grad(loss)(weights, drawn)
        updates, state = optimizer.update(gradient, state, cast(Any, weights))
        size = rate * decay(number)
        return (jax.tree.map(lambda w, u: w - size * u, weights, updates), state), None

    numbered = (jnp.arange(schedule.steps), jax.random.split(key, schedule.steps))
    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(cast(Any, weights))), numbered)
    return weights


def recover(
    mlp: MlpFunctions,
    start: Weights,
    errors: tuple[jax.Array, jax.Array],
    calibration: Tokens,
    held_out: Tokens,
    schedule: RoundSchedule,
    ridge: float | jax.Array,
    key: jax.Array,
) -> Recovered:
    """Runs alternating minimisation from a closed-form refit. After a rejected round, the step size is halved.

    Args:
        errors: [] each, relative errors of ``start`` on the calibration and the held-out tokens.
        held_out: May be empty (C = 0): then nothing guards against overfitting, and their error is 0.
    """

    def judged(weights: Weights) -> jax.Array:
        return relative_error(mlp, weights, held_out) if held_out.residual.shape[0] else jnp.float32(0)

    def one(carry, key):
        weights, best, rate, taken = carry
        tried = descend(mlp, weights, calibration, schedule, rate, key)
        tried, _, fitted = closed_form(mlp, tried, calibration, ridge)
        now = jnp.stack([fitted, judged(tried)])
        better = (now[0] < best[0]) & (now[1] <= best[1])  # false for nan
        weights = jax.tree.map(lambda new, old: jnp.where(better, new, old), tried, weights)
        return (weights, jnp.where(better, now, best), jnp.where(better, rate, rate / 2), taken + better), None

    first = (start, jnp.stack(errors), jnp.float32(schedule.learning_rate), jnp.int32(0))
    (weights, best, _, taken), _ = jax.lax.scan(one, first, jax.random.split(key, schedule.rounds))
    return Recovered(weights, taken, *best)
