"""Low-rank updates of the projections (LoRA, Hu et al. 2021): W + (alpha / rank) A B with A [in, r], B [r, out].

They are trained as x W + (alpha / rank) (x A) B, and merged for the output, a plain checkpoint.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from spap_jax.models import Params

INPUT_AXES = {
    "attention": {"q": 1, "k": 1, "v": 1, "o": 2},  # d -> n|m h; n h -> d
    "mlp": {"gate": 1, "up": 1, "down": 1},  # d -> f; f -> d
}
"""The projections that are updated, and how many leading axes of each weight are its input; OPT has no gate."""


def start(layers: Params, rank: int, key: jax.Array) -> Params:
    """Initialises updates of all projections; they change nothing yet, since every B is zero.

    ``layers`` are the blocks' weights, stacked [L, ...]; every A is normal with variance 1 / in.

    Returns:
        Float32 ``{"attention": {"q": {"a": [L, in, r], "b": [L, r, out]}, ...}, "mlp": ...}``.
    """
    updates: Params = {}
    for number, (part, name, axes) in enumerate(_projections(layers)):
        count, *shape = layers[part][name].shape
        inputs, outputs = math.prod(shape[:axes]), math.prod(shape[axes:])
        # On one axis, as the same numbers on three take the compiler several times as long.
        drawn = jax.random.normal(jax.random.fold_in(key, number), (count * inputs * rank,))
        a = drawn.reshape(count, inputs, rank) / math.sqrt(inputs)
        if name == "down":
            # Zero channels, which pad narrower layers, stay zero: gradients could reach them only through this A.
            a = jnp.where((layers[part][name] == 0).all(axis=-1, keepdims=True), 0, a)
        updates.setdefault(part, {})[name] = {"a": a, "b": jnp.zeros((count, rank, outputs))}
    return updates


def scaled(updates: Params, scale: float) -> Params:
    """Returns updates with every B multiplied by the scale, alpha / r."""
    return jax.tree.map_with_path(lambda path, a: a * scale if path[-1].key == "b" else a, updates)


def merged(weights: Params, updates: Params, scale: float) -> Params:
    """Returns the weights with the updates added, in their data type; weights without an update are unchanged.

    ``weights`` are those of one block, or of all blocks, stacked [L, ...]; the updates are float32, as ``start`` makes
    them, and there may be none.
    """

    def one(weight: jax.Array, pair: Params) -> jax.Array:
        return (weight.astype(jnp.float32) + (scale * (pair["a"] @ pair["b"])).reshape(weight.shape)).astype(
            weight.dtype
        )

    merged = {
        part: {name: one(weights[part][name], pair) for name, pair in those.items()} for part, those in updates.items()
    }
    return weights | {part: weights[part] | those for part, those in merged.items()}


def _projections(layers: Params) -> Iterator[tuple[str, str, int]]:
    for part, axes in INPUT_AXES.items():
        yield from ((part, name, count) for name, count in axes.items() if name in layers[part])
