"""The optimizers of the steps, as optax transformations of stacked weights [L, ...]; each in one function."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

_WARM_UP = 0.1
"""Fraction of the steps during which the learning rate warms up."""

_LARGEST_GRADIENT = 1.0
"""Global norm to which larger gradients are clipped."""

_SMALLEST = 1e-3
"""Size that is taken for smaller weights, such as biases that are zero."""


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Returns a learning rate that rises over the first tenth of the steps and then falls to zero along a cosine."""
    warm = int(_WARM_UP * steps)
    # The learning rate is above zero in the first step and in the last.
    rise = optax.linear_schedule(rate / (warm + 1), rate, warm)
    return optax.join_schedules([rise, optax.cosine_decay_schedule(rate, steps - warm)], [warm])


def relative(rate: float, steps: int, moments: str = "float32") -> optax.GradientTransformation:
    """Returns Adam with steps relative to the scale of the weights, so that one rate suits every layer of any model.

    Args:
        rate: Peak size of a step, relative to the root mean square of each layer's matrix.
        steps: Number of steps.
        moments: Data type in which Adam's two moments are stored.
    """
    return optax.chain(
        with_state_dtype(optax.scale_by_adam(b2=0.99), jnp.dtype(moments)),
        _by_size(),
        optax.scale_by_learning_rate(schedule(rate, steps)),
    )


def clipped(rate: float, steps: int, decay: float, moments: str = "float32") -> optax.GradientTransformation:
    """Returns AdamW of gradients whose global norm is clipped.

    Args:
        rate: Peak learning rate.
        steps: Number of steps.
        decay: Weight decay, relative to the learning rate.
        moments: Data type in which Adam's two moments are stored.
    """
    return optax.chain(
        optax.clip_by_global_norm(_LARGEST_GRADIENT),
        with_state_dtype(optax.scale_by_adam(), jnp.dtype(moments)),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(schedule(rate, steps)),
    )


def with_state_dtype(inner: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """Keeps the arrays of a transformation's state in a data type; its arithmetic stays in float32."""
    if dtype == jnp.float32:
        return inner

    def to(state: Any, kind: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(kind) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, to(state, jnp.float32), params)
        return updates, to(state, dtype)

    return optax.GradientTransformation(lambda params: to(inner.init(params), dtype), update)


def _by_size() -> optax.GradientTransformation:
    """Multiplies the update of each layer's array by the root mean square of the array."""

    def one(update: jax.Array, weights: jax.Array) -> jax.Array:
        size = jnp.sqrt(jnp.square(weights).mean(axis=tuple(range(1, weights.ndim)), keepdims=True))
        return update * jnp.maximum(size, _SMALLEST)

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(one, updates, params)

    return optax.stateless(scale)
