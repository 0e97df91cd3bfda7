"""The two residual streams that pruning carries through the blocks, and the programs that advance them past one block.

The dense stream is computed by the unpruned model, the pruned stream by the already pruned blocks from the same tokens.
Both are chunks of sequences [C, B, T, d], updated in place one chunk at a time, so that the activations inside a block
are never held for more than one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.models import Block, DecoderConfig, Params, decoder
from spap_jax.numerics import forward_precision, in_bfloat16
from spap_jax.parallel import collectives, mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.parallel.program import program
from spap_jax.parallel.sequences import Sequences
from spap_jax.solver.alternating import Tokens

NORM_EPS = 1e-6
"""Epsilon of the norms of published models, so that a token without output does not count infinitely."""


class Streams(NamedTuple):
    """Chunks of residual streams, in float32.

    Attributes:
        dense: [C, B, T, d]; between attention and MLP, the dense block's final sum before its closing norm.
        pruned: [C, B, T, d]; between attention and MLP, the stream before the MLP's residual addition.
        output: [C, B, T, d]; the desired output of attention or MLP, which is fitted next; None if that is the
            difference of the streams.
        weights: [C, B, T] weights of the tokens in that fit, 0 for padding; None if all are 1.
    """

    dense: jax.Array
    pruned: jax.Array
    output: jax.Array | None = None
    weights: jax.Array | None = None


Pair = tuple[Streams, Streams]
"""The streams of the fitted and of the held-out sequences; of the latter there may be none."""


def start(config: DecoderConfig, params: Params, sequences: Sequences) -> Streams:
    """Embeds sequences; both streams start equal."""
    counted = sequences.counted
    if counted is None and "output" in config.norms:
        counted = mesh.shard_chunks(np.ones(sequences.tokens.shape, np.float32))
    embed = shard_params(config, {"embed": params["embed"]})
    return _start(config, embed, mesh.shard_chunks(sequences.tokens), counted)


@program(static_argnames="config")
@forward_precision
def _start(config: DecoderConfig, params: Params, chunks: jax.Array, counted: jax.Array | None) -> Streams:
    positions = decoder.positions_in(chunks.shape[1:])

    def every(own: jax.Array, params: Params) -> jax.Array:
        return jax.lax.map(lambda t: decoder.embed(config, params, t, positions, jnp.float32), own)

    x = collectives.map_chunks(every, chunks, params) if len(chunks) else every(chunks, params)
    return both_at(config, x, counted)


@program(static_argnames="config")
def both_at(config: DecoderConfig, x: jax.Array, counted: jax.Array | None) -> Streams:
    """Returns two copies of x, [C, B, T, d], as streams, with room for a desired output if a norm follows outputs.

    ``counted`` [C, B, T] are weights of the tokens, which are needed for such a norm.
    """
    output = jnp.zeros_like(x) if "output" in config.norms else None
    return Streams(jnp.copy(x), jnp.copy(x), output, None if counted is None else jnp.copy(counted))


@program
def rounded(stream: jax.Array) -> jax.Array:
    """Rounds a stream to bfloat16, stored as its bits."""
    return in_bfloat16(stream)


def both(program: Callable[..., Streams], config: DecoderConfig, layer: Params, pair: Pair) -> Pair:
    """Advances the streams of the fitted and of the held-out sequences by one of the programs below."""
    return program(config, layer, pair[0]), program(config, layer, pair[1])


def _program(one: Callable[[DecoderConfig, Params, Streams], Streams]) -> Any:
    """Makes a program of a function of one chunk: it passes all chunks of streams through a block, in place."""

    @functools.wraps(one)
    def every(config: DecoderConfig, layer: Params, chunk: Streams) -> Streams:
        return in_place(functools.partial(one, config, layer), chunk)

    return program(static_argnames="config", donate_argnames="chunk")(forward_precision(every))


@_program
def enter_mlp(config: DecoderConfig, layer: Params, chunk: Streams) -> Streams:
    """Advances both streams past a dense block's attention, and the dense stream past its MLP too."""
    piece = functools.partial(decoder.block, config, layer)
    r = piece(chunk.dense, *causal(chunk.dense), method=Block.attend)
    y = piece(r, method=mlp_output)
    full = r + piece(y, method=Block.mlp_addition)
    pruned = piece(chunk.pruned, *causal(chunk.pruned), method=Block.attend)
    return _aimed(chunk, Streams(full, pruned, y))


@_program
def enter_attention(config: DecoderConfig, layer: Params, chunk: Streams) -> Streams:
    """Advances the dense stream past a dense block's attention; the pruned stream stays before it."""
    piece = functools.partial(decoder.block, config, layer)
    heads = piece(chunk.dense, *causal(chunk.dense), method=Block.attended)
    after = piece(chunk.dense, heads, method=Block.add_attention)
    y = piece(heads, method=lambda block, x: block.attention.project_out(x))
    return _aimed(chunk, Streams(after, chunk.pruned, y))


@_program
def leave_attention(config: DecoderConfig, layer: Params, chunk: Streams) -> Streams:
    """Advances both streams from after ``enter_attention`` to the state after ``enter_mlp``; the MLP is still dense.

    ``config`` and ``layer`` are the decoder's and the block's with fewer heads and the dense MLP.
    """
    piece = functools.partial(decoder.block, config, layer)
    pruned = piece(chunk.pruned, *causal(chunk.pruned), method=Block.attend)
    y = piece(chunk.dense, method=mlp_output)
    return _aimed(chunk, Streams(chunk.dense + piece(y, method=Block.mlp_addition), pruned, y))


@_program
def leave_mlp(config: DecoderConfig, layer: Params, chunk: Streams) -> Streams:
    """Advances the pruned stream past the pruned MLP of ``layer``, and both streams past the closing norm."""
    piece = functools.partial(decoder.block, config, layer)
    y = piece(chunk.pruned, method=mlp_output)
    ends = (chunk.dense, chunk.pruned + piece(y, method=Block.mlp_addition))
    dense, pruned = (piece(stream, method=Block.finish) for stream in ends)
    return chunk._replace(dense=dense, pruned=pruned)


@_program
def pass_dropped(config: DecoderConfig, layer: Params, chunk: Streams) -> Streams:
    """Advances the dense stream past a block that is dropped; the pruned stream stays."""
    return chunk._replace(dense=decoder.block(config, layer, chunk.dense, *causal(chunk.dense)))


def fitting_tokens(streams: Streams) -> Tokens:
    """Returns the inputs and targets for fitting the next half of a block: attention, or the MLP after attention.

    Without a desired output, the target is the dense stream after that half minus the pruned stream before it, so that
    each half also corrects the errors of the previous ones.
    """
    return Tokens(streams.pruned, streams.dense, streams.output, streams.weights)


def _aimed(chunk: Streams, now: Streams) -> Streams:
    """Adds the desired output to a chunk with room for one: that before the norm, with errors relative to it."""
    if chunk.output is None or chunk.weights is None or now.output is None:
        return now._replace(output=None, weights=chunk.weights)
    size = jnp.square(now.output).mean(axis=-1)
    return now._replace(weights=jnp.where(chunk.weights > 0, jax.lax.rsqrt(size + NORM_EPS), 0))


def mlp_output(block: Block, r: jax.Array) -> jax.Array:
    """Computes the output of a block's MLP, before a norm that may follow it. r: [..., d] -> [..., d]."""
    return block.mlp.project(mlp_hidden(block, r))


def attended(block: Block, x: jax.Array) -> jax.Array:
    """Computes the input of the attention's output projection, heads concatenated. x: [B, T, d] -> [B, T, n h]."""
    out = block.attended(x, *causal(x))
    return out.reshape(*x.shape[:2], -1)


def causal(x: jax.Array) -> tuple[jax.Array, None]:
    """Returns the token positions [B, T] and the mask of a stream without padding: none."""
    return decoder.positions_in(x.shape[:2]), None


def mlp_hidden(block: Block, r: jax.Array) -> jax.Array:
    """Computes the hidden channels of a block's MLP. r: [..., d] -> [..., f]."""
    return block.mlp.hidden(block.mlp_input(r))


def in_place(one: Callable[[Any], Any], chunks: Any) -> Any:
    """Maps over the leading axis and overwrites each argument with its result; a scan would hold both in memory."""

    def step(i: jax.Array, chunks: Any) -> Any:
        done = one(jax.tree.map(lambda a: a[i], chunks))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), chunks, done)

    def every(own: Any) -> Any:
        return jax.lax.fori_loop(0, len(jax.tree.leaves(own)[0]), step, own)

    return collectives.map_chunks(every, chunks) if len(jax.tree.leaves(chunks)[0]) else chunks
