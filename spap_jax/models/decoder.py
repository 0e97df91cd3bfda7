"""A decoder as pure functions of a parameter tree: embed, blocks, head; with and without a key/value cache.

The tree is described in ``docs/architecture.md``. Arrays under ``layers`` are stacked [L, ...].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from spap_jax.errors import UserError
from spap_jax.models.attention import capped
from spap_jax.models.blocks import Block, Params, attend_within, attention_kind, block, init_blocks, over_blocks
from spap_jax.models.config import DecoderConfig
from spap_jax.models.layers import Norm, affine, on_one_axis

WIDTH_STEP = 64
"""MLP widths are fastest at multiples of this."""

CHANNEL_AXES = {"gate": -1, "up": -1, "down": -2, "gate_bias": -1, "up_bias": -1}
"""Channel axis (f) of each array of an MLP."""


class Embed(nn.Module):
    """Token (and learned position) embedding."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Embeds tokens. tokens, positions: [B, T] -> [B, T, d]."""
        c, init = self.config, nn.initializers.normal(0.02)
        x = self.param("tokens", init, (c.vocabulary, c.embedding))[tokens].astype(dtype)
        if c.embedding != c.width:
            x = affine(x, self.param("project_in", init, (c.embedding, c.width)))
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, dtype)
        if c.position_offset is not None:
            table = self.param("positions", init, (c.axes["p"], c.width))
            x = x + table[positions + c.position_offset].astype(dtype)
        return x


class Head(nn.Module):
    """Final norm and projection to the vocabulary."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array | None) -> jax.Array:
        """Computes float32 logits. x: [B, T, d], embedding: [v, e] if the head is tied, else None -> [B, T, v]."""
        c, init = self.config, nn.initializers.normal(0.02)
        if c.final_norm:
            x = Norm(c, name="norm")(x)
        if c.embedding != c.width:
            x = affine(x, self.param("project_out", init, (c.width, c.embedding)))
        weight = self.param("weight", init, (c.vocabulary, c.embedding)) if embedding is None else embedding
        tokens, weight = on_one_axis(x), weight.astype(x.dtype)
        logits = jnp.einsum("te,ve->tv", tokens, weight, preferred_element_type=jnp.float32)
        logits = capped(logits if c.logit_scale == 1 else logits * c.logit_scale, c.logit_cap)
        return logits.reshape(*x.shape[:-1], -1)


class Decoder(nn.Module):
    """A whole decoder, from token ids to logits; its parameters are the tree of ``docs/architecture.md``.

    Attributes:
        dtype: Data type of matrices and activations; norms, softmax and logits are float32.
        policy: What a block keeps for its backward pass, one of ``jax.checkpoint_policies``; None keeps everything.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    policy: Callable[..., bool] | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None, logits: bool = True) -> jax.Array:
        """Computes logits, or the stream that the head makes them of. tokens: [B, T] -> [B, T, v] or [B, T, d].

        ``valid`` [B, T] is False for padding, which is neither attended to nor counted in positions; None without.
        """
        c = self.config
        positions = positions_in(tokens.shape) if valid is None else token_positions(valid)
        embed = Embed(c, name="embed")
        x = embed(tokens, positions, self.dtype)
        checkpoint = functools.partial(jax.checkpoint, policy=self.policy) if self.policy else lambda function: function

        def step(config: DecoderConfig, x: jax.Array, layer: Params, number: jax.Array) -> jax.Array:
            return block(config, layer, x, positions, valid, attention_kind(config, number))

        layers = self.param("layers", functools.partial(init_blocks, c))
        x = over_blocks(c, step, x, {}, layers, checkpoint=checkpoint)
        if not logits:
            return x
        tied = embed.variables["params"]["tokens"] if c.tied else None
        return Head(c, name="head")(x, tied)


def map_named(change: Callable[..., Any], tree: Params, *others: Params) -> Params:
    """Maps a function of a name ("attention/q") and its arrays over trees; ``jax.tree.map`` does so without names."""

    def one(path: Any, *arrays: Any) -> Any:
        return change(jax.tree_util.keystr(path, simple=True, separator="/"), *arrays)

    return jax.tree.map_with_path(one, tree, *others)


@functools.lru_cache(maxsize=256)
def shapes(config: DecoderConfig) -> Params:
    """Returns what `init` returns, as ``jax.ShapeDtypeStruct``; it is shared, so do not change it."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Initialises random parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, config.width))
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    embed_params = Embed(config).init(embed_key, tokens, tokens, jnp.float32)["params"]
    tied = embed_params["tokens"] if config.tied else None
    head_params = Head(config).init(head_key, x, tied).get("params", {})
    return {"embed": embed_params, "layers": init_blocks(config, layers_key), "head": head_params}


def positions_in(shape: tuple[int, ...]) -> jax.Array:
    """Computes each token's position where there is no padding, as int32 of a shape [B, T]."""
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)


def token_positions(valid: jax.Array) -> jax.Array:
    """Computes each token's position, not counting padding before it. valid: [B, T] -> [B, T] int32."""
    return jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0).astype(jnp.int32)


def embed(config: DecoderConfig, params: Params, tokens: jax.Array, positions: jax.Array, dtype) -> Any:
    """Computes the residual stream before the first block. tokens, positions: [B, T] -> [B, T, d]."""
    return Embed(config).apply({"params": params["embed"]}, tokens, positions, dtype)


def head(config: DecoderConfig, params: Params, x: jax.Array) -> Any:
    """Computes logits from the stream after the last block. x: [B, T, d] -> [B, T, v]."""
    tied = params["embed"]["tokens"] if config.tied else None
    return Head(config).apply({"params": params["head"]}, x, tied)


def forward(
    config: DecoderConfig, params: Params, tokens: jax.Array, valid: jax.Array | None, dtype=jnp.float32
) -> jax.Array:
    """Computes logits by a `Decoder`. tokens: [B, T], valid: [B, T], or None without padding -> [B, T, v]."""
    return Decoder(config, dtype).apply({"params": params}, tokens, valid)  # type: ignore[return-value]


def last_stream(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Computes the stream after the last block in float32, without gradients. tokens: [B, T] -> [B, T, d]."""
    positions = positions_in(tokens.shape)

    def step(config: DecoderConfig, x: jax.Array, layer: Params, number: jax.Array) -> jax.Array:
        return block(config, layer, x, positions, None, attention_kind(config, number))

    x = embed(config, params, tokens, positions, jnp.float32)
    return over_blocks(config, step, x, params["layers"])


def check_length(config: DecoderConfig, length: int) -> None:
    """Raises UserError if sequences are longer than the model's positions."""
    if length > config.positions:
        raise UserError(
            f"sequences of {length} tokens do not fit the model's {config.positions} positions; "
            f"use a sequence length of at most {config.positions}."
        )


class Cache(NamedTuple):
    """Keys and values of past tokens: [L, B, m, S, h]; valid: [B, S]; length: tokens stored, including padding.

    The length of an empty cache is the Python integer 0, not an array, so that prefill skips the unused slots.
    """

    keys: jax.Array
    values: jax.Array
    valid: jax.Array
    length: jax.Array | int


def empty_cache(config: DecoderConfig, batch: int, size: int, dtype=jnp.float32) -> Cache:
    """Creates a cache with room for ``size`` tokens of ``batch`` sequences."""
    shape = (config.layers, batch, config.kv_heads, size, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, size), bool), 0)


def extend(
    config: DecoderConfig, params: Params, tokens: jax.Array, valid: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Appends tokens to the cache. tokens, valid: [B, T] -> logits of the last token [B, v], and the updated cache."""
    seen = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, cache.length, axis=1)
    before = cache.valid.sum(axis=1, keepdims=True)
    positions = jnp.maximum(before + jnp.cumsum(valid, axis=-1) - 1, 0).astype(jnp.int32)
    x = embed(config, params, tokens, positions, cache.keys.dtype)

    def step(config: DecoderConfig, carry: Any, layer: Params, number: Any) -> Any:
        x, keys, values = carry
        kind = attention_kind(config, number)
        q, k, v = block(config, layer, x, positions, kind, method=Block.queries_keys_values)
        # The cache is part of the carry, to be updated in place; as scanned inputs and outputs it would be copied.
        place = [jnp.int32(at) for at in (number, 0, 0, cache.length, 0)]
        keys = jax.lax.dynamic_update_slice(keys, k[None], place)
        values = jax.lax.dynamic_update_slice(values, v[None], place)
        attended = attend_within(config, q, keys[number], values[number], seen, cache.length, kind)
        r = block(config, layer, x, attended, method=Block.add_attention)
        return block(config, layer, r, method=Block.feed_forward), keys, values

    x, keys, values = over_blocks(config, step, (x, cache.keys, cache.values), params["layers"])
    logits = head(config, params, x[:, -1:])[:, 0]
    return logits, Cache(keys, values, seen, jnp.int32(cache.length + tokens.shape[1]))


def unstacked(
    config: DecoderConfig, params: Params, place: Callable[[DecoderConfig, Params], Params] = lambda _, params: params
) -> tuple[DecoderConfig, Params]:
    """Unstacks the layers of a decoder for speed, and pads MLP widths with zeros to multiples of ``WIDTH_STEP``.

    XLA:CPU copies each layer's weights out of a stack before it multiplies by them; unstacked weights are read in
    place, but compile time grows with depth.

    Args:
        params: Arrays, or values that are read lazily, a layer at a time.
        place: Places parameters on devices: those of one layer, or those outside the layers.

    Returns:
        The padded config, and parameters with ``layers`` as a tuple of trees at their own widths; see ``extend``.
    """
    widths = [-(-width // WIDTH_STEP) * WIDTH_STEP for width in config.layer_widths]
    layers = []
    for index, width in enumerate(widths):
        layer = jax.tree.map(lambda stack, index=index: stack[index], params["layers"])
        mlp = with_channels(jax.tree.map(jnp.asarray, layer["mlp"]), width)
        layers.append(place(config, layer | {"mlp": mlp}))
    outer = place(config, {name: params[name] for name in ("embed", "head")})
    return config.with_widths(widths), outer | {"layers": tuple(layers)}


def with_channels(mlp: Params, width: int) -> Params:
    """Truncates or zero-pads one layer's MLP to ``width`` channels; zero channels do not change the output."""

    def one(array: jax.Array, axis: int) -> jax.Array:
        more = [(0, max(0, width - array.shape[axis]) if side == axis else 0) for side in range(-array.ndim, 0)]
        return jnp.pad(jax.lax.slice_in_dim(array, 0, min(width, array.shape[axis]), axis=axis), more)

    if mlp["down"].shape[CHANNEL_AXES["down"]] == width:
        return mlp
    return {name: one(array, CHANNEL_AXES[name]) if name in CHANNEL_AXES else array for name, array in mlp.items()}
