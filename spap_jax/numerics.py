"""Numerics: how precise matrix products are, by purpose, and the data types of what is stored or made in less.

Activations, sums and softmax are float32 everywhere but in optimizer steps on whole models, which compute in
`step_dtype`. On GPUs and TPUs the products of float32 arrays are as precise as their purpose needs: `forward_precision`
for passes through a model, `moments_precision` for second moments, `full_precision` for the solver. CPUs compute all of
them in full. Optimizer steps of alternating rounds have the device's default precision.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spap_jax.backend import platform

P = ParamSpec("P")
R = TypeVar("R")
Tree = TypeVar("Tree")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Makes matrix products inside true float32. Apply this decorator, as the next two, below ``jax.jit``."""
    return _with_precision("highest", function)


def moments_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Makes each product inside of three bfloat16 ones: 16 bits of both factors count, nearly as in float32."""
    return _with_precision("BF16_BF16_F32_X3", function)


def forward_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Rounds the factors of products inside to bfloat16, the type in which models are trained; sums are float32."""
    return _with_precision("BF16_BF16_F32", function)


def _with_precision(precision: str, function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision(precision):
            return function(*args, **kwargs)

    return wrapped


def is_concrete(tree: Any) -> bool:
    """Whether the values of all arrays of a tree are known; while a function is traced, they are not."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def step_dtype() -> str:
    """The data type of an optimizer step's products: float32 on a CPU, elsewhere bfloat16."""
    return "float32" if platform() == "cpu" else "bfloat16"


def generation_dtype(params: Any) -> np.dtype:
    """The data type in which a model generates text: float32 on a CPU, elsewhere that of its weights.

    Weights would be converted to float32 for every token otherwise, and the cache be twice as large. TPUs have no
    products of float16.
    """
    stored = jax.tree.leaves(params)[0].dtype
    if platform() == "cpu" or stored.itemsize > 2:
        return np.dtype(np.float32)
    return np.dtype(jnp.bfloat16) if platform() == "tpu" else stored


def in_bfloat16(array: jax.Array) -> jax.Array:
    """Rounds to bfloat16, as its bits: XLA:CPU first converts all of a bfloat16 array that a loop slices to float32."""
    return jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16)


def in_float32(tree: Tree) -> Tree:
    """Converts arrays of `in_bfloat16` back to float32."""
    return jax.tree.map(
        lambda a: a if a.dtype == np.float32 else jax.lax.bitcast_convert_type(a, jnp.bfloat16).astype(jnp.float32),
        tree,
    )


def to_slice(tree: Tree) -> Tree:
    """Returns arrays as a loop should slice them: on a CPU those of bfloat16 as their bits, see `in_bfloat16`."""
    if platform() != "cpu":
        return tree
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a, tree)


def sliced(tree: Tree) -> Tree:
    """Inverts `to_slice`, for slices."""
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a, tree)
