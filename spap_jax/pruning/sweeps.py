"""Sweeps over a pruned model, which adjust its MLPs in turn so that the model's predictions match the dense model's.

The sequential pass fits every block to the dense stream at its own output. The final distribution is what matters, so
sweeps continue the alternating minimisation on it: block coordinate descent on the Kullback-Leibler divergence of the
pruned model's predictions from the dense model's ("Looking past the block" in ``docs/method.md``), one block at a time
or, if memory allows for their gradients, several or all blocks jointly. No labels are used. The new weights are
accepted only if the divergence falls on held-out tokens.
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
    """Optimisation schedule of a sweep.

    Attributes:
        blocks: Number of consecutive blocks that are adjusted together, g; a divisor of the number of blocks.
        number: Minibatch steps per block; g blocks get g times as many.
        sequences: Sequences per step.
        learning_rate: Step size relative to the weights.
    """

    blocks: int
    number: int
    sequences: int
    learning_rate: float


class Start(NamedTuple):
    """Where to resume: the number of steps made, one per block and sweep, and the divergence reached."""

    made: int
    reached: float


class Swept(NamedTuple):
    """Result of a sweep on one block.

    Attributes:
        sweep: Number of the sweep.
        layer: Number of the block.
        before: Divergence before the steps on this block and those adjusted with it, nats per token.
        after: Divergence with the new weights.
        taken: Whether it fell, so that the new weights were accepted.
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
    """Adjusts the MLPs of g blocks at a time, from the first to the last, in each sweep.

    Memory holds the weights of all blocks, the stream at one block and the dense model's last stream.

    Args:
        config: The pruned decoder.
        outer: Its parameters outside the blocks.
        layers: Its blocks, stacked [L, ...]; updated in place, so not to be used afterwards.
        tokens: Calibration and held-out token blocks, each in chunks [C, B, T]; if none are held out (C = 0), the
            calibration tokens are used for evaluation too.
        final: The dense model's stream after its last block for the same tokens, each [C, B, T, d].
        sweeps: Number of sweeps.
        steps: The optimisation schedule.
        key: Random key for the minibatches.
        start: Where an earlier run stopped; its steps are already applied to ``layers``.
        watch: Called between the steps on several blocks, with the number of parts done and the total.

    Yields:
        The parameters of each block in each sweep, and the result of the step, from ``start`` on.
    """
    judge = 1 if tokens[1].size else 0
    both = _entering(config, outer, tokens, final)
    made, best = start or (0, divergence(config, outer, layers, 0, some(layers["mlp"], 0, 1), both[judge]))
    for index in range(made % config.layers):
        both = _behind(config, layers, index, both)
    # Compiled before the first call, so that the compiler's memory is released before the steps need theirs.
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
    """Pairs the dense model's last stream with the pruned one before the first block, for each part of the tokens."""
    pairs = zip(final, tokens, strict=True)
    return [Streams(dense, streams.embed(config, outer, part, dense.dtype)) for dense, part in pairs]


class Descent(NamedTuple):
    """State of the steps on g blocks.

    Attributes:
        mlps: MLPs of the blocks [g, ...], float32.
        optimizer: The optimizer state.
        made: [] number of steps made.
    """

    mlps: Params
    optimizer: Any
    made: jax.Array


def programs(config: DecoderConfig, steps: Steps, mlps: Params) -> tuple[Any, Any]:
    """Builds the programs that begin and continue a descent; its state is sharded over the devices as the weights are.

    Args:
        config: The pruned decoder.
        steps: The optimisation schedule.
        mlps: MLPs of all blocks, stacked [L, ...]; or their shapes.
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
    """Casts MLPs to the dtype of the stored weights, in which they will be evaluated and written."""
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
    """Runs the next of g parts of the minibatch steps on g blocks; the step size decays to zero over all parts.

    Matrix products use the device's default precision: minibatches are noisier than that, and the result of the steps
    is evaluated at full precision.
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
        updates, state = jax.vmap(optimizer.update)(gradient, now.optimizer, now.mlps)  # scaled per block
        size = steps.learning_rate * decay(now.made)
        return Descent(jax.tree.map(lambda w, u: w - size * u, now.mlps, updates), state, now.made + 1), None

    keys = jax.lax.dynamic_slice_in_dim(jax.random.split(key, total), descent.made, steps.number)
    return jax.lax.scan(step, descent, keys)[0]


def _behind(config: DecoderConfig, layers: Params, index: int, both: list[Streams]) -> list[Streams]:
    """Advances the pruned streams past a block; the dense ones are already the last."""
    return [part._replace(pruned=advance(config, layers, index, part.pruned)) for part in both]
