"""The two residual streams that pruning carries through the blocks, and the steps that advance them past one block.

The dense stream is computed by the unpruned model, the pruned stream by the already pruned blocks from the same
tokens. Both are chunks of sequences [C, B, T, d], updated in place one chunk at a time, so that the activations inside
a block are never held for more than one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import devices
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Block, Params
from spap_jax.numerics import full_precision, in_float32, storage, stored
from spap_jax.placement import placed
from spap_jax.solver.alternating import Tokens, squares

FLOAT32 = storage("float32")


class Streams(NamedTuple):
    """Chunks of residual streams, in float32 or in the format of ``numerics.stored``.

    Attributes:
        dense: [C, B, T, d]; between attention and MLP, the dense block's final sum before its closing norm.
        pruned: [C, B, T, d]; between attention and MLP, the stream before the MLP's residual addition.
        output: [C, B, T, d]; the output of the dense half that is fitted next, attention or MLP, before the norm that
            follows it. None in families that add the output as it is.
    """

    dense: jax.Array
    pruned: jax.Array
    output: jax.Array | None = None


def split(count: int, held_out: float, most: int, shares: int = 1) -> tuple[int, int]:
    """Returns how many of ``count`` sequences to fit on, and the chunk size, at most ``most``.

    The rest is held out, including sequences that would leave the last chunk incomplete, or give one of the ``shares``
    fewer chunks than another.
    """
    if held_out <= 0 or count == 1:
        return count, largest_divisor(count // shares if count % shares == 0 else count, most)
    fitted = count - min(count - 1, max(1, round(held_out * count)))
    shares = min(shares, fitted)
    most = min(most, fitted // shares)
    # The largest chunk size is not always best: 63 of 128 sequences could be left over.
    chunk = min(range(most, (most - 1) // 2, -1), key=lambda size: fitted % (size * shares))
    return fitted - fitted % (chunk * shares), chunk


def largest_divisor(count: int, most: int) -> int:
    """Returns the largest divisor of ``count`` that is at most ``most``."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


def start(config: DecoderConfig, params: Params, chunks: np.ndarray, dtype: np.dtype = FLOAT32) -> Streams:
    """Embeds token chunks [C, B, T]; both streams start equal, and are stored in ``dtype``."""
    return both_at(config, embed(config, params, chunks, dtype))


def both_at(config: DecoderConfig, x: jax.Array) -> Streams:
    """Returns two streams that both start at x, [C, B, T, d]: itself and a copy."""
    return Streams(x, jnp.copy(x), jnp.zeros_like(x) if "output" in config.norms else None)


def chunked(tokens: np.ndarray, chunk: int) -> np.ndarray:
    """Splits token blocks [B, T] into chunks [C, B, T]; C may be 0."""
    return tokens.reshape(-1, chunk, tokens.shape[-1]) if len(tokens) else tokens.reshape(0, 1, tokens.shape[-1])


def embed(config: DecoderConfig, params: Params, chunks: np.ndarray, dtype: np.dtype = FLOAT32) -> jax.Array:
    """Computes the stream before the first block from token chunks. [C, B, T] -> [C, B, T, d]."""
    return _embed(config, placed(config, {"embed": params["embed"]}), devices.spread(chunks), dtype)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
@full_precision
def _embed(config: DecoderConfig, params: Params, chunks: jax.Array, dtype: np.dtype) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(chunks.shape[-1])[None, :], chunks.shape[1:])

    def every(own: jax.Array, params: Params) -> jax.Array:
        return jax.lax.map(lambda t: stored(decoder.embed(config, params, t, positions, jnp.float32), dtype), own)

    return devices.apart(every, chunks, params) if len(chunks) else every(chunks, params)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="streams")
@full_precision
def enter_mlp(config: DecoderConfig, layer: Params, streams: Streams) -> Streams:
    """Advances both streams past a dense block's attention, and the dense stream past its MLP too."""
    piece = functools.partial(decoder.block, config, layer)

    def one(chunk: Streams) -> Streams:
        r = piece(chunk.dense, *causal(chunk.dense), method=Block.attend)
        y = piece(r, method=mlp_output)
        full = r + piece(y, method=Block.mlp_addition)
        return _kept(chunk, full, piece(chunk.pruned, *causal(chunk.pruned), method=Block.attend), y)

    return in_place(one, streams)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="streams")
@full_precision
def enter_dense_mlp(config: DecoderConfig, layer: Params, streams: Streams) -> Streams:
    """Computes the result of ``enter_mlp`` before any block is pruned, from the dense stream alone."""
    piece = functools.partial(decoder.block, config, layer)

    def one(chunk: Streams) -> Streams:
        r = piece(chunk.dense, *causal(chunk.dense), method=Block.attend)
        y = piece(r, method=mlp_output)
        return _kept(chunk, r + piece(y, method=Block.mlp_addition), r, y)

    return in_place(one, streams)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="streams")
@full_precision
def leave_dense_mlp(config: DecoderConfig, layer: Params, streams: Streams) -> Streams:
    """Applies the block's closing norm to the dense stream; the other stream is meaningless afterwards."""
    finish = functools.partial(decoder.block, config, layer, method=Block.finish)
    return in_place(lambda chunk: chunk._replace(dense=finish(chunk.dense)), streams)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="streams")
@full_precision
def enter_attention(config: DecoderConfig, layer: Params, streams: Streams) -> Streams:
    """Advances the dense stream past a dense block's attention; the pruned stream stays before it."""
    piece = functools.partial(decoder.block, config, layer)

    def one(chunk: Streams) -> Streams:
        heads = piece(chunk.dense, *causal(chunk.dense), method=Block.attended)
        after = piece(chunk.dense, heads, method=Block.add_attention)
        return _kept(chunk, after, chunk.pruned, piece(heads, method=lambda block, x: block.attention.project_out(x)))

    return in_place(one, streams)


@functools.partial(jax.jit, static_argnames="narrow", donate_argnames="streams")
@full_precision
def leave_attention(narrow: DecoderConfig, layer: Params, streams: Streams) -> Streams:
    """Advances both streams from after ``enter_attention`` to the state after ``enter_mlp``; the MLP is still dense.

    Args:
        narrow: The decoder with fewer heads and the dense MLP.
        layer: Parameters of the block with fewer heads and the dense MLP.
        streams: The dense stream after attention, and the pruned stream before it.
    """
    piece = functools.partial(decoder.block, narrow, layer)

    def one(chunk: Streams) -> Streams:
        pruned = piece(chunk.pruned, *causal(chunk.pruned), method=Block.attend)
        y = piece(chunk.dense, method=mlp_output)
        return _kept(chunk, chunk.dense + piece(y, method=Block.mlp_addition), pruned, y)

    return in_place(one, streams)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="streams")
@full_precision
def leave_mlp(config: DecoderConfig, layer: Params, streams: Streams) -> tuple[Streams, jax.Array]:
    """Finishes the block: advances the pruned stream past the pruned MLP of ``layer``, and both past the closing norm.

    Returns:
        The streams after the block, and the relative error [] of the pruned MLP's output; nan if there are no tokens.
    """
    piece = functools.partial(decoder.block, config, layer)

    def one(item: tuple[Streams, jax.Array]) -> tuple[Streams, jax.Array]:
        chunk, _ = item
        y = piece(chunk.pruned, method=mlp_output)
        ends = (chunk.dense, chunk.pruned + piece(y, method=Block.mlp_addition))
        dense, pruned = (piece(stream, method=Block.finish) for stream in ends)
        return chunk._replace(dense=dense, pruned=pruned), squares(fitting_tokens(chunk), y)

    streams, sums = in_place(one, (streams, jnp.zeros((len(streams.dense), 2))))
    error, power = sums.sum(axis=0)
    if not len(sums):
        return streams, jnp.float32(jnp.nan)
    return streams, error / jnp.maximum(power, jnp.finfo(jnp.float32).tiny)


def fitting_tokens(streams: Streams) -> Tokens:
    """Returns the inputs and targets for fitting the next half of a block: attention, or the MLP after attention.

    The target is the dense stream after that half minus the pruned stream before it, so that each half also corrects
    the errors of the previous ones. If a norm follows the half's output, the target is the dense half's output.
    """
    return Tokens(streams.pruned, streams.dense, streams.output)


def _kept(chunk: Streams, dense: jax.Array, pruned: jax.Array, output: jax.Array) -> Streams:
    """Returns the streams of a chunk, with the output if the chunk has room for it."""
    return Streams(dense, pruned, None if chunk.output is None else output)


def mlp_output(block: Block, r: jax.Array) -> jax.Array:
    """Computes the output of a block's MLP, before a norm that may follow it. r: [..., d] -> [..., d]."""
    return block.mlp.project(mlp_hidden(block, r))


def attended(block: Block, x: jax.Array) -> jax.Array:
    """Computes the input of the attention's output projection, heads concatenated. x: [B, T, d] -> [B, T, n h]."""
    out = block.attended(x, *causal(x))
    return out.reshape(*x.shape[:2], -1)


def causal(x: jax.Array) -> tuple[jax.Array, None]:
    """Returns the token positions [B, T] and the mask of a stream without padding: none."""
    return jnp.broadcast_to(jnp.arange(x.shape[1])[None, :], x.shape[:2]), None


def mlp_hidden(block: Block, r: jax.Array) -> jax.Array:
    """Computes the hidden channels of a block's MLP. r: [..., d] -> [..., f]."""
    return block.mlp.hidden(block.mlp_input(r))


def in_place(one: Callable[[Any], Any], chunks: Any) -> Any:
    """Maps over the leading axis and overwrites each argument with its result; a scan would hold both in memory.

    ``one`` computes in float32, regardless of the storage dtype.
    """

    def step(i: jax.Array, chunks: Any) -> Any:
        done = one(in_float32(jax.tree.map(lambda a: a[i], chunks)))
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, stored(b, a.dtype), i, 0), chunks, done)

    def every(own: Any) -> Any:
        return jax.lax.fori_loop(0, len(jax.tree.leaves(own)[0]), step, own)

    return devices.apart(every, chunks) if len(jax.tree.leaves(chunks)[0]) else chunks
