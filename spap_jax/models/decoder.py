"""A decoder as pure functions of a parameter tree: embed, blocks, head; with and without a key/value cache.

The tree is described in ``docs/architecture.md``. Arrays under ``layers`` are stacked [L, ...] and scanned, so compile
time does not grow with depth.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from spap_jax.models.attention import causal_attention
from spap_jax.models.config import DecoderConfig
from spap_jax.models.layers import Attention, Mlp, Norm, affine, on_one_axis

Params = dict
"""Parameters as a nested dict of arrays."""

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


class Block(nn.Module):
    """Attention and MLP with their residual additions, as separate methods: pruning reads the stream between them."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the norms, attention and the MLP."""
        if self.config.norms != ("output",):
            self.attention_norm = Norm(self.config)
            self.mlp_norm = Norm(self.config)
        if "output" in self.config.norms:
            self.attention_output_norm = Norm(self.config)
            self.mlp_output_norm = Norm(self.config)
        self.attention = Attention(self.config)
        self.mlp = Mlp(self.config)

    def queries_keys_values(
        self, x: jax.Array, positions: jax.Array, kind: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes queries, keys and values. x: [B, T, d] -> q [B, T, n, h], k and v [B, m, T, h].

        ``kind`` is the index of the layer's reach, if the config has several (see `reach_of`).
        """
        return self.attention.project_in(self.attention_norm(x) if "input" in self.config.norms else x, positions, kind)

    def attended(
        self, x: jax.Array, positions: jax.Array, valid: jax.Array | None, kind: jax.Array | None = None
    ) -> jax.Array:
        """Computes the input of the attention's output projection; see `__call__`. x: [B, T, d] -> [B, T, n, h]."""
        return attend_within(self.config, *self.queries_keys_values(x, positions, kind), valid, kind=kind)

    def add_attention(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Projects and adds the attention's output. x: [B, T, d], attended: [B, T, n, h] -> [B, T, d]."""
        y = self.attention.project_out(attended)
        r = x + (self.attention_output_norm(y) if "output" in self.config.norms else y)
        return self.attention_norm(r) if "sum" in self.config.norms else r

    def attend(
        self, x: jax.Array, positions: jax.Array, valid: jax.Array | None, kind: jax.Array | None = None
    ) -> jax.Array:
        """Applies attention and its residual addition; see `__call__`. x: [B, T, d] -> [B, T, d]."""
        return self.add_attention(x, self.attended(x, positions, valid, kind))

    def mlp_input(self, r: jax.Array) -> jax.Array:
        """Computes the MLP's input (X in docs/method.md). r: [..., d] -> [..., d]."""
        return self.mlp_norm(r) if "input" in self.config.norms else r

    def mlp_addition(self, y: jax.Array) -> jax.Array:
        """Computes what is added to the residual stream from the MLP's output. y: [..., d] -> [..., d]."""
        return self.mlp_output_norm(y) if "output" in self.config.norms else y

    def finish(self, y: jax.Array) -> jax.Array:
        """Applies what follows the MLP's residual addition. y: [..., d] -> [..., d]."""
        return self.mlp_norm(y) if "sum" in self.config.norms else y

    def feed_forward(self, r: jax.Array) -> jax.Array:
        """Applies the MLP and its residual addition. r: [..., d] -> [..., d]."""
        return self.finish(r + self.mlp_addition(self.mlp.project(self.mlp.hidden(self.mlp_input(r)))))

    def __call__(
        self, x: jax.Array, positions: jax.Array, valid: jax.Array | None, kind: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block.

        Args:
            x: [B, T, d].
            positions: [B, T].
            valid: [B, T], or None without padding.
            kind: Index of the layer's reach, [], if the config has several (see `reach_of`).

        Returns:
            [B, T, d].
        """
        return self.feed_forward(self.attend(x, positions, valid, kind))


def reach_of(config: DecoderConfig, index: jax.Array | int) -> jax.Array | None:
    """Returns the index of a layer's reach, [], for the blocks of a config with several; otherwise None."""
    return None if config.layer_reaches is None else jnp.asarray(config.layer_reaches, jnp.int32)[index]


def attend_within(
    config: DecoderConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    offset: jax.Array | int = 0,
    kind: jax.Array | None = None,
) -> jax.Array:
    """Computes `causal_attention` within the window of the reach with index ``kind``."""
    size = k.shape[2]
    windows = [None if reach.window is None or reach.window >= size else reach.window for reach in config.reaches]
    if len(set(windows)) == 1:
        return causal_attention(q, k, v, valid, offset, windows[0])
    # Kernels need a window that is known when they are compiled, so each has a branch of its own.
    branches = [functools.partial(causal_attention, offset=offset, window=window) for window in windows]
    return jax.lax.switch(kind, branches, q, k, v, valid)


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
        return logits.reshape(*x.shape[:-1], -1)


class Decoder(nn.Module):
    """A whole decoder, from token ids to logits.

    Its parameters are the tree of ``docs/architecture.md``: blocks are scanned, and their arrays stacked [L, ...].

    Attributes:
        config: Sizes and switches.
        dtype: Data type of matrices and activations; norms, softmax and logits are float32.
        policy: What a block keeps for its backward pass, one of ``jax.checkpoint_policies``; the rest is computed
            again. None keeps everything.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    policy: Callable[..., bool] | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None, logits: bool = True) -> jax.Array:
        """Computes logits, or the stream that the head makes them of. tokens: [B, T] -> [B, T, v] or [B, T, d].

        Args:
            tokens: Token ids.
            valid: [B, T], False for padding, which is neither attended to nor counted in positions. None without.
            logits: Whether the head is applied.
        """
        c = self.config
        positions = positions_in(tokens.shape) if valid is None else token_positions(valid)
        embed = Embed(c, name="embed")
        x = embed(tokens, positions, self.dtype)
        block = nn.remat(Block, policy=self.policy) if self.policy else Block

        def step(layer: Block, x: jax.Array, kind: jax.Array | None) -> tuple[jax.Array, None]:
            return layer(x, positions, valid, kind), None

        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers)
        x, _ = scan(block(c, name="layers"), x, reach_of(c, jnp.arange(c.layers)))
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
    one = Block(config.reaching_like(0))
    layers = jax.vmap(lambda k: dict(one.init(k, x, tokens, tokens == 0)["params"]))(
        jax.random.split(layers_key, config.layers)
    )
    return {"embed": embed_params, "layers": layers, "head": head_params}


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


def block(config: DecoderConfig, layer: Params, *args, method=Block.__call__, updates: Params | None = None) -> Any:
    """Applies one block, or one of its methods, with its parameters (no leading L) and low-rank updates, if any."""
    return Block(config).apply({"params": layer} | ({"updates": updates} if updates else {}), *args, method=method)


def forward(
    config: DecoderConfig, params: Params, tokens: jax.Array, valid: jax.Array | None, dtype=jnp.float32
) -> jax.Array:
    """Computes logits by a `Decoder`. tokens: [B, T], valid: [B, T], or None without padding -> [B, T, v]."""
    return Decoder(config, dtype).apply({"params": params}, tokens, valid)  # type: ignore[return-value]


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

    def step(carry, layer_and_index, config=config):
        x, keys, values = carry
        layer, index = layer_and_index
        kind = reach_of(config, index)
        q, k, v = block(config, layer, x, positions, kind, method=Block.queries_keys_values)
        # The cache is part of the carry, to be updated in place; as scanned inputs and outputs it would be copied.
        place = [jnp.int32(at) for at in (index, 0, 0, cache.length, 0)]
        keys = jax.lax.dynamic_update_slice(keys, k[None], place)
        values = jax.lax.dynamic_update_slice(values, v[None], place)
        attended = attend_within(config, q, keys[index], values[index], seen, cache.length, kind)
        r = block(config, layer, x, attended, method=Block.add_attention)
        return (block(config, layer, r, method=Block.feed_forward), keys, values), None

    carry, layers = (x, cache.keys, cache.values), params["layers"]
    if isinstance(layers, tuple):
        for layer, index in zip(layers, range(config.layers), strict=True):
            carry, _ = step(carry, (layer, index), config.of_layer(index))
    else:
        carry, _ = jax.lax.scan(step, carry, (layers, jnp.arange(config.layers)))
    x, keys, values = carry
    logits = head(config, params, x[:, -1:])[:, 0]
    return logits, Cache(keys, values, seen, jnp.int32(cache.length + tokens.shape[1]))


def laid_out(
    config: DecoderConfig, params: Params, place: Callable[[DecoderConfig, Params], Params] = lambda _, params: params
) -> tuple[DecoderConfig, Params]:
    """Lays out a decoder for speed: pads MLP widths with zero channels and unstacks the layers.

    Matrix products are a few percent faster at widths that are multiples of ``WIDTH_STEP``, and a channel with zero
    weights does not change the output. XLA:CPU copies each layer's weights out of a stack before it multiplies by them,
    which makes a step of one token four times as slow; unstacked weights are read in place, but compile time grows with
    depth.

    Args:
        config: The decoder.
        params: Its parameters; arrays, or values that are read lazily, a layer at a time.
        place: Places parameters on devices: those of one layer, or those outside the layers.

    Returns:
        The config with the padded widths, and parameters with ``layers`` as a tuple of trees, each at its own width;
        ``extend`` accepts both forms.
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
