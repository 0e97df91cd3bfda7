"""Placement of the weights of a run, which are sharded along the mesh axis ``model``.

The letters of a weight's rule decide which axis is sharded: attention heads, MLP channels, or the vocabulary of
embedding and head. Weights without such an axis, or with a size that cannot be divided evenly, are replicated.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

from spap_jax import devices
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.families import Family
from spap_jax.models.registry import FAMILIES

_DIVIDED = "fnmv"
"""Letters of the axes that are sharded; a weight has at most one of them."""


def placed(config: DecoderConfig, params: Params) -> Params:
    """Shards parameters over the devices; inside a jitted program, constrains the sharding of its values.

    Args:
        config: Config of the decoder, for its family.
        params: The whole tree, a part of it, or one layer's; arrays, or objects that return the part that an index
            selects.
    """
    if devices.everyone() == 1:
        return jax.tree.map(jnp.asarray, params)
    family = FAMILIES[config.family]

    def one(path: Any, array: Any) -> jax.Array:
        return _put(array, spec_of(family, jax.tree_util.keystr(path, simple=True, separator="/"), array.shape))

    return jax.tree_util.tree_map_with_path(one, params)


def bytes_of(params: Any) -> int:
    """The number of bytes of the arrays of a tree, which may be values that are read lazily."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))


def stacked(layers: list[Params]) -> Params:
    """Stacks layers [L, ...] on the host, and clears the list, so that at most two copies are in memory."""
    stack = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    layers.clear()
    return stack


def fitting(config: DecoderConfig, params: Params, count: int | None = None, sharers: int | None = None) -> Params:
    """Places parameters on one device, or shards them over as many as share the weights; see `devices.sharing`.

    Args:
        config: Config of the decoder.
        params: The whole tree; arrays, or values that are read lazily.
        count: Number of devices to use. By default all.
        sharers: Number of devices over which the weights are sharded. By default as many as the weights need.
    """
    with devices.sharing(count, sharers, bytes_of(params)):
        return placed(config, params) if devices.sharers() > 1 else jax.tree.map(jnp.asarray, params)


def spec_of(family: Family, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of a parameter on the mesh.

    Args:
        family: The family, which has the rules.
        path: Path of the parameter in the tree, or in one layer's.
        shape: Shape of the parameter, with the axis L if it is stacked.
    """
    top = path.split("/")[0]
    letters = family.letters(path if top in ("embed", "layers", "head") else f"layers/{path}")
    stacked = int(top == "layers")
    found = [axis for axis, letter in enumerate(letters, start=stacked) if letter in _DIVIDED]
    return devices.share_of(shape[found[0]], found[0]) if found else PartitionSpec()


def _put(array: Any, spec: PartitionSpec) -> jax.Array:
    if isinstance(array, Tracer):
        return jax.lax.with_sharding_constraint(array, spec)
    place = NamedSharding(get_mesh(), spec)
    if isinstance(array, jax.Array):
        if jax.process_count() == 1 or not array.is_fully_addressable:
            return jax.device_put(array, place)
        array = np.asarray(array)

    @functools.cache  # devices that differ only in their sequences have the same part
    def part(*spans: tuple[int | None, int | None]) -> np.ndarray:
        return np.asarray(array[tuple(slice(*span) for span in spans)])

    def read(index: Any) -> np.ndarray:
        return part(*((cut.start, cut.stop) for cut in index))

    return jax.make_array_from_callback(array.shape, place, read)
