"""Placement of the weights of a run, which are sharded along the mesh axis ``model``.

The letters of a weight's rule decide which axis is sharded: attention heads, MLP channels, or the vocabulary of
embedding and head; other weights, and sizes that cannot be divided evenly, are replicated. For steps on many blocks,
weights, gradients and optimizer states are sharded along ``data`` too (``fully_shard_params``), and a program gathers
the weights of one block at a time (``gather_params``).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

from spap_jax.models import FAMILIES, DecoderConfig, Family, Params, map_named
from spap_jax.models.host_arrays import stacked
from spap_jax.parallel import mesh
from spap_jax.parallel.program import describe, is_dry, program

_DIVIDED = "fnmv"
"""Letters of the axes that are sharded; a weight has at most one of them."""

Spec = Callable[[Family, str, tuple[int, ...]], PartitionSpec]
"""The spec of a parameter by its family, path and shape."""


def shard_params(config: DecoderConfig, params: Params) -> Params:
    """Shards parameters over the devices; inside a jitted program, constrains the sharding of its values.

    ``params`` is the whole tree, a part of it, or one layer's: arrays, or objects that numpy reads as arrays.
    """
    return _laid_out(config, params, param_spec)


def read(params: Params) -> Params:
    """Reads parameters that are still in files to the host's memory; any thread may do so, since it uses no device."""
    return jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), params)


def bytes_of(params: Any) -> int:
    """The number of bytes of the arrays of a tree, which may be values that are read lazily."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))


def layer_to_host(layer: Params) -> Params:
    """Brings one layer to the host of every process; all processes have to call this."""
    return jax.tree.map(np.asarray, mesh.to_process(layer))


def stack_layers(layers: list[Params]) -> Params:
    """Stacks layers [L, ...] on the host, and clears the list, so that only one weight of all is in memory twice."""
    flat: list[dict[str, Any]] = [dict(flatten_dict(layer, sep="/")) for layer in layers]
    layers.clear()
    return unflatten_dict({name: stacked([each.pop(name) for each in flat]) for name in [*flat[0]]}, sep="/")


def place_params(config: DecoderConfig, params: Params, count: int | None = None, sharers: int | None = None) -> Params:
    """Places a tree of parameters on one device, or shards them over as many as share the weights; see `mesh.use_mesh`.

    Args:
        params: The whole tree; arrays, or values that are read lazily.
        sharers: Number of devices over which the weights are sharded. By default as many as the weights need.
    """
    with mesh.use_mesh(count, sharers, bytes_of(params)):
        return shard_params(config, params) if mesh.model_size() > 1 else jax.tree.map(_on_one_device, params)


def _on_one_device(array: Any) -> jax.Array:
    """Returns an array on one device; one that several share is brought to the first."""
    if is_dry():
        return describe(array)
    shared = isinstance(array, jax.Array) and not isinstance(array, Tracer) and len(array.sharding.device_set) > 1
    return jax.device_put(array, jax.local_devices()[0]) if shared else mesh.put(array)


def param_spec(family: Family, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of a parameter on the mesh.

    Args:
        path: Path of the parameter in the tree, or in one layer's.
        shape: Shape of the parameter, with the axis L if it is stacked.
    """
    top = path.split("/")[0]
    letters = family.letters(path if top in ("embed", "layers", "head") else f"layers/{path}")
    stacked = int(top == "layers")
    found = [axis for axis, letter in enumerate(letters, start=stacked) if letter in _DIVIDED]
    return mesh.model_spec(shape[found[0]], found[0]) if found else PartitionSpec()


def fully_shard_params(config: DecoderConfig, params: Params) -> Params:
    """Shards parameters over all devices, along ``data`` too; inside a jitted program, constrains their sharding."""
    return _laid_out(config, params, fully_sharded_spec)


def fully_sharded_spec(family: Family, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of a parameter that is sharded along ``data`` too: its largest other axis that can be divided evenly.

    The axis L of a stack is never divided, so that a block's part of every weight is on every device. Arguments are as
    in `param_spec`.
    """
    spec = [*param_spec(family, path, shape), *[None] * len(shape)][: len(shape)]
    free = [axis for axis in range(int(path.startswith(("layers/", "updates/"))), len(shape)) if spec[axis] is None]
    axis = max((a for a in free if shape[a] % mesh.data_size() == 0), key=lambda a: shape[a], default=None)
    if axis is None or mesh.data_size() == 1:
        return PartitionSpec(*spec)
    return PartitionSpec(*spec[:axis], mesh.DATA, *spec[axis + 1 :])


def zeros_for_blocks(config: DecoderConfig, layer: Params, spec: Spec) -> Params:
    """Allocates a stack of zeros for all blocks with the shapes of ``layer``.

    ``spec`` is `param_spec` or `fully_sharded_spec`, and says how the stack is sharded.
    """
    flat: dict[str, Any] = dict(flatten_dict(layer, sep="/"))
    shapes = tuple((name, (config.layers, *array.shape), array.dtype) for name, array in flat.items())
    return unflatten_dict(_zeros(config.family, shapes, spec), sep="/")


@program(static_argnames=("family", "shapes", "spec"))
def _zeros(family: str, shapes: tuple[tuple[str, tuple[int, ...], Any], ...], spec: Spec) -> dict[str, jax.Array]:
    zeros = {name: jnp.zeros(shape, dtype) for name, shape, dtype in shapes}
    if mesh.mesh_size() == 1:
        return zeros
    constrain = jax.lax.with_sharding_constraint
    return {
        name: constrain(array, spec(FAMILIES[family], f"layers/{name}", array.shape)) for name, array in zeros.items()
    }


def gather_params(config: DecoderConfig, params: Params, dtype: Any) -> Params:
    """Gathers parameters that are sharded as by ``fully_shard_params`` along ``data``, inside a jitted program.

    Matrices are converted to ``dtype`` before; vectors stay as they are. Gradients are scattered in turn. ``params``
    are parts of the tree outside the blocks, or of one layer's.
    """
    family, alone = FAMILIES[config.family], mesh.mesh_size() == 1

    def one(name: str, array: jax.Array) -> jax.Array:
        kind = dtype if array.ndim > 1 else array.dtype
        if alone:
            return array.astype(kind)
        whole, part = (f(family, name, array.shape) for f in (param_spec, fully_sharded_spec))
        return _gathered(array, whole, part, kind)

    return map_named(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(array: jax.Array, whole: PartitionSpec, part: PartitionSpec, dtype: Any) -> jax.Array:
    # The constraint on the part makes the compiler convert before it gathers.
    array = jax.lax.with_sharding_constraint(array.astype(dtype), part)
    return jax.lax.with_sharding_constraint(array, whole)


def _gather(array: jax.Array, whole: PartitionSpec, part: PartitionSpec, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return _gathered(array, whole, part, dtype), jnp.zeros(0, array.dtype)


def _scatter(_: PartitionSpec, part: PartitionSpec, __: Any, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, part).astype(like.dtype),)


_gathered.defvjp(_gather, _scatter)


def _laid_out(config: DecoderConfig, params: Params, spec: Spec) -> Params:
    if mesh.mesh_size() == 1:
        return jax.tree.map(_on_one_device if mesh.one_device.value else mesh.put, params)
    family = FAMILIES[config.family]
    return map_named(lambda name, array: _shard(array, spec(family, name, array.shape)), params)


def _shard(array: Any, spec: PartitionSpec) -> jax.Array:
    if isinstance(array, Tracer):
        return jax.lax.with_sharding_constraint(array, spec)
    if is_dry():
        return describe(array, spec)
    place = NamedSharding(get_mesh(), spec)
    if isinstance(array, jax.Array) and (jax.process_count() == 1 or not array.is_fully_addressable):
        return jax.device_put(array, place)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])
