"""A pruned model as a stack of blocks, and the divergence of its predictions from the dense model's.

Of the dense model only its last stream is needed. One block may use another MLP than that in the stack.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spap_jax.models import DecoderConfig, Params, decoder
from spap_jax.models.blocks import get_layer, over_blocks
from spap_jax.models.loss import Predictor, Target, loss_sum
from spap_jax.numerics import forward_precision, in_float32, sliced, to_slice
from spap_jax.parallel import collectives
from spap_jax.parallel.placement import param_spec, zeros_for_blocks
from spap_jax.parallel.program import program
from spap_jax.parallel.sequences import Sequences
from spap_jax.pruning import streams
from spap_jax.pruning.run import Dense
from spap_jax.pruning.streams import Streams


@program(static_argnames="config")
@forward_precision
def divergence(
    config: DecoderConfig, outer: Params, layers: Params, first: int, mlp: Params, chunks: Streams
) -> jax.Array:
    """Computes the mean KL(dense || pruned) in nats per token, with ``mlp`` in block ``first``, where chunks enter."""
    return _mean(config, outer, layers, chunks, functools.partial(rest, config, first=first), mlp)


@program(static_argnames="config")
@forward_precision
def divergence_of_blocks(
    config: DecoderConfig, outer: Params, layers: Params, stays: jax.Array, chunks: Streams
) -> jax.Array:
    """Computes the mean KL(dense || pruned) in nats per token, of the blocks that stay, [L] bool; embeddings enter."""

    def through(layers: Params, x: jax.Array, stays: jax.Array) -> jax.Array:
        def step(config: DecoderConfig, x: jax.Array, layer: Params, index: jax.Array) -> jax.Array:
            return jax.lax.cond(stays[index], lambda x: _apply(config, x, layer, index), lambda x: x, x)

        return over_blocks(config, step, x, layers)

    return _mean(config, outer, layers, chunks, through, stays)


def _mean(
    config: DecoderConfig,
    outer: Params,
    layers: Params,
    chunks: Streams,
    through: Callable[..., jax.Array],
    *changes: Any,
) -> jax.Array:
    """Computes the mean KL, where ``through`` advances a stream [B, T, d] to the end, from layers and changes."""

    def sums(own: Streams, outer: Params, layers: Params, *changes: Any) -> jax.Array:
        def add(total: jax.Array, chunk: Streams) -> tuple[jax.Array, None]:
            chunk = in_float32(chunk)
            last = through(layers, chunk.pruned, *changes)
            counts = jnp.ones(last.shape[:-1]) if chunk.weights is None else chunk.weights > 0
            text = jnp.zeros(last.shape[:-1], jnp.int32)  # of which nothing is wanted
            predictor = Predictor(config, outer)
            return total + loss_sum(predictor, last, text, counts, Target(predictor, chunk.dense)), None

        return jax.lax.scan(add, jnp.float32(0), own)[0]

    total = collectives.psum_over_chunks(sums, chunks, outer, to_slice(layers), *changes)
    return total / streams.fitting_tokens(chunks).real


take_layer = program(get_layer)


def stacked_blocks(dense: Dense) -> Params:
    """Returns the blocks of a dense model on the devices, stacked [L, ...]."""
    blocks: Params | None = None
    for index, layer in dense.blocks():
        blocks = set_layer(
            zeros_for_blocks(dense.config, layer, param_spec) if blocks is None else blocks, index, layer
        )
    assert blocks is not None
    return blocks


def start(config: DecoderConfig, outer: Params, layers: Params, sequences: Sequences) -> Streams:
    """Embeds sequences as the pruned stream, beside the last stream of the dense model."""
    last, entering = streams.start(config, outer, sequences).dense, streams.start(config, outer, sequences)
    for index in range(config.layers):
        last = advance(config, layers, index, last)
    return entering._replace(dense=last)


@program(donate_argnames="stack")
def set_layer(stack: Params, index: int, layer: Params) -> Params:
    """Stores one layer at ``index`` of a stack [L, ...], which is updated in place."""
    return jax.tree.map(lambda all_layers, new: all_layers.at[index].set(new), stack, layer)


@program(static_argnames="config", donate_argnames="pruned")
@forward_precision
def advance(config: DecoderConfig, layers: Params, index: int, pruned: jax.Array) -> jax.Array:
    """Advances a stream [C, B, T, d] past block ``index`` of the stack."""
    layer = get_layer(layers, index)
    return streams.in_place(lambda x: _apply(config, x, layer, index), pruned)


def rest(config: DecoderConfig, layers: Params, x: jax.Array, mlp: Params, first: int | jax.Array) -> jax.Array:
    """Advances a stream [B, T, d] from block ``first``, with ``mlp`` in it, past the last block."""
    x = _apply(config, x, sliced(get_layer(layers, first)) | {"mlp": mlp}, first)
    return over_blocks(config, _apply, x, layers, first=jnp.asarray(first) + 1)


def _apply(config: DecoderConfig, x: jax.Array, layer: Params, index: int | jax.Array) -> jax.Array:
    """Applies the block with a number. x: [B, T, d] -> [B, T, d]."""
    return decoder.block(config, layer, x, *streams.causal(x), decoder.attention_kind(config, index))
