"""Moving weights as they are measured and written: in the data types of the checkpoint."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spap_jax.models.decoder import Params


def to_stored_dtypes(like: Params) -> Callable[[Params], Params]:
    """Returns a function that converts weights to the data types of others."""
    dtypes = tuple(array.dtype for array in jax.tree.leaves(like))
    return functools.partial(_cast, dtypes=dtypes)


@functools.partial(jax.jit, static_argnames="dtypes")
def _cast(moved: Params, dtypes: tuple) -> Params:
    leaves, tree = jax.tree.flatten(moved)
    # A copy even of the same type, since the steps donate the original.
    return tree.unflatten([jnp.copy(a.astype(dtype)) for a, dtype in zip(leaves, dtypes, strict=True)])
