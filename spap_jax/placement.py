"""Where the weights of a run lie: each device of the mesh's axis ``model`` has its share of them.

Which axis of a weight is divided follows from the letters of its rule: the heads of attention, the channels of an MLP,
the vocabulary of embedding and head. What has none of them, or not as many as could be divided evenly, lies on every
device.
"""

import functools
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
"""Letters of the axes that are divided; a weight has one of them at most."""


def placed(config: DecoderConfig, params: Params) -> Params:
    """Parameters as arrays of the devices, each of which gets its share; inside of a program, the same for its values.

    Args:
        config: Of the decoder, for its family.
        params: The whole tree, a part of it, or one layer's; arrays, or what gives the part that an index asks for.
    """
    if devices.everyone() == 1:
        return jax.tree.map(jnp.asarray, params)
    family = FAMILIES[config.family]

    def one(path: Any, array: Any) -> jax.Array:
        return _put(array, spec_of(family, jax.tree_util.keystr(path, simple=True, separator="/"), array.shape))

    return jax.tree_util.tree_map_with_path(one, params)


def spec_of(family: Family, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter lies on the mesh.

    Args:
        family: The table of its rules.
        path: In the parameter tree, or in one layer's.
        shape: Its own, with the axis L where it is stacked.
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

    @functools.cache  # devices that differ in their sequences alone have the same part
    def part(*spans: tuple[int | None, int | None]) -> np.ndarray:
        return np.asarray(array[tuple(slice(*span) for span in spans)])

    def read(index: Any) -> np.ndarray:
        return part(*((cut.start, cut.stop) for cut in index))

    return jax.make_array_from_callback(array.shape, place, read)
