"""Fewer channels in a block's parameters."""

import jax
import jax.numpy as jnp

from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.families import Family
from spap_jax.solver.alternating import Weights


def kept_width(width: int, sparsity: float, round_to: int) -> int:
    """Channels to keep of ``width``: rounded to a multiple, at least one multiple, never more than there are."""
    return min(width, max(1, round((1 - sparsity) * width / round_to)) * round_to)


def take_channels(family: Family, mlp: Params, kept: jax.Array) -> Params:
    """An MLP's parameters restricted to the channels ``kept`` [k], along the axis that its rules call f."""
    return {name: jnp.take(array, kept, axis=axis) if (axis := prunable_axis(family, name)) is not None else array
            for name, array in mlp.items()}  # fmt: skip


def with_biases(config: DecoderConfig, mlp: Params) -> Params:
    """An MLP's parameters, with zeros for the biases that ``config`` has and they lack."""
    if not config.mlp_bias:
        return mlp
    sizes = {"up_bias": config.intermediate, "down_bias": config.width}
    sizes |= {"gate_bias": config.intermediate} if config.gated else {}
    return {name: jnp.zeros(size, mlp["down"].dtype) for name, size in sizes.items()} | mlp


def prunable_axis(family: Family, name: str) -> int | None:
    """Which axis of an MLP parameter holds the channels; None where none does."""
    rule = next(rule for rule in family.rules if rule.ours == f"layers/mlp/{name}")
    letters = rule.sides[1].split()
    return letters.index("f") if "f" in letters else None


def to_weights(mlp: Params) -> Weights:
    """An MLP's parameters as the solver sees them, in float32."""
    mlp = {name: array.astype(jnp.float32) for name, array in mlp.items()}
    down, bias = mlp.pop("down"), mlp.pop("down_bias", None)
    return Weights(mlp, down, bias)


def to_mlp(weights: Weights, like: Params) -> Params:
    """The inverse of ``to_weights``, in the dtypes of ``like``; what it lacks in that of its output projection."""
    mlp = weights.inner | {"down": weights.down}
    if weights.bias is not None:
        mlp["down_bias"] = weights.bias
    return {name: array.astype(like.get(name, like["down"]).dtype) for name, array in mlp.items()}
