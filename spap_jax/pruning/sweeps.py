"""Sweeps over a pruned model: each block's MLP in turn adjusted so that the whole model predicts as the dense one does.

The sequential pass fits every block to the dense stream at its own output. What counts is the distribution at the end,
so sweeps go on with the alternating minimisation on that: block coordinate descent on the Kullback-Leibler divergence
of the pruned model's predictions from the dense model's ("Looking past the block" in ``docs/method.md``). Labels play
no part. A step of a block is taken only if the divergence falls on tokens that it was not fitted on.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spap_jax import devices, memory
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Block, Params
from spap_jax.numerics import full_precision
from spap_jax.pruning import streams
from spap_jax.pruning.streams import Streams
from spap_jax.solver.alternating import relative_optimizer

_MLP_TOKENS = 512
"""Tokens that pass through an MLP at once: enough to keep a device busy, few enough to hold little."""


class Steps(NamedTuple):
    """How hard to try on a block: minibatch steps, sequences in a step, size of a step relative to the weights."""

    number: int
    sequences: int
    learning_rate: float


class Start(NamedTuple):
    """Where to go on: steps made, one a block and sweep, and the divergence that they reached."""

    made: int
    reached: float


class Swept(NamedTuple):
    """What a sweep did to one block.

    Attributes:
        sweep: Its number.
        layer: That of the block.
        before: Divergence before, nats per token.
        after: Divergence of the block's new weights.
        taken: Whether it fell, so that the new weights were taken.
    """

    sweep: int
    layer: int
    before: float
    after: float
    taken: bool


def sweep(
    config: DecoderConfig,
    outer: Params,
    layers: Params,
    tokens: tuple[np.ndarray, np.ndarray],
    final: tuple[jax.Array, jax.Array],
    sweeps: int,
    steps: Steps,
    key: jax.Array,
    start: Start | None = None,
) -> Iterator[tuple[Params, Swept]]:
    """Adjusts the MLP of every block in turn, from the first to the last, and again.

    The weights of all blocks, the stream at a block and the dense model's last stream are held.

    Args:
        config: The pruned decoder.
        outer: Its parameters outside the blocks.
        layers: Its blocks, stacked [L, ...]; updated in place, so not to be used afterwards.
        tokens: Token blocks to fit and held out, each [C, B, T] in chunks; without any held out (C = 0) those that are
            fitted judge as well.
        final: The dense model's stream after its last block for the same tokens, each [C, B, T, d].
        sweeps: How many.
        steps: How hard to try on a block.
        key: Randomness of the minibatches.
        start: Where an earlier run stopped, whose steps lie in ``layers``.

    Yields:
        The parameters of each block in each sweep, and what was done, from ``start`` on.
    """
    judge = 1 if tokens[1].size else 0
    both = _entering(config, outer, tokens, final)
    made, best = start or (0, divergence(config, outer, layers, 0, at(layers["mlp"], 0), both[judge]))
    for index in range(made % config.layers):
        both = _behind(config, layers, index, both)
    # Compiled apart from the first call: the compiler's memory is given back before the steps need theirs.
    descend = _descend.lower(config, steps, outer, layers, 0, both[0], key).compile()
    memory.return_scraps()
    for step in range(made, sweeps * config.layers):
        number, index = divmod(step, config.layers)
        if step > made and not index:
            both = _entering(config, outer, tokens, final)
        mlp = descend(outer, layers, index, both[0], jax.random.fold_in(key, step))
        now = divergence(config, outer, layers, index, mlp, both[judge])
        done = Swept(number, index, float(best), float(now), bool(now < best))  # not taken if nan
        if done.taken:
            layers, best = layers | {"mlp": put(layers["mlp"], index, mlp)}, now
        del mlp
        yield at(layers, index), done
        both = _behind(config, layers, index, both)


def _entering(
    config: DecoderConfig, outer: Params, tokens: tuple[np.ndarray, ...], final: tuple[jax.Array, ...]
) -> list[Streams]:
    """The dense model's last stream beside the pruned one before the first block, of each part of the tokens."""
    return [Streams(dense, streams.embed(config, outer, part)) for dense, part in zip(final, tokens, strict=True)]


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def _descend(
    config: DecoderConfig, steps: Steps, outer: Params, layers: Params, index: int, fitted: Streams, key: jax.Array
) -> Params:
    """The MLP of one block after minibatch steps; they decay to zero, so that it ends settled.

    Products are as exact as the device makes them by itself: minibatches are noisier, and what comes of the steps is
    judged at full precision.
    """
    block = at(layers, index)
    shape = fitted.pruned.shape[:2]
    count = math.prod(shape)
    sequences = min(steps.sequences, count)
    optimizer = relative_optimizer()
    decay = optax.cosine_decay_schedule(1.0, steps.number)

    def loss(mlp: Params, drawn: Streams, outer: Params, layers: Params, index: int) -> jax.Array:
        last = _rest(config, layers, index, mlp, drawn.pruned)
        return _token_divergences(config, outer, drawn.dense, last).sum()

    def gradients(drawn: Streams, mlp: Params, *others: Any) -> Params:
        return jax.grad(loss)(mlp, drawn, *others)

    def step(carry: tuple[Any, Any], now: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], None]:
        mlp, state = carry
        number, key = now
        places = jnp.unravel_index(jax.random.randint(key, (sequences,), 0, count), shape)
        drawn = devices.draw(fitted, places)
        gradient = devices.total(gradients, drawn, mlp, outer, layers, index)
        gradient = jax.tree.map(lambda g: g / (sequences * fitted.pruned.shape[2]), gradient)
        updates, state = optimizer.update(gradient, state, mlp)
        size = steps.learning_rate * decay(number)
        return (jax.tree.map(lambda w, u: w - size * u, mlp, updates), state), None

    start = jax.tree.map(lambda a: a.astype(jnp.float32), block["mlp"])
    numbered = (jnp.arange(steps.number), jax.random.split(key, steps.number))
    (mlp, _), _ = jax.lax.scan(step, (start, cast(Any, optimizer.init(start))), numbered)
    # In the dtype of the weights, in which it will be judged and written.
    return jax.tree.map(lambda new, old: new.astype(old.dtype), mlp, block["mlp"])


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def divergence(
    config: DecoderConfig, outer: Params, layers: Params, index: int, mlp: Params, chunks: Streams
) -> jax.Array:
    """Mean over all tokens, in nats, with ``mlp`` in block ``index``, which the stream enters."""

    def sums(own: Streams, outer: Params, layers: Params, mlp: Params) -> jax.Array:
        def add(total: jax.Array, chunk: Streams) -> tuple[jax.Array, None]:
            last = _rest(config, layers, index, mlp, chunk.pruned)
            return total + _token_divergences(config, outer, chunk.dense, last).sum(), None

        return jax.lax.scan(add, jnp.float32(0), own)[0]

    total = devices.total(sums, chunks, outer, layers, mlp)
    return total / np.prod(chunks.pruned.shape[:3])


def room(layer: Params, count: int) -> Params:
    """A stack of zeros for ``count`` layers like one."""
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype, device=devices.stacked(a)), layer)


@functools.partial(jax.jit, donate_argnames="stack")
def put(stack: Params, index: int, layer: Params) -> Params:
    """Stores one layer in its place of a stack [L, ...], which is updated in place."""
    return jax.tree.map(lambda all_layers, new: all_layers.at[index].set(new), stack, layer)


def _behind(config: DecoderConfig, layers: Params, index: int, both: list[Streams]) -> list[Streams]:
    """The streams behind a block; the dense one is the last anyway."""
    return [part._replace(pruned=advance(config, layers, index, part.pruned)) for part in both]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="pruned")
@full_precision
def advance(config: DecoderConfig, layers: Params, index: int, pruned: jax.Array) -> jax.Array:
    """The stream [C, B, T, d] behind block ``index`` of the stack, of one that enters it."""
    block = at(layers, index)
    return streams.in_place(lambda x: _apply(config, block, x), pruned)


def _rest(config: DecoderConfig, layers: Params, index: int | jax.Array, mlp: Params, x: jax.Array) -> jax.Array:
    """The stream after the last block, of one that enters block ``index`` with another MLP. x: [B, T, d] -> [B, T, d].

    One program serves every block: those before it are passed by. Gradients need the stream between blocks only, and
    compute what is inside of one again.
    """

    @jax.checkpoint  # outside of the condition, whose gradient would keep a copy of every block's weights
    def step(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.cond(number > index, lambda x: _apply(config, at(layers, number), x), lambda x: x, x), None

    x = _apply(config, at(layers, index) | {"mlp": mlp}, x)
    return jax.lax.scan(step, x, jnp.arange(config.layers))[0]


def _token_divergences(config: DecoderConfig, outer: Params, dense: jax.Array, pruned: jax.Array) -> jax.Array:
    """KL(dense || pruned) of the predictions, of two streams after the last block. [B, T, d] twice -> [B, T]."""
    wanted, got = (jax.nn.log_softmax(decoder.head(config, outer, x).astype(jnp.float32)) for x in (dense, pruned))
    return (jnp.exp(wanted) * (wanted - got)).sum(axis=-1)


def _apply(config: DecoderConfig, layer: Params, x: jax.Array) -> jax.Array:
    """A block whose gradients hold the hidden channels of a few tokens at a time. x: [B, T, d] -> [B, T, d]."""
    piece = functools.partial(decoder.block, config, layer)
    r = piece(x, *streams.causal(x), method=Block.attend)
    after = jax.checkpoint(lambda token: piece(token, method=Block.feed_forward))
    return jax.lax.map(after, r.reshape(-1, config.width), batch_size=_MLP_TOKENS).reshape(x.shape)


def at(layers: Params, index: int | jax.Array) -> Params:
    """One layer of a stack [L, ...]."""
    return jax.tree.map(lambda stack: stack[index], layers)
