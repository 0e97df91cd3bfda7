"""The blocks of a decoder, and the one loop over them.

Logits, perplexity, training, joint steps of pruning and generation all pass through `over_blocks`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spap_jax.models.attention import causal_attention
from spap_jax.models.config import DecoderConfig
from spap_jax.models.layers import Attention, Mlp, Norm
from spap_jax.numerics import sliced, to_slice

Params = dict
"""Parameters as a nested dict of arrays."""


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
        """Computes queries, keys, values. x: [B, T, d] -> q [B, T, n, h], k, v [B, m, T, h]; see `attention_kind`."""
        return self.attention.project_in(self.attention_norm(x) if "input" in self.config.norms else x, positions, kind)

    def attended(
        self, x: jax.Array, positions: jax.Array, valid: jax.Array | None, kind: jax.Array | None = None
    ) -> jax.Array:
        """Computes the input of the attention's output projection; see `__call__`. x: [B, T, d] -> [B, T, n, h]."""
        return attend_within(self.config, *self.queries_keys_values(x, positions, kind), valid, kind=kind)

    def add_attention(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Projects and adds the attention's output. x: [B, T, d], attended: [B, T, n, h] -> [B, T, d]."""
        y = self.attention.project_out(attended)
        r = x + self._scaled(self.attention_output_norm(y) if "output" in self.config.norms else y)
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
        return self._scaled(self.mlp_output_norm(y) if "output" in self.config.norms else y)

    def _scaled(self, y: jax.Array) -> jax.Array:
        return y if self.config.residual_scale == 1 else y * self.config.residual_scale

    def finish(self, y: jax.Array) -> jax.Array:
        """Applies what follows the MLP's residual addition. y: [..., d] -> [..., d]."""
        return self.mlp_norm(y) if "sum" in self.config.norms else y

    def feed_forward(self, r: jax.Array) -> jax.Array:
        """Applies the MLP and its residual addition. r: [..., d] -> [..., d]."""
        return self.finish(r + self.mlp_addition(self.mlp.project(self.mlp.hidden(self.mlp_input(r)))))

    def __call__(
        self, x: jax.Array, positions: jax.Array, valid: jax.Array | None, kind: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block. x: [B, T, d] -> [B, T, d].

        Args:
            positions: [B, T].
            valid: [B, T], or None without padding.
            kind: Index of the layer's kind of attention, [], if the config has several (see `attention_kind`).
        """
        return self.feed_forward(self.attend(x, positions, valid, kind))


def attention_kind(config: DecoderConfig, index: jax.Array | int) -> jax.Array | None:
    """Returns the index of a layer's kind of attention, [], for the blocks of a config with several; otherwise None."""
    return None if config.layer_kinds is None else jnp.asarray(config.layer_kinds, jnp.int32)[index]


def attend_within(
    config: DecoderConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    offset: jax.Array | int = 0,
    kind: jax.Array | None = None,
) -> jax.Array:
    """Computes `causal_attention` within the window of the kind of attention with index ``kind``."""
    size = k.shape[2]
    windows = [None if each.window is None or each.window >= size else each.window for each in config.attention_kinds]
    if len(set(windows)) == 1:
        return causal_attention(q, k, v, valid, offset, windows[0], config.score_cap)
    # Kernels need a window that is known when they are compiled, so each has a branch of its own.
    attend = functools.partial(causal_attention, offset=offset, cap=config.score_cap)
    branches = [functools.partial(attend, window=window) for window in windows]
    return jax.lax.switch(kind, branches, q, k, v, valid)


def block(config: DecoderConfig, layer: Params, *args, method=Block.__call__, updates: Params | None = None) -> Any:
    """Applies one block, or one of its methods, with its parameters (no leading L) and low-rank updates, if any."""
    return Block(config).apply({"params": layer} | ({"updates": updates} if updates else {}), *args, method=method)


def over_blocks(
    config: DecoderConfig,
    step: Callable[[DecoderConfig, Any, Params, Any], Any],
    carry: Any,
    layers: Params | tuple[Params, ...],
    moving: Params | None = None,
    first: int | jax.Array = 0,
    checkpoint: Callable[[Callable], Callable] = lambda function: function,
    held: Callable[[Any], Any] = lambda carry: carry,
) -> Any:
    """Carries a value, such as the residual stream, through the blocks.

    Args:
        step: Returns the value after a block, from its config, the value before it, its parameters, and its number.
        layers: Parameters of all blocks, stacked [L, ...], which have no gradients; or a tree for each block, as
            ``decoder.unstacked`` returns them.
        moving: Parameters that have gradients, stacked [L, ...]; they take the place of those in ``layers``.
        first: Number of the first block. One program serves all values of an array: blocks before it are skipped.
        checkpoint: Wraps what a block computes, as ``jax.checkpoint`` does.
        held: Changes how the value is held between blocks, which a backward pass keeps.
    """
    if isinstance(layers, tuple):
        for number, layer in enumerate(layers):
            carry = step(config.of_layer(number), carry, layer, number)
        return carry
    if not config.layers:
        return carry
    stacked, skips = to_slice(layers), not isinstance(first, int)

    # A slice that came from outside would be kept for the backward pass.
    @checkpoint
    def one(carry: Any, number: jax.Array, own: Params) -> Any:
        return step(config, carry, sliced(get_layer(stacked, number)) | own, number)

    def turn(carry: Any, item: tuple[jax.Array, Params]) -> tuple[Any, None]:
        if skips:
            return jax.lax.cond(item[0] >= first, one, lambda carry, *_: carry, carry, *item), None
        return one(held(carry), *item), None

    numbers = jnp.arange(0 if skips else first, config.layers)
    return jax.lax.scan(turn, carry, (numbers, moving or {}))[0]


def get_layer(layers: Params, index: int | jax.Array) -> Params:
    """Returns one layer of a stack [L, ...]."""
    return jax.tree.map(lambda stack: stack[index], layers)


def init_blocks(config: DecoderConfig, key: jax.Array) -> Params:
    """Initialises random parameters of all blocks, stacked [L, ...]."""
    tokens, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.width))
    one = Block(config.attending_like(0))
    keys = jax.random.split(key, config.layers)
    return jax.vmap(lambda key: dict(one.init(key, x, tokens, tokens == 0)["params"]))(keys)
