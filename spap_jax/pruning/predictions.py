"""A pruned model as a stack of blocks, and the divergence of its predictions from the dense model's.

Of the dense model only its last stream is needed. Some consecutive blocks may use other MLPs than those in the stack:
candidates, or MLPs being adjusted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import devices
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Block, Params
from spap_jax.numerics import full_precision, in_float32
from spap_jax.pruning import streams
from spap_jax.pruning.streams import Streams

MLP_TOKENS = 512
"""Tokens that pass through an MLP at once: enough to keep a device busy, few enough to limit memory."""


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def divergence(
    config: DecoderConfig, outer: Params, layers: Params, first: int, mlps: Params, chunks: Streams
) -> jax.Array:
    """Computes the mean KL(dense || pruned) in nats per token, with ``mlps`` [g, ...] in blocks from ``first`` on."""

    def sums(own: Streams, outer: Params, layers: Params, mlps: Params) -> jax.Array:
        def add(total: jax.Array, chunk: Streams) -> tuple[jax.Array, None]:
            chunk = in_float32(chunk)
            last = rest(config, layers, first, mlps, chunk.pruned)
            return total + token_divergences(config, outer, chunk.dense, last).sum(), None

        return jax.lax.scan(add, jnp.float32(0), own)[0]

    total = devices.total(sums, chunks, outer, layers, mlps)
    return total / np.prod(chunks.pruned.shape[:3])


def room(layer: Params, count: int) -> Params:
    """Allocates a stack of zeros for ``count`` layers with the shapes of ``layer``."""
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype, device=devices.stacked(a)), layer)


@functools.partial(jax.jit, donate_argnames="stack")
def put(stack: Params, index: int, layer: Params) -> Params:
    """Stores one layer at ``index`` of a stack [L, ...], which is updated in place."""
    return jax.tree.map(lambda all_layers, new: all_layers.at[index].set(new), stack, layer)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="pruned")
@full_precision
def advance(config: DecoderConfig, layers: Params, index: int, pruned: jax.Array) -> jax.Array:
    """Advances a stream [C, B, T, d] past block ``index`` of the stack."""
    block = at(layers, index)
    return streams.in_place(lambda x: apply(config, block, x), pruned)


def rest(config: DecoderConfig, layers: Params, first: int | jax.Array, mlps: Params, x: jax.Array) -> jax.Array:
    """Advances a stream from block ``first`` past the last block, with ``mlps`` [g, ...] in blocks from ``first`` on.

    One program serves every value of ``first``: earlier blocks are skipped. Gradients store only the stream between
    blocks and recompute the inside of each, except of the first block, whose input needs no gradient. x: [B, T, d].
    """
    count = len(jax.tree.leaves(mlps)[0])

    @jax.checkpoint
    def own(x: jax.Array, numbered: tuple[jax.Array, Params]) -> tuple[jax.Array, None]:
        number, mlp = numbered
        return apply(config, at(layers, number) | {"mlp": mlp}, x), None

    @jax.checkpoint  # outside of the cond, whose gradient would store a copy of every block's weights
    def after(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        behind = number >= first + count
        return jax.lax.cond(behind, lambda x: apply(config, at(layers, number), x), lambda x: x, x), None

    x = apply(config, at(layers, first) | {"mlp": at(mlps, 0)}, x)
    if count > 1:
        x = jax.lax.scan(own, x, (first + jnp.arange(1, count), jax.tree.map(lambda a: a[1:], mlps)))[0]
    return jax.lax.scan(after, x, jnp.arange(config.layers))[0] if count < config.layers else x


def token_divergences(config: DecoderConfig, outer: Params, dense: jax.Array, pruned: jax.Array) -> jax.Array:
    """Computes KL(dense || pruned) per token from the two streams after the last block. [B, T, d] twice -> [B, T]."""
    wanted, got = (jax.nn.log_softmax(decoder.head(config, outer, x).astype(jnp.float32)) for x in (dense, pruned))
    return (jnp.exp(wanted) * (wanted - got)).sum(axis=-1)


def apply(config: DecoderConfig, layer: Params, x: jax.Array) -> jax.Array:
    """Applies a block; gradients hold the hidden channels of a few tokens at a time. x: [B, T, d] -> [B, T, d]."""
    piece = functools.partial(decoder.block, config, layer)
    r = piece(x, *streams.causal(x), method=Block.attend)
    after = jax.checkpoint(lambda token: piece(token, method=Block.feed_forward))
    return jax.lax.map(after, r.reshape(-1, config.width), batch_size=MLP_TOKENS).reshape(x.shape)


def at(layers: Params, index: int | jax.Array) -> Params:
    """Returns one layer of a stack [L, ...]."""
    return jax.tree.map(lambda stack: stack[index], layers)


def some(layers: Params, first: int | jax.Array, count: int) -> Params:
    """Returns ``count`` layers of a stack [L, ...] from ``first`` on: [count, ...]."""
    return jax.tree.map(lambda stack: jax.lax.dynamic_slice_in_dim(stack, first, count), layers)
