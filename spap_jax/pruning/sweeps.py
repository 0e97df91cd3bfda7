"""Sweeps over a pruned model: its MLPs in turn adjusted so that the whole model predicts as the dense one does.

The sequential pass fits every block to the dense stream at its own output. What counts is the distribution at the end,
so sweeps go on with the alternating minimisation on that: block coordinate descent on the Kullback-Leibler divergence
of the pruned model's predictions from the dense model's ("Looking past the block" in ``docs/method.md``), one block at
a time or, where there is memory for their gradients, some or all of them together. Labels play no part. The new weights
are taken only if the divergence falls on tokens that they were not fitted on.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spap_jax import devices, memory
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import in_float32
from spap_jax.pruning import streams
from spap_jax.pruning.predictions import advance, at, divergence, put, rest, some, token_divergences
from spap_jax.pruning.streams import Streams
from spap_jax.solver.alternating import relative_optimizer


class Steps(NamedTuple):
    """How hard to try.

    Attributes:
        blocks: Consecutive blocks that are adjusted together, g; a divisor of their number.
        number: Minibatch steps, times g.
        sequences: In a step.
        learning_rate: Size of a step relative to the weights.
    """

    blocks: int
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
        before: Divergence before the steps on this block and those together with it, nats per token.
        after: Divergence of their new weights.
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
    watch: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Params, Swept]]:
    """Adjusts the MLPs of g blocks at a time, from the first to the last, and again.

    The weights of all blocks, the stream at a block and the dense model's last stream are held.

    Args:
        config: The pruned decoder.
        outer: Its parameters outside the blocks.
        layers: Its blocks, stacked [L, ...]; updated in place, so not to be used afterwards.
        tokens: Token blocks to fit and held out, each [C, B, T] in chunks; without any held out (C = 0) those that are
            fitted judge as well.
        final: The dense model's stream after its last block for the same tokens, each [C, B, T, d].
        sweeps: How many.
        steps: How hard to try.
        key: Randomness of the minibatches.
        start: Where an earlier run stopped, whose steps lie in ``layers``.
        watch: Called between the steps on several blocks, with how many of the parts were done and how many there are.

    Yields:
        The parameters of each block in each sweep, and what was done, from ``start`` on.
    """
    judge = 1 if tokens[1].size else 0
    both = _entering(config, outer, tokens, final)
    made, best = start or (0, divergence(config, outer, layers, 0, some(layers["mlp"], 0, 1), both[judge]))
    for index in range(made % config.layers):
        both = _behind(config, layers, index, both)
    # Compiled apart from the first call: the compiler's memory is given back before the steps need theirs.
    begin, descend = programs(config, steps, layers["mlp"])
    begun = begin.lower(layers["mlp"], 0).compile().out_info
    descend = descend.lower(outer, layers, 0, both[0], key, begun).compile()
    memory.return_scraps()
    for step in range(made, sweeps * config.layers, steps.blocks):
        number, first = divmod(step, config.layers)
        if step > made and not first:
            both = _entering(config, outer, tokens, final)
        descent = begin(layers["mlp"], first)
        for part in range(steps.blocks):
            if watch and steps.blocks > 1:
                watch(part, steps.blocks)
            descent = jax.block_until_ready(
                descend(outer, layers, first, both[0], jax.random.fold_in(key, step), descent)
            )
        mlps = _settled(descent.mlps, layers["mlp"])
        del descent
        before, now = float(best), divergence(config, outer, layers, first, mlps, both[judge])
        taken, together = bool(now < best), range(first, first + steps.blocks)  # not if nan
        if taken:
            best = now
            for index in together:
                layers = layers | {"mlp": put(layers["mlp"], index, at(mlps, index - first))}
        del mlps
        for index in together:
            yield at(layers, index), Swept(number, index, before, float(now), taken)
        for index in together if together.stop < config.layers else ():
            both = _behind(config, layers, index, both)


def _entering(
    config: DecoderConfig, outer: Params, tokens: tuple[np.ndarray, ...], final: tuple[jax.Array, ...]
) -> list[Streams]:
    """The dense model's last stream beside the pruned one before the first block, of each part of the tokens."""
    pairs = zip(final, tokens, strict=True)
    return [Streams(dense, streams.embed(config, outer, part, dense.dtype)) for dense, part in pairs]


class Descent(NamedTuple):
    """Where the steps on g blocks stand.

    Attributes:
        mlps: Their MLPs [g, ...], float32.
        optimizer: The optimizer's state.
        made: [] steps.
    """

    mlps: Params
    optimizer: Any
    made: jax.Array


def programs(config: DecoderConfig, steps: Steps, mlps: Params) -> tuple[Any, Any]:
    """What begins a descent, and what goes on with it; its state lies on the devices as the weights do.

    Args:
        config: The pruned decoder.
        steps: How hard to try.
        mlps: Of all blocks, stacked [L, ...]; or their shapes.
    """
    begin = functools.partial(_begin, steps)
    lying = jax.tree.map(lambda a: a.sharding, mlps)
    state = jax.eval_shape(begin, mlps, 0).optimizer
    by_weight = optax.tree_map_params(
        relative_optimizer(), lambda _, where: where, state, lying, transform_non_params=lambda _: None
    )
    where = Descent(lying, by_weight, None)  # type: ignore[arg-type]
    descend = functools.partial(_descend, config, steps)
    return jax.jit(begin, out_shardings=where), jax.jit(descend, donate_argnums=5, out_shardings=where)


def _begin(steps: Steps, mlps: Params, first: int) -> Descent:
    start = jax.tree.map(lambda a: a.astype(jnp.float32), some(mlps, first, steps.blocks))
    return Descent(start, jax.vmap(relative_optimizer().init)(start), jnp.int32(0))


@jax.jit
def _settled(mlps: Params, stored: Params) -> Params:
    """In the dtype of the weights, in which they will be judged and written."""
    return jax.tree.map(lambda new, old: new.astype(old.dtype), mlps, stored)


def _descend(
    config: DecoderConfig,
    steps: Steps,
    outer: Params,
    layers: Params,
    first: int,
    fitted: Streams,
    key: jax.Array,
    descent: Descent,
) -> Descent:
    """The MLPs of some blocks after more minibatch steps, the g-th part; they decay to zero, so that all end settled.

    Products are as exact as the device makes them by itself: minibatches are noisier, and what comes of the steps is
    judged at full precision.
    """
    shape = fitted.pruned.shape[:2]
    count, total = math.prod(shape), steps.number * steps.blocks
    sequences = min(steps.sequences, count)
    optimizer = relative_optimizer()
    decay = optax.cosine_decay_schedule(1.0, total)

    def loss(mlps: Params, drawn: Streams, outer: Params, layers: Params, first: int) -> jax.Array:
        last = rest(config, layers, first, mlps, drawn.pruned)
        return token_divergences(config, outer, drawn.dense, last).sum()

    def gradients(drawn: Streams, mlps: Params, *others: Any) -> Params:
        return jax.grad(loss)(mlps, drawn, *others)

    def step(now: Descent, key: jax.Array) -> tuple[Descent, None]:
        places = jnp.unravel_index(jax.random.randint(key, (sequences,), 0, count), shape)
        drawn = in_float32(devices.draw(fitted, places))
        gradient = devices.total(gradients, drawn, now.mlps, outer, layers, first)
        gradient = jax.tree.map(lambda g: g / (sequences * fitted.pruned.shape[2]), gradient)
        updates, state = jax.vmap(optimizer.update)(gradient, now.optimizer, now.mlps)  # each block by its own size
        size = steps.learning_rate * decay(now.made)
        return Descent(jax.tree.map(lambda w, u: w - size * u, now.mlps, updates), state, now.made + 1), None

    keys = jax.lax.dynamic_slice_in_dim(jax.random.split(key, total), descent.made, steps.number)
    return jax.lax.scan(step, descent, keys)[0]


def _behind(config: DecoderConfig, layers: Params, index: int, both: list[Streams]) -> list[Streams]:
    """The streams behind a block; the dense one is the last anyway."""
    return [part._replace(pruned=advance(config, layers, index, part.pruned)) for part in both]
