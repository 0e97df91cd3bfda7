"""Arithmetic that means what it says: float32 products at full precision, BLAS threads that do not spin.

Arrays may be kept in less than float32; nothing is computed in less.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

# jaxlib's CPU factorisations run in scipy's OpenBLAS, whose threads spin when a core is busy and then take many times
# as long as one thread. The variable is read when that library loads, so it is set before JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "scipy" in sys.modules:  # loaded before us: the variable comes too late, so tell the library itself
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

P = ParamSpec("P")
R = TypeVar("R")
Tree = TypeVar("Tree")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Matrix products inside are true float32, also on TPUs and on GPUs with TF32. Goes below ``jax.jit``."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


def is_concrete(tree: Any) -> bool:
    """Whether the numbers in all arrays of a tree are known, which they are not while a function is traced."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def first_not_finite(tree: Any) -> str | None:
    """The path ("layers/mlp/up") of the first array of a tree that holds NaN or infinity; None if there is none."""
    fine = jax.device_get(_are_finite(tree))
    paths = (path for path, good in jax.tree_util.tree_leaves_with_path(fine) if not good)
    return next((jax.tree_util.keystr(path, simple=True, separator="/") for path in paths), None)


@jax.jit
def _are_finite(tree: Any) -> Any:
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), tree)


def storage(name: str) -> np.dtype:
    """The data type of arrays that are kept in float32, or as the bits of bfloat16.

    As bits, because of an array of bfloat16 that a loop takes parts of, XLA:CPU first makes one of float32.
    """
    return np.dtype({"float32": np.float32, "bfloat16": np.uint16}[name])


def stored(array: jax.Array, dtype: np.dtype) -> jax.Array:
    """A float32 array in such a data type, rounded to the nearest."""
    return array if dtype == np.float32 else jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), dtype)


def in_float32(tree: Tree) -> Tree:
    """Arrays in such data types as the float32 numbers that they mean."""
    return jax.tree.map(
        lambda a: a if a.dtype == np.float32 else jax.lax.bitcast_convert_type(a, jnp.bfloat16).astype(jnp.float32),
        tree,
    )
