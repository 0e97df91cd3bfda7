"""The device mesh of a run, with the axes ``data`` and ``model``.

Sequences are sharded along ``data``: each device processes its own, and only sums are communicated. Weights, and what
is computed from them, are sharded along ``model`` (``placement.py``) by the compiler. The rows of second moments and of
the solver's arrays are sharded along both axes; all else is replicated. Without a mesh, all functions do what a single
device does anyway. ``*_size`` and ``*_spec`` describe the mesh, ``put``, ``shard_*`` and ``replicate`` put arrays on
it, ``to_*`` bring them back.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh, get_mesh

from spap_jax.backend import one_device
from spap_jax.errors import UserError, option
from spap_jax.parallel.program import describe, is_dry
from spap_jax.settings import is_count

DATA, MODEL = "data", "model"

DATA_SPEC = PartitionSpec(DATA)
"""The spec of arrays whose leading axis is sharded over ``data``."""

_AT_ONCE = 2**30
"""Bytes that are replicated on every device at once, on their way to the hosts."""

rows_undivided = jax.make_user_context(False)
"""True where `shard_rows` divides nothing: layers that are solved at once are divided among the devices instead."""

_FOR_WEIGHTS = 0.7
"""Maximum fraction of a device's memory for weights; the rest is for what is computed with them."""


def smallest_model_size(weights: int, memory: int | None, count: int) -> int:
    """Returns how many of ``count`` devices have to share weights of so many bytes, a divisor of ``count``.

    ``memory`` is that of a device in bytes; None if it has no memory of its own, as a CPU.
    """
    if memory is None:
        return 1
    fitting = (n for n in range(1, count + 1) if count % n == 0 and weights <= n * _FOR_WEIGHTS * memory)
    return next(fitting, count)


@contextmanager
def use_mesh(count: int | None, model: int | None = 1, weights: int = 0, groups: int | None = None) -> Iterator[None]:
    """Sets the mesh for the code inside: sequences are sharded along one axis, weights along the other.

    JAX's types of 64 bits are off inside, whatever the session has set.

    Args:
        count: Number of devices. By default all of them, but only ``model`` of them if they are CPUs, since these are
            as fast together as one; see also ``groups``.
        model: Number of devices that the weights are sharded over; the sequences are sharded over ``count / model``. If
            it is None, as many as `smallest_model_size` says, or one in a run of several processes.
        weights: Bytes of the weights, for this decision.
        groups: Number of groups of ``model`` devices that are used if ``count`` is None. By default as many as there
            are, or one if the devices are CPUs.

    Raises:
        UserError: there are fewer devices, they cannot be divided in this way, or the caller has set a mesh.
    """
    around = get_abstract_mesh()
    if around.axis_names and (around.axis_names != (DATA, MODEL) or AxisType.Explicit in around.axis_types):
        raise UserError(
            f"a mesh with the axes {', '.join(map(str, around.axis_names))} is set around this call, which makes its "
            f"own: call it outside of jax.set_mesh, and give {option('devices')} and {option('model_devices')}."
        )
    if model is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        several = jax.process_count() > 1 or (count is not None and not is_count(count))
        model = 1 if several else smallest_model_size(weights, memory, count or jax.device_count())
    if not is_count(model):
        raise UserError(
            f"groups of {model} devices cannot share the weights: give {option('model_devices')} a number from 1 on."
        )
    there = jax.devices()
    if count is None:
        several = jax.process_count() > 1 or there[0].platform != "cpu"
        count = model * groups if groups else len(there) if several else model
    if not is_count(count) or count > len(there):
        raise UserError(
            f"{count} devices are asked for, but JAX sees {len(there)}: give {option('devices')} a "
            f"number from 1 to {len(there)}."
        )
    taking_part = {device.process_index for device in there[:count]}
    if len(taking_part) < jax.process_count():
        raise UserError(
            f"{count} devices are asked for, and only {len(taking_part)} of {jax.process_count()} processes have any "
            f"of them: {option('devices')} counts those of all processes; leave it out, or start fewer processes."
        )
    with (
        jax.enable_x64(False),  # programs that name no type mean one of 32 bits
        one_device(True) if count == model == 1 else jax.set_mesh(arranged(there[:count], model)),
    ):
        yield


def arranged(devices: Sequence[Any], model: int) -> Mesh:
    """Makes a mesh of devices, of which groups of ``model`` share the weights: neighbours, where links form a grid.

    `jax.make_mesh` refuses groups that take up a part of an axis of links, except on v5e.

    Raises:
        UserError: the devices cannot be divided into such groups.
    """
    if len(devices) % model:
        raise UserError(
            f"{len(devices)} devices cannot be divided into groups of {model} that share the weights: give "
            f"{option('model_devices')} a number that divides {len(devices)}."
        )
    shape = (len(devices) // model, model)
    try:
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):  # some of a slice's chips, or several slices, are no grid
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def data_size() -> int:
    """Number of devices along ``data``, over which sequences are sharded."""
    return get_abstract_mesh().shape.get(DATA, 1)


def model_size() -> int:
    """Number of devices along ``model``, over which weights are sharded."""
    return get_abstract_mesh().shape.get(MODEL, 1)


def mesh_size() -> int:
    """Number of devices of the run, along all axes of its mesh."""
    return get_abstract_mesh().size or 1


def shards_evenly(chunks: Any) -> bool:
    """Whether arrays of chunks [C, ...] are sharded, which requires that all devices get the same number."""
    count = jax.tree.leaves(chunks)[0].shape[0]
    return data_size() > 1 and count > 0 and count % data_size() == 0


def put(array: Any) -> jax.Array:
    """Puts an array of the host on the default device; arrays that are on devices stay where they are.

    ``jnp.asarray`` would compile a program for every shape. A CPU gets a copy, since ``jax.device_put`` would share the
    memory with numpy, where it may change: it is often a mapped file.
    """
    if is_dry():
        return describe(array)
    if isinstance(array, jax.Array):
        return array
    array = np.asarray(array)
    return jax.device_put(array.copy(order="K") if jax.default_backend() == "cpu" else array)


def shard_chunks(chunks: np.ndarray) -> jax.Array:
    """Shards chunks [C, ...] along ``data``; replicates them if they cannot be divided evenly.

    Every process passes all chunks and keeps the shards of its own devices.
    """
    if mesh_size() == 1:
        return put(chunks)
    spec = DATA_SPEC if shards_evenly(chunks) else PartitionSpec()
    if is_dry():
        return describe(chunks, spec)
    return jax.make_array_from_callback(chunks.shape, NamedSharding(get_mesh(), spec), lambda index: chunks[index])


def replicate(tree: Any) -> Any:
    """Replicates arrays on every device, so that a program accepts them and its own outputs alike."""
    if mesh_size() == 1:
        return tree
    if is_dry():
        return jax.tree.map(lambda array: describe(array, PartitionSpec()), tree)
    return jax.device_put(tree, NamedSharding(get_mesh(), PartitionSpec()))


def model_spec(size: int, axis: int) -> PartitionSpec:
    """The spec of an array that is sharded over ``model`` along one axis; replicated if its size cannot be divided."""
    divided = model_size() > 1 and size % model_size() == 0
    return PartitionSpec(*[None] * axis, MODEL) if divided else PartitionSpec()


def shard_rows(matrix: jax.Array) -> jax.Array:
    """Shards the rows of a matrix over all devices, inside a jitted program; see `row_axes`."""
    axes = row_axes(matrix.shape[0])
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec(axes)) if axes else matrix


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes over which rows are sharded: all, only ``model`` inside `vmap_over_data`, none if not divisible."""
    if rows_undivided.value:
        return ()
    mesh = get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    for axes in ((MODEL, DATA), (MODEL,)):
        there = tuple(name for name in axes if name in free)
        count = math.prod(mesh.shape[name] for name in there)
        if count > 1 and rows % count == 0:
            return there
    return ()


def array_to_host(array: jax.Array) -> np.ndarray:
    """Gathers an array on the host of every process; all processes have to call this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return gathered(array)


def gathered(array: jax.Array, most: int = _AT_ONCE) -> np.ndarray:
    """Gathers a sharded array on the host of every process; all processes have to call this.

    ``most`` is the number of bytes that are replicated on every device at once, or a single row if that is larger.
    """
    count = len(array)
    rows = min(count, max(1, most * count // array.nbytes))
    found = np.empty(array.shape, array.dtype)
    for start in range(0, count, rows):
        first = min(start, count - rows)  # all parts have the same shape, and one program slices them
        part = jax.lax.dynamic_slice_in_dim(array, np.int32(first), rows)
        found[first : first + rows] = replicate(part).addressable_data(0)
    return found


def to_process(tree: Any) -> Any:
    """Brings arrays to this process, for what it computes without the others; all processes have to call this."""
    return tree if jax.process_count() == 1 else jax.tree.map(array_to_host, tree)


def constrain_replicated(array: jax.Array) -> jax.Array:
    """Replicates an array, inside a jitted program; inside `vmap_over_data`, on its own devices along ``model``."""
    return array if mesh_size() == 1 else jax.lax.with_sharding_constraint(array, PartitionSpec())


def divide_along_model(array: jax.Array, axis: int) -> jax.Array:
    """Divides an axis along ``model`` if its size is divisible, inside a jitted program; see `constrain_replicated`."""
    if mesh_size() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, model_spec(array.shape[axis], axis))


def divide_along_data(array: jax.Array) -> jax.Array:
    """Divides the first axis along ``data`` if its size is divisible, inside a jitted program."""
    if data_size() == 1 or len(array) % data_size():
        return array
    return jax.lax.with_sharding_constraint(array, DATA_SPEC)
