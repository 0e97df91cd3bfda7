"""Linen modules of a decoder block. Weights are cast to the dtype of the activations; norms and softmax are float32.

A projection adds x A B if the variable collection "updates" has a low-rank pair {"a", "b"} of its name.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spap_jax.models.config import AttentionKind, DecoderConfig, Rope

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Norm(nn.Module):
    """Root mean square or layer norm over the last axis."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises in float32. x: [..., d] -> [..., d]."""
        config, y = self.config, on_one_axis(x.astype(jnp.float32))
        if config.norm == "layer":
            y = y - y.mean(axis=-1, keepdims=True)
        scale = self.param("scale", _initial_scale(config), (config.width,)) if config.norm_affine else None
        y = normalised(config, y, scale)
        if config.norm_affine and config.norm == "layer":
            y = _shifted(y, self.param("bias", nn.initializers.zeros, (config.width,)))
        return y.astype(x.dtype).reshape(x.shape)


def normalised(config: DecoderConfig, x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Divides by the root mean square over the axes of ``scale``, or the last, and scales, in float32."""
    y, axes = x.astype(jnp.float32), tuple(range(-1 if scale is None else -scale.ndim, 0))
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=axes, keepdims=True) + config.norm_eps)
    y = y if scale is None else y * (_across(scale, y) + config.norm_shift)
    return y.astype(x.dtype)


def _initial_scale(config: DecoderConfig) -> Any:
    return nn.initializers.constant(1 - config.norm_shift)


def rotary_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position for each rotated channel pair, [h / 2] float32 (Su et al. 2021; scaling as in Llama 3.1).

    Computed on the host in the same order of operations as transformers: at position 1000 a difference in the last bit
    of a frequency is a difference of 1e-4 radians. The power is computed in float64 and rounded, since float32 powers
    differ between processors.
    """
    rotated = int(head_dim * rope.share)
    one, exponents = np.float32(1), np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    frequency = one / (np.float64(rope.theta) ** exponents).astype(np.float32)
    factor = np.float32(rope.factor)
    if rope.scaling == "linear":
        return frequency / factor
    if rope.scaling == "llama3":
        low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
        turns = np.float32(rope.original_positions) / (np.float32(2 * np.pi) / frequency)
        kept = np.clip((turns - low) / (high - low), np.float32(0), one)
        return (one - kept) * frequency / factor + kept * frequency
    if rope.scaling == "yarn":
        kept = one - _yarn_ramp(rope, head_dim)
        power = one / frequency
        return one / (factor * power) * (one - kept) + one / power * kept
    return frequency


def _yarn_ramp(rope: Rope, head_dim: int) -> np.ndarray:
    """Share of the stretch in each channel pair, [h / 2] float32."""

    def channel(turns: float) -> float:
        """Pair whose wavelength fits the original context so many times."""
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(channel(rope.beta_fast)), 0)
    high = min(math.ceil(channel(rope.beta_slow)), head_dim - 1)
    span = np.float32(high - low or 0.001)
    return np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / span, np.float32(0), np.float32(1))


def rotary_angles(
    attention_kinds: tuple[AttentionKind, ...], head_dim: int, positions: jax.Array, kind: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the cosines and sines of the rotary embedding, [B, T, 1, h / 2] float32 each, less where a part rotates.

    Args:
        attention_kinds: One without rotary embedding has angles of 0.
        positions: [B, T].
        kind: Index of one of several ``attention_kinds``, [].
    """
    table = [rotary_frequencies(each.rope, head_dim) if each.rope else np.zeros(1) for each in attention_kinds]
    none = np.zeros(max(map(len, table)), np.float32)
    table = [row if each.rope else none for row, each in zip(table, attention_kinds, strict=True)]
    frequency = jnp.asarray(table)[0 if kind is None else kind]
    angles = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None, :]
    factors = [each.rope.attention_factor if each.rope else 1.0 for each in attention_kinds]
    if set(factors) == {1.0}:
        return jnp.cos(angles), jnp.sin(angles)
    factor = jnp.asarray(factors, jnp.float32)[0 if kind is None else kind]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array], interleaved: bool = False) -> jax.Array:
    """Rotates pairs (i, i + h / 2) of every head, or (2 i, 2 i + 1). x: [B, T, n, h].

    With fewer angles than pairs, the last channels stay as they are.
    """
    cos, sin = angles
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    y = turned.astype(jnp.float32)
    if interleaved:
        low, high = y[..., ::2], y[..., 1::2]
        y = jnp.stack([low * cos - high * sin, high * cos + low * sin], axis=-1).reshape(y.shape)
    else:
        low, high = jnp.split(y, 2, axis=-1)
        y = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return jnp.concatenate([y.astype(x.dtype), rest], axis=-1)


def _grown(
    attention_kinds: tuple[AttentionKind, ...], q: jax.Array, positions: jax.Array, kind: jax.Array | None
) -> jax.Array:
    """Multiplies queries far from the start of a text; see ``Rope.query_growth``. q: [B, T, n, h]."""
    ropes = [each.rope or Rope() for each in attention_kinds]
    if not any(rope.query_growth for rope in ropes):
        return q
    table = jnp.asarray([(rope.query_growth, rope.original_positions) for rope in ropes], jnp.float32)
    growth, span = table[0 if kind is None else kind]
    factor = 1 + growth * jnp.log1p(jnp.floor(positions.astype(jnp.float32) / span))
    return q * factor[..., None, None].astype(q.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares the projections [d, n|m, h], [n, h, d] and the biases that the config has."""
        c, init = self.config, nn.initializers.normal(0.02)
        self.q = self.param("q", init, (c.width, c.heads, c.head_dim))
        self.k = self.param("k", init, (c.width, c.kv_heads, c.head_dim))
        self.v = self.param("v", init, (c.width, c.kv_heads, c.head_dim))
        self.o = self.param("o", init, (c.heads, c.head_dim, c.width))
        zeros = nn.initializers.zeros
        if c.qkv_bias:
            self.q_bias = self.param("q_bias", zeros, (c.heads, c.head_dim))
            self.k_bias = self.param("k_bias", zeros, (c.kv_heads, c.head_dim))
            self.v_bias = self.param("v_bias", zeros, (c.kv_heads, c.head_dim))
        if c.output_bias:
            self.o_bias = self.param("o_bias", zeros, (c.width,))
        if c.query_key_norm:
            over = [(c.heads,), (c.kv_heads,)] if c.query_key_norm == "all" else [(), ()]
            self.q_norm = self.param("q_norm", _initial_scale(c), (*over[0], c.head_dim))
            self.k_norm = self.param("k_norm", _initial_scale(c), (*over[1], c.head_dim))

    def project_in(
        self, x: jax.Array, positions: jax.Array, kind: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes q [B, T, n, h], k and v [B, m, T, h] from x: [B, T, d]; kind: see ``blocks.attention_kind``."""
        c, tokens = self.config, on_one_axis(x)
        weights = {"q": self.q, "k": self.k, "v": self.v}
        q, k, v = (
            _updated(self, name, tokens, jnp.einsum("td,dnh->tnh", tokens, w.astype(x.dtype)))
            for name, w in weights.items()
        )
        if c.qkv_bias:
            q, k, v = (_shifted(a, b) for a, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        if c.query_key_norm:
            q, k = normalised(c, q, self.q_norm), normalised(c, k, self.k_norm)
        q, k, v = (a.reshape(*x.shape[:2], *a.shape[1:]) for a in (q, k, v))
        if any(each.rope for each in c.attention_kinds):
            angles = rotary_angles(c.attention_kinds, c.head_dim, positions, kind)
            pairs = any(each.rope.interleaved for each in c.attention_kinds if each.rope)
            q, k = rotate(q, angles, pairs), rotate(k, angles, pairs)
            q = _grown(c.attention_kinds, q, positions, kind)
        if c.query_scale != 1:
            q = q * c.query_scale
        return q, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def project_out(self, x: jax.Array) -> jax.Array:
        """Applies the output projection. x: [B, T, n, h] -> [B, T, d]."""
        x = x.reshape(*x.shape[:2], -1)  # heads on one axis too; XLA would transpose the weight at each call
        bias = self.o_bias if self.config.output_bias else None
        return _updated(self, "o", x, affine(x, self.o.reshape(-1, self.o.shape[-1]), bias))


class Mlp(nn.Module):
    """MLP in two halves, which exposes its hidden channels: x -> hidden [.., f] -> output [.., d]."""

    config: DecoderConfig

    def setup(self) -> None:
        """Declares gate and up [d, f], down [f, d] and biases; weights may lack down if only ``hidden`` is used."""
        c, init, zeros = self.config, nn.initializers.normal(0.02), nn.initializers.zeros
        self.up = self.param("up", init, (c.width, c.intermediate))
        if c.gated:
            self.gate = self.param("gate", init, (c.width, c.intermediate))
        if c.mlp_bias:
            self.up_bias = self.param("up_bias", zeros, (c.intermediate,))
            if c.gated:
                self.gate_bias = self.param("gate_bias", zeros, (c.intermediate,))
        if self.is_initializing() or self.has_variable("params", "down"):
            self.down = self.param("down", init, (c.intermediate, c.width))
            if c.mlp_bias:
                self.down_bias = self.param("down_bias", zeros, (c.width,))

    def hidden(self, x: jax.Array) -> jax.Array:
        """Computes act(x gate) * (x up), or act(x up) if the MLP is not gated. x: [..., d] -> [..., f]."""
        act, bias, tokens = ACTIVATIONS[self.config.activation], self.config.mlp_bias, on_one_axis(x)
        up = _updated(self, "up", tokens, affine(tokens, self.up, self.up_bias if bias else None))
        if not self.config.gated:
            return act(up).reshape(*x.shape[:-1], -1)
        gate = _updated(self, "gate", tokens, affine(tokens, self.gate, self.gate_bias if bias else None))
        return (act(gate) * up).reshape(*x.shape[:-1], -1)

    def project(self, h: jax.Array) -> jax.Array:
        """Applies the output projection. h: [..., f] -> [..., d]."""
        return _updated(self, "down", h, affine(h, self.down, self.down_bias if self.config.mlp_bias else None))


def on_one_axis(x: jax.Array) -> jax.Array:
    """Reshapes tokens [..., a] to [N, a], since XLA:CPU is slow at gradients that sum over two axes."""
    return x.reshape(-1, x.shape[-1])


def affine(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Computes x W + b in the dtype of x. x: [..., a], weight: [a, b] -> [..., b]."""
    y = on_one_axis(x) @ weight.astype(x.dtype)
    y = y if bias is None else _shifted(y, bias)
    return y.reshape(*x.shape[:-1], -1)


def _updated(module: nn.Module, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Adds a projection's low-rank update, if there is one, to its output. x: [..., in], y: [..., (out)] -> like y."""
    if not module.has_variable("updates", name):
        return y
    pair = module.get_variable("updates", name)
    return y + affine(affine(x, pair["a"]), pair["b"]).reshape(y.shape)


def _shifted(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias to activations, in float32: its gradient sums over all tokens."""
    y = x.astype(jnp.float32)
    return (y + _across(bias, y)).astype(x.dtype)


def _across(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Casts and reshapes a parameter to the dtype and rank of the activations that it is combined with."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - vector.ndim) + vector.shape)
