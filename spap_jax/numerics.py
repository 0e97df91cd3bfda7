"""Numerics: float32 matrix products at full precision, and factorisations whose threads do not spin.

Arrays may be stored in less than float32. Only optimizer steps compute in less: those of alternating rounds at the
device's default precision, and those on whole models in `step_dtype`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spap_jax.backend import platform

P = ParamSpec("P")
R = TypeVar("R")
Tree = TypeVar("Tree")


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limits BLAS libraries to one thread inside; a run of the command line does so from its start.

    jaxlib's CPU factorisations run in scipy's OpenBLAS, whose threads spin when a core is busy and then take many times
    as long as one.
    """
    import scipy.linalg  # noqa: F401  (it loads the library, which jaxlib loads only when it factorises)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Makes matrix products inside true float32, also on TPUs and on GPUs with TF32. Apply it below ``jax.jit``."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


def is_concrete(tree: Any) -> bool:
    """Whether the values of all arrays of a tree are known; while a function is traced, they are not."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def first_not_finite(tree: Any) -> str | None:
    """The path ("layers/mlp/up") of the first array of a tree that holds NaN or infinity; None if there is none."""
    fine = jax.device_get(_are_finite(tree))
    paths = (path for path, good in jax.tree_util.tree_leaves_with_path(fine) if not good)
    return next((jax.tree_util.keystr(path, simple=True, separator="/") for path in paths), None)


@jax.jit
def _are_finite(tree: Any) -> Any:
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), tree)


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


def storage(name: str) -> np.dtype:
    """The dtype of arrays that are stored in float32, or as the bits of bfloat16.

    Bits are stored because XLA:CPU first converts all of a bfloat16 array that a loop slices to float32.
    """
    return np.dtype({"float32": np.float32, "bfloat16": np.uint16}[name])


def stored(array: jax.Array, dtype: np.dtype) -> jax.Array:
    """Converts a float32 array to a dtype of `storage`, rounding to nearest."""
    return array if dtype == np.float32 else jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), dtype)


def in_float32(tree: Tree) -> Tree:
    """Converts arrays in dtypes of `storage` back to float32."""
    return jax.tree.map(
        lambda a: a if a.dtype == np.float32 else jax.lax.bitcast_convert_type(a, jnp.bfloat16).astype(jnp.float32),
        tree,
    )


def to_slice(tree: Tree) -> Tree:
    """Returns arrays as a loop should slice them: on a CPU those of bfloat16 as their bits, see `storage`."""
    if platform() != "cpu":
        return tree
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a, tree)


def sliced(tree: Tree) -> Tree:
    """Inverts `to_slice`, for slices."""
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a, tree)
