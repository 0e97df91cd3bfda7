"""Computation that the devices of the mesh share: what each does with its own part, and what they then exchange.

Along ``data``, each device computes on its own chunks, and sums are added up by one psum; along ``model``, the compiler
partitions the same programs. Without a mesh, all functions do what a single device does anyway.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spap_jax.parallel.mesh import (
    DATA,
    DATA_SPEC,
    MODEL,
    data_size,
    mesh_size,
    model_size,
    row_axes,
    shard_rows,
    shards_evenly,
)


def psum_over_chunks(sums: Callable[..., Any], chunks: Any, *alike: Any) -> Any:
    """Computes ``sums(chunks, *alike)``, sums over the chunks: each device sums its own, then one psum adds them up.

    Replicated arrays may also be closed over, but JAX refuses that where gradients are taken or they are indexed.
    """
    if not shards_evenly(chunks):
        return sums(chunks, *alike)

    def own(chunks: Any, *alike: Any) -> Any:
        return jax.lax.psum(sums(chunks, *alike), DATA)

    return shard_map_over_data(own, (DATA_SPEC, *(PartitionSpec() for _ in alike)), PartitionSpec())(chunks, *alike)


def psum_scatter_over_chunks(sums: Callable[..., tuple[Any, Any]], chunks: Any) -> tuple[Any, Any]:
    """Like `psum_over_chunks`, for ``sums`` that returns (matrices, others); the matrices end as by `shard_rows`.

    A device sums its own tokens in the whole matrices, divided over ``model`` alone, and keeps its rows of the total.
    """
    if not shards_evenly(chunks):
        matrices, others = sums(chunks)
        return jax.tree.map(shard_rows, matrices), others
    rows = {a.shape[0] for a in jax.tree.leaves(jax.eval_shape(sums, chunks)[0])}
    if any(DATA not in row_axes(count) for count in rows):
        return psum_over_chunks(sums, chunks)

    def own(chunks: Any) -> tuple[Any, Any]:
        matrices, others = sums(chunks)
        # The share of a device along ``data`` lies within that of its devices along ``model``.
        within = jax.tree.map(lambda a: a.reshape(model_size(), -1, a.shape[1]), matrices)
        return by_sharers(within), jax.lax.psum(others, DATA)

    # The compiler would gather an array that it partitions itself, to reduce and scatter it.
    by_sharers = jax.shard_map(
        lambda within: jax.lax.psum_scatter(within, DATA, scatter_dimension=1, tiled=True),
        in_specs=PartitionSpec(MODEL), out_specs=PartitionSpec(MODEL), axis_names={MODEL}, check_vma=False,
    )  # fmt: skip

    matrices, others = shard_map_over_data(own, (DATA_SPEC,), (PartitionSpec(None, DATA), PartitionSpec()))(chunks)
    return jax.tree.map(lambda a: shard_rows(a.reshape(-1, a.shape[2])), matrices), others


def map_chunks(change: Callable[..., Any], chunks: Any, *alike: Any) -> Any:
    """Computes ``change(chunks, *alike)``, which treats chunks independently, on each device's own chunks."""
    if not shards_evenly(chunks):
        return change(chunks, *alike)
    return shard_map_over_data(change, (DATA_SPEC, *(PartitionSpec() for _ in alike)), DATA_SPEC)(chunks, *alike)


def shard_map_over_data(function: Callable[..., Any], given: tuple[Any, ...], out: Any) -> Callable[..., Any]:
    """Returns the function that each device computes on its own part along ``data``.

    ``given`` and ``out`` are the specs of arguments and results; along ``model``, the compiler partitions it.
    """
    # The check of values that vary across devices (check_vma) mistakes constants in the carries of loops for an error.
    return jax.shard_map(function, in_specs=given, out_specs=out, axis_names={DATA}, check_vma=False)


def take_from_chunks(chunks: Any, places: tuple[jax.Array, ...]) -> Any:
    """Picks items [P, ...] from chunks [C, B, ...]; they are sharded if P can be divided evenly.

    Each device contributes the items that it holds, so that no device ever holds all chunks. ``places`` are index
    arrays [P] for the leading axes, or for the first ones.
    """
    if not shards_evenly(chunks):
        return jax.tree.map(lambda a: a[places], chunks)
    evenly = len(places[0]) % data_size() == 0

    def own(a: jax.Array) -> jax.Array:
        chunk = places[0] - jax.lax.axis_index(DATA) * len(a)
        mine = (chunk >= 0) & (chunk < len(a))
        picked = a[(jnp.clip(chunk, 0, len(a) - 1), *places[1:])]
        picked = jnp.where(mine.reshape(-1, *[1] * (picked.ndim - 1)), picked, 0)
        return jax.lax.psum_scatter(picked, DATA, tiled=True) if evenly else jax.lax.psum(picked, DATA)

    given = DATA_SPEC if evenly else PartitionSpec()
    return jax.tree.map(shard_map_over_data(own, (DATA_SPEC,), given), chunks)


def vmap_over_data(function: Callable[..., Any], *by_device: Any) -> Any:
    """Maps a function over arrays [devices, ...] of which each device along ``data`` has its own."""
    if mesh_size() == 1:  # without an axis of length 1, beside which XLA's sums on CPUs are ten times as slow
        alone = function(*jax.tree.map(lambda a: a[0], by_device))
        return jax.tree.map(lambda a: a[None], alone)
    own = jax.lax.with_sharding_constraint(by_device, PartitionSpec(DATA))
    return jax.vmap(function, spmd_axis_name=DATA)(*own)
