"""Restricts a block's parameters to the kept channels and heads."""

import jax
import jax.numpy as jnp

from spap_jax.models import DecoderConfig, Family, Params, with_channels
from spap_jax.parallel.program import program
from spap_jax.solver.alternating import Weights
from spap_jax.solver.groups import channels_of


def kept_width(width: int, sparsity: float, round_to: int) -> int:
    """Returns how many of ``width`` channels to keep: rounded to a multiple of ``round_to``, at least one multiple."""
    return min(width, max(1, round((1 - sparsity) * width / round_to)) * round_to)


def resized(layer: Params, width: int) -> Params:
    """Truncates or zero-pads a block's MLP to ``width`` channels; zero channels do not change its output."""
    same = layer["mlp"]["down"].shape[-2] == width
    return layer if same else layer | {"mlp": _with_channels(layer["mlp"], width)}


_with_channels = program(static_argnames="width")(with_channels)


def take_channels(family: Family, mlp: Params, kept: jax.Array) -> Params:
    """Restricts an MLP's parameters to the channels ``kept`` [k], along the axis f of its rules."""
    return _taken(family, "mlp", mlp, {"f": kept})


def take_groups(family: Family, attention: Params, kept: jax.Array) -> Params:
    """Restricts attention's parameters to key/value heads ``kept`` [k] and the query heads that read them."""
    n, m = attention["q"].shape[1], attention["k"].shape[1]
    return _taken(family, "attention", attention, {"n": channels_of(kept, n // m), "m": kept})


def _taken(family: Family, part: str, params: Params, kept: dict[str, jax.Array]) -> Params:
    """Restricts the parameters of a part of a block to indices [k] along the axes with these letters."""
    taken = {}
    for name, array in params.items():
        for axis, letter in enumerate(family.letters(f"layers/{part}/{name}")):
            array = jnp.take(array, kept[letter], axis=axis) if letter in kept else array
        taken[name] = array
    return taken


def with_biases(config: DecoderConfig, mlp: Params) -> Params:
    """Adds zeros for the biases that ``config`` has and the MLP's parameters lack."""
    if not config.mlp_bias:
        return mlp
    sizes = {"up_bias": config.intermediate, "down_bias": config.width}
    sizes |= {"gate_bias": config.intermediate} if config.gated else {}
    return {name: jnp.zeros(size, mlp["down"].dtype) for name, size in sizes.items()} | mlp


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
