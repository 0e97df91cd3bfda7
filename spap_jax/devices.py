"""The devices of a run: a mesh of two axes, ``data`` by ``model``.

Over ``data`` the calibration sequences are spread. They do not see each other, so each device works on its own chunks
of them and what travels are sums: one reduction for all second moments of a layer, one for the gradient of a step.
Over ``model`` weights are divided (``placement.py``), and with them what is computed from them: the compiler partitions
the programs along this axis and puts the exchange in. Everything else lies on all devices. Code that runs under
``sharing`` asks for the mesh around it; without one, all of this is what a single device does anyway.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import AxisType, NamedSharding, PartitionSpec, get_abstract_mesh, get_mesh

from spap_jax.errors import UserError, option
from spap_jax.settings import is_count

_DATA, _MODEL = "data", "model"


def leads() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def from_leader(arrays: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of numpy arrays of the process that leads, in every process, which all have to call this.

    The arrays travel as whole numbers of their width: a sum over the processes, which is what a broadcast is, would
    turn -0 into 0.

    Args:
        arrays: What the leading process gives; what another one gives is ignored.
    """
    if jax.process_count() == 1:
        return arrays
    flat: Any = flatten_dict(arrays, sep="/") if leads() else {}
    text = json.dumps({name: [a.dtype.name, a.shape] for name, a in flat.items()}).encode()
    length = int(broadcast_one_to_all(np.int32(len(text))))
    text = bytes(broadcast_one_to_all(np.frombuffer(text if leads() else bytes(length), np.uint8)))
    given = {}
    for name, (dtype, shape) in json.loads(text).items():
        array = np.asarray(flat[name], order="C") if leads() else np.zeros(shape, dtype)
        given[name] = broadcast_one_to_all(array.view(f"u{array.itemsize}")).view(dtype)
    return unflatten_dict(given, sep="/")


@contextmanager
def sharing(count: int | None, model: int = 1) -> Iterator[None]:
    """Spreads the sequences, and divides the weights, of what runs inside over devices.

    Args:
        count: How many; where absent all of them, but no more of a CPU's than weights are divided among, since these
            are as fast together as one.
        model: Among how many of them the weights are divided; the sequences are spread over ``count / model``.

    Raises:
        UserError: there are not as many, or they cannot be divided so.
    """
    if not is_count(model):
        raise UserError(f"groups of {model} devices cannot share the weights: give --model-devices a number from 1 on.")
    there = jax.devices()
    several = jax.process_count() > 1 or there[0].platform != "cpu"
    count = (len(there) if several else model) if count is None else count
    if not is_count(count) or count > len(there):
        raise UserError(
            f"{count} devices are asked for, but JAX sees {len(there)}: give {option('devices')} a "
            f"number from 1 to {len(there)}."
        )
    if count % model:
        raise UserError(
            f"{count} devices cannot be divided into groups of {model} that share the weights: give "
            f"{option('model_devices')} a number that divides {count}."
        )
    if count == 1:
        yield
        return
    shape, types = (count // model, model), (AxisType.Auto, AxisType.Auto)
    with jax.set_mesh(jax.make_mesh(shape, (_DATA, _MODEL), axis_types=types, devices=there[:count])):
        yield


def number() -> int:
    """Over how many devices sequences are spread here."""
    return get_abstract_mesh().shape.get(_DATA, 1)


def sharers() -> int:
    """Among how many devices weights are divided here."""
    return get_abstract_mesh().shape.get(_MODEL, 1)


def everyone() -> int:
    """How many devices a run has, along all axes of its mesh."""
    return get_abstract_mesh().size or 1


def divides(chunks: Any) -> bool:
    """Whether arrays of chunks [C, ...] are spread, each device having as many as any other."""
    count = jax.tree.leaves(chunks)[0].shape[0]
    return number() > 1 and count > 0 and count % number() == 0


def spread(chunks: np.ndarray) -> jax.Array:
    """Chunks [C, ...] on the devices, each device having its own; all on each where they cannot be divided.

    Every process gives all of them and keeps its devices' share.
    """
    if everyone() == 1:
        return jnp.asarray(chunks)
    spec = PartitionSpec(_DATA) if divides(chunks) else PartitionSpec()
    return jax.make_array_from_callback(chunks.shape, NamedSharding(get_mesh(), spec), lambda index: chunks[index])


def everywhere(tree: Any) -> Any:
    """Arrays on every device, so that a program takes them and what it made of them alike."""
    return tree if everyone() == 1 else jax.device_put(tree, NamedSharding(get_mesh(), PartitionSpec()))


def share_of(size: int, axis: int) -> PartitionSpec:
    """How an array lies that is divided along an axis of some size; undivided if the size cannot be divided evenly."""
    divided = sharers() > 1 and size % sharers() == 0
    return PartitionSpec(*[None] * axis, _MODEL) if divided else PartitionSpec()


def by_rows(matrix: jax.Array) -> jax.Array:
    """A matrix inside of a program, each device having its share of the rows."""
    spec = share_of(matrix.shape[0], 0)
    return jax.lax.with_sharding_constraint(matrix, spec) if spec else matrix


def stacked(array: jax.Array) -> NamedSharding | None:
    """Where a stack of arrays like one lies: each of them where that one does; anywhere without a mesh."""
    if everyone() == 1:
        return None
    assert isinstance(array.sharding, NamedSharding)  # it lies on the mesh
    return NamedSharding(get_mesh(), PartitionSpec(None, *array.sharding.spec))


def whole(tree: Any) -> Any:
    """Arrays that devices have shares of as arrays of this process, one after the other; all processes call this."""
    if sharers() == 1:
        return tree
    return jax.tree.map(lambda a: np.asarray(a if a.is_fully_addressable else everywhere(a)), tree)


def alone(tree: Any) -> Any:
    """Arrays that lie on every device, as a process has them to itself: for what it computes without the others."""
    return tree if jax.process_count() == 1 else jax.tree.map(lambda a: jnp.asarray(a.addressable_data(0)), tree)


def total(sums: Callable[..., Any], chunks: Any, *alike: Any) -> Any:
    """``sums(chunks, *alike)``, sums over the chunks: each device adds up its own, then one reduction the devices'.

    What lies on every device may also be closed over, but for what gradients are taken through, or a part is taken of
    by an index: JAX refuses that.
    """
    if not divides(chunks):
        return sums(chunks, *alike)

    def own(chunks: Any, *alike: Any) -> Any:
        return jax.lax.psum(sums(chunks, *alike), _DATA)

    given = (PartitionSpec(_DATA), *(PartitionSpec() for _ in alike))
    return jax.shard_map(own, in_specs=given, out_specs=PartitionSpec(), axis_names={_DATA}, check_vma=False)(
        chunks, *alike
    )


def apart(change: Callable[..., Any], chunks: Any, *alike: Any) -> Any:
    """``change(chunks, *alike)``, which treats each chunk by itself: each device treats its own."""
    if not divides(chunks):
        return change(chunks, *alike)
    spec = PartitionSpec(_DATA)
    given = (spec, *(PartitionSpec() for _ in alike))
    return jax.shard_map(change, in_specs=given, out_specs=spec, axis_names={_DATA}, check_vma=False)(chunks, *alike)


def draw(chunks: Any, places: tuple[jax.Array, ...]) -> Any:
    """Picks of chunks [C, B, ...], spread over the devices where their number allows: [P, ...].

    Each device gives what it has of them, so that no device ever sees all chunks.

    Args:
        chunks: Arrays with the same leading axes.
        places: An index [P] for each of these axes, or for the first ones.
    """
    if not divides(chunks):
        return jax.tree.map(lambda a: a[places], chunks)
    evenly = len(places[0]) % number() == 0

    def own(a: jax.Array) -> jax.Array:
        chunk = places[0] - jax.lax.axis_index(_DATA) * len(a)
        mine = (chunk >= 0) & (chunk < len(a))
        picked = a[(jnp.clip(chunk, 0, len(a) - 1), *places[1:])]
        picked = jnp.where(mine.reshape(-1, *[1] * (picked.ndim - 1)), picked, 0)
        return jax.lax.psum_scatter(picked, _DATA, tiled=True) if evenly else jax.lax.psum(picked, _DATA)

    given = PartitionSpec(_DATA) if evenly else PartitionSpec()
    return jax.tree.map(
        jax.shard_map(own, in_specs=PartitionSpec(_DATA), out_specs=given, axis_names={_DATA}, check_vma=False), chunks
    )


def give(own: Any, item: Any, place: int | jax.Array) -> Any:
    """Gives one device something of its own: [devices, ...] of which each has its part, and nothing is sent.

    Args:
        own: What the devices have; None where they have nothing yet.
        item: What the device at ``place`` gets, and those after it until they get something else; it lies on all.
        place: Number of a device, along all axes of the mesh.
    """
    axes = get_abstract_mesh().axis_names

    def take(own: Any, item: Any) -> Any:
        new = jax.tree.map(lambda a: a[None], item)
        if own is None:
            return new
        return jax.tree.map(lambda a, b: jnp.where(jax.lax.axis_index(axes) >= place, a, b), new, own)

    if not axes:
        return take(None, item)
    given = (PartitionSpec(axes), PartitionSpec())
    return jax.shard_map(take, in_specs=given, out_specs=PartitionSpec(axes), check_vma=False)(own, item)


def each(solve: Callable[..., Any], own: Any, *alike: Any) -> Any:
    """``solve(item, number, *alike)`` of what each device has of its own; the results [devices, ...] go to all.

    Args:
        solve: What each device does by itself; its number is that along all axes of the mesh.
        own: What ``give`` gave.
        alike: What lies on all devices.
    """
    axes = get_abstract_mesh().axis_names

    def one(number: int | jax.Array, own: Any, *alike: Any) -> Any:
        return solve(jax.tree.map(lambda a: a[0], own), number, *alike)

    def told(own: Any, *alike: Any) -> Any:
        return jax.lax.all_gather(one(jax.lax.axis_index(axes), own, *alike), axes)

    if not axes:
        return jax.tree.map(lambda a: a[None], one(0, own, *alike))
    given = (PartitionSpec(axes), *(PartitionSpec() for _ in alike))
    return jax.shard_map(told, in_specs=given, out_specs=PartitionSpec(), check_vma=False)(own, *alike)
