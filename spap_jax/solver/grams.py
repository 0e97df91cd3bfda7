"""The sum of the Gram matrices of chunks of tokens: ``sum_c H_c' H_c``.

It is symmetric: a CPU, whose time is that of the products, computes one half of it in blocks of rows, each up to its
diagonal. An accelerator computes all of it, since the mirrored half would be a copy of a matrix that fills its memory.
"""

import jax
import jax.numpy as jnp
from jax import Array

from spap_jax import backend
from spap_jax.parallel import mesh

BLOCKS = 4
"""Blocks of rows on a CPU, which compute 5/8 of the products; smaller ones take as long."""

Sum = tuple[Array, ...]
"""The blocks of rows of a sum; each has the columns up to that of its last row."""


def zeros(f: int) -> Sum:
    """Returns an empty sum for f channels."""
    ends = _ends(f)
    if len(ends) == 1:
        return (mesh.shard_rows(jnp.zeros((f, f), jnp.float32)),)
    return tuple(jnp.zeros((end - start, end), jnp.float32) for start, end in zip((0, *ends), ends, strict=False))


def added(total: Sum, h: Array) -> Sum:
    """Adds the Gram matrix of a chunk's channels, h: [N, f]."""
    # Materialise the transpose: XLA:CPU is twice as slow at a product that contracts the rows of a large array.
    transposed = jax.lax.optimization_barrier(h.T)
    ends = [block.shape[1] for block in total]
    return tuple(
        block + transposed[end - len(block) : end] @ h[:, :end] for block, end in zip(total, ends, strict=True)
    )


def whole(total: Sum) -> Array:
    """Returns the matrix [f,f] of a sum."""
    if len(total) == 1:
        return total[0]
    f = total[-1].shape[1]
    lower = jnp.concatenate([jnp.pad(block, ((0, 0), (0, f - block.shape[1]))) for block in total])
    # Not a choice between a matrix and its transpose: XLA:CPU does not finish compiling that at some sizes.
    return jnp.tril(lower) + jnp.tril(lower, -1).T


def _ends(f: int) -> list[int]:
    """Returns the end of each block of columns; there is one block if the rows are divided among devices."""
    if backend.platform() != "cpu" or mesh.row_axes(f) or f < BLOCKS:
        return [f]
    size = -(-f // BLOCKS)
    return [*range(size, f, size), f]
