"""Restricts a block's parameters to the kept channels and heads."""

import jax
import jax.numpy as jnp

from spap_jax.models import DecoderConfig, Family, Params
from spap_jax.solver.alternating import Weights
from spap_jax.solver.groups import channels_of


def kept_width(width: int, sparsity: float, round_to: int) -> int:
    """Returns how many of ``width`` channels to keep: rounded to a multiple of ``round_to``, at least one multiple."""
    return min(width, max(1, round((1 - sparsity) * width / round_to)) * round_to)


def take_channels(family: Family, mlp: Params, kept: jax.Array) -> Params:
    """Restricts an MLP's parameters to the channels ``kept`` [k], along the axis f of its rules."""
    return {name: _taken(array, kept, _axis(family, f"mlp/{name}", "f")) for name, array in mlp.items()}


def take_groups(family: Family, attention: Params, kept: jax.Array) -> Params:
    """Restricts attention's parameters to key/value heads ``kept`` [k] and the query heads that read them."""
    n, m = attention["q"].shape[1], attention["k"].shape[1]
    heads = channels_of(kept, n // m)

    def one(name: str, array: jax.Array) -> jax.Array:
        path = f"attention/{name}"
        return _taken(_taken(array, heads, _axis(family, path, "n")), kept, _axis(family, path, "m"))

    return {name: one(name, array) for name, array in attention.items()}


def with_biases(config: DecoderConfig, mlp: Params) -> Params:
    """Adds zeros for the biases that ``config`` has and the MLP's parameters lack."""
    if not config.mlp_bias:
        return mlp
    sizes = {"up_bias": config.intermediate, "down_bias": config.width}
    sizes |= {"gate_bias": config.intermediate} if config.gated else {}
    return {name: jnp.zeros(size, mlp["down"].dtype) for name, size in sizes.items()} | mlp


def _axis(family: Family, path: str, letter: str) -> int | None:
    """Returns the index of an axis letter in a layer's parameter; None if it has no such axis."""
    letters = family.letters(f"layers/{path}")
    return letters.index(letter) if letter in letters else None


def _taken(array: jax.Array, kept: jax.Array, axis: int | None) -> jax.Array:
    return array if axis is None else jnp.take(array, kept, axis=axis)


def to_weights(mlp: Params) -> Weights:
    """Converts an MLP's parameters to the solver's ``Weights``, in float32."""
    mlp = {name: array.astype(jnp.float32) for name, array in mlp.items()}
    down, bias = mlp.pop("down"), mlp.pop("down_bias", None)
    return Weights(mlp, down, bias)


def to_mlp(weights: Weights, like: Params) -> Params:
    """Inverts ``to_weights``, in the dtypes of ``like``; parameters missing there get its output projection's dtype."""
    mlp = weights.inner | {"down": weights.down}
    if weights.bias is not None:
        mlp["down_bias"] = weights.bias
    return {name: array.astype(like.get(name, like["down"]).dtype) for name, array in mlp.items()}
