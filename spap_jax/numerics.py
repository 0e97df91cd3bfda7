"""Arithmetic that means what it says: float32 products at full precision, BLAS threads that do not spin."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

# jaxlib's CPU factorisations run in scipy's OpenBLAS, whose threads spin when a core is busy and then take many times
# as long as one thread. The variable is read when that library loads, so it is set before JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "scipy" in sys.modules:  # loaded before us: the variable comes too late, so tell the library itself
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")

import jax
import jax.numpy as jnp

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


def in_float32(tree: Tree) -> Tree:
    """The same arrays in the data type of all arithmetic, whatever they are stored in."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)
