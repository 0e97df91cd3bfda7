"""The optimizers of the steps, as optax transformations of stacked weights [L, ...]; ``rates`` gives the step sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_WARM_UP = 0.1
"""Fraction of the steps during which the learning rate warms up."""

_LARGEST_GRADIENT = 1.0
"""Global norm to which larger gradients are clipped."""

_DECAY, _EPSILON = 0.9, 1e-8
"""Adam's decay of the first moment, and what is added to the root of the second."""

_SMALLEST = 1e-3
"""Size that counts for smaller weights, such as biases that are zero."""

_SCALES = ("scale", "q_norm", "k_norm")
"""Names of the scales of norms in the parameter tree."""


def rates(peak: float, steps: int) -> np.ndarray:
    """Returns learning rates [steps] that rise over the first tenth of the steps and then fall linearly to zero."""
    warm = int(_WARM_UP * steps)
    # The learning rate is above zero in the first step and in the last.
    rise, fall = np.arange(1, warm + 1) / (warm + 1), 1 - np.arange(steps - warm) / (steps - warm)
    return np.float32(peak) * np.concatenate([rise, fall]).astype(np.float32)


def relative(moments: str = "float32", norm_shift: float = 0.0) -> optax.GradientTransformation:
    """Returns Adam with steps relative to the size of the weights, so that one rate suits every layer of any model.

    The rate is relative to the root mean square of each layer's array, or to a norm's scale itself.

    Args:
        moments: Data type in which Adam's two moments are stored.
        norm_shift: What is added to a norm's stored scale where it is used.
    """
    return optax.chain(_adam(0.99, moments), _by_size(norm_shift))


def clipped(decay: float) -> optax.GradientTransformation:
    """Returns AdamW of gradients whose global norm is clipped."""
    largest, adam = optax.clip_by_global_norm(_LARGEST_GRADIENT), _adam(0.999, "float32")
    return optax.chain(largest, adam, optax.add_decayed_weights(decay))


def _adam(second_decay: float, moments: str) -> optax.GradientTransformation:
    """Returns Adam (Kingma and Ba 2015) with both moments stored in one dtype; arithmetic is in float32.

    The update is that of the stored, rounded moments, unlike in `optax.scale_by_adam`, which would have to keep a copy.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mean, square = (jax.tree.map(lambda a: jnp.zeros_like(a, dtype=moments), params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mean, square)

    def moved(decay: float, old: jax.Array, new: jax.Array) -> jax.Array:
        return (decay * old.astype(jnp.float32) + (1 - decay) * new).astype(moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + 1
        mean = jax.tree.map(lambda old, g: moved(_DECAY, old, g), state.mu, updates)
        square = jax.tree.map(lambda old, g: moved(second_decay, old, jnp.square(g)), state.nu, updates)
        corrections = 1 - _DECAY**count, 1 - second_decay**count

        def one(mean: jax.Array, square: jax.Array) -> jax.Array:
            first, second = (a.astype(jnp.float32) / c for a, c in zip((mean, square), corrections, strict=True))
            return first / (jnp.sqrt(second) + _EPSILON)

        return jax.tree.map(one, mean, square), optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def _by_size(norm_shift: float) -> optax.GradientTransformation:
    """Multiplies the update of each layer's array by its root mean square, and of each norm's scale by its own size."""

    def one(path: Any, update: jax.Array, weights: jax.Array) -> jax.Array:
        if path[-1].key in _SCALES:
            return update * jnp.maximum(jnp.abs(weights + norm_shift), _SMALLEST)
        own = tuple(range(1, weights.ndim))
        size = jnp.sqrt(jnp.square(weights).mean(axis=own, keepdims=True))
        return update * jnp.maximum(size, _SMALLEST)

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map_with_path(one, updates, params)

    return optax.stateless(scale)
