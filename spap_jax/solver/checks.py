"""Input validation of the solver.

Shapes and static numbers are always checked. Array values are checked only if they are concrete; inside ``jax.jit`` or
``jax.vmap`` failures are reported in the results: -1 in place of a channel or a count, and ``solved`` of a `Solution`.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from spap_jax.errors import UserError
from spap_jax.numerics import is_concrete


def check_valid(valid: Array) -> None:
    """Raises UserError if it is concrete that moments are not valid, or that their system could not be solved."""
    if is_concrete(valid) and not valid:
        raise UserError(
            "the moments hold NaN or infinity, or are not those of one layer: gram must be H'H / N, symmetric and "
            "positive semidefinite, cross H'Y / N, and target_power the mean of |y|^2, all over the same tokens."
        )


def check_moments(gram: Array, cross: Array, weight: Array, target_power: Array) -> None:
    """Raises UserError if the shapes of a layer's second moments do not match."""
    shapes = [np.shape(a) for a in (gram, cross, weight, target_power)]
    f, d = shapes[1] if len(shapes[1]) == 2 else (0, 0)
    if f * d == 0 or shapes != [(f, f), (f, d), (f, d), ()]:
        found = ", ".join(map(str, shapes))
        raise UserError(
            f"gram, cross, weight and target_power must be arrays of the shapes [f, f], [f, d], [f, d] and [], not "
            f"{found}; to solve several layers, map over them with jax.lax.map or jax.vmap."
        )


def check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raises UserError if an array does not have the given shape."""
    if np.shape(array) != shape:
        raise UserError(f"{name} must have the shape {list(shape)}, not {list(np.shape(array))}.")


def check_whole(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Checks a static integer and returns it as an ``int``.

    Raises:
        UserError: the value is traced, not an integer, or out of range.
    """
    if not is_concrete(value):
        raise UserError(f"{name} is traced, and decides the shapes of arrays: name it in static_argnames of jax.jit.")
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        words = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UserError(f"{name} must be a whole number {words}, not {value!r}.")
    return int(value)


def check_positive(name: str, value: Any) -> None:
    """Raises UserError if a number is concrete and not positive and finite."""
    if not is_concrete(value):
        return
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, int | float) or not 0 < number < math.inf:
        raise UserError(f"{name} must be positive and finite, not {value!r}.")


def check_channels(kept: Array, f: int) -> None:
    """Raises UserError unless ``kept`` are valid channel numbers: [k] distinct integers from 0 to f - 1."""
    if np.ndim(kept) != 1 or not 1 <= len(kept) <= f or not jnp.issubdtype(jnp.result_type(kept), jnp.integer):
        raise UserError(
            f"kept must be from 1 to {f} channel numbers [k], not {jnp.result_type(kept)} {list(np.shape(kept))}."
        )
    if is_concrete(kept):
        numbers = np.asarray(kept)
        if numbers.min() < 0 or numbers.max() >= f or len(np.unique(numbers)) < len(numbers):
            raise UserError(f"kept must be distinct channel numbers from 0 to {f - 1}, not {numbers.tolist()}.")


def or_none(kept: Array, sound: Array) -> Array:
    """Returns channel numbers [k] unchanged if the system they were found on is sound; otherwise all -1.

    Raises:
        UserError: ``sound`` is concrete and false.
    """
    check_valid(sound)
    return jnp.where(sound, kept, -1)
