"""The devices of a run: a mesh with one axis, ``data``, over which the calibration sequences are spread.

Sequences do not see each other, so each device works on its own chunks of them and what travels are sums: one reduction
for all second moments of a layer, one for the gradient of a step. Everything else lies on all devices. Code that runs
under ``sharing`` asks for the mesh around it; without one, all of this is what a single device does anyway.
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

from spap_jax.errors import UserError
from spap_jax.hub import first_line

_AXIS = "data"

_JOINING_SECONDS = 300
"""How long the first processes wait for the last."""

_SILENT_SECONDS = 60
"""A process that is not heard of for so long is taken for dead, and the others end too."""


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, each with its own devices; before anything is computed.

    Args:
        coordinator: Host and port of the first process; "auto" where a TPU pod or SLURM tells; no others where absent.
        processes: How many there are.
        process_id: Which of them this is, from 0.

    Raises:
        UserError: only some of the three are given, or the others do not come.
    """
    if coordinator is None and processes is None and process_id is None:
        return
    alone = coordinator == "auto"
    if not alone and None in (coordinator, processes, process_id):
        raise UserError(
            "a run of several processes needs all of --coordinator HOST:PORT, --processes and --process-id; "
            "on a TPU pod or under SLURM --coordinator auto is enough."
        )
    try:
        jax.distributed.initialize(
            None if alone else coordinator,
            processes,
            process_id,
            initialization_timeout=_JOINING_SECONDS,
            heartbeat_timeout_seconds=_SILENT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run could not be joined: {first_line(error)}.") from error


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
def sharing(count: int | None) -> Iterator[None]:
    """Spreads the sequences of what runs inside over devices.

    Args:
        count: How many; where absent all of them, but one of a CPU's, which are as fast together as one.

    Raises:
        UserError: there are not as many.
    """
    there = jax.devices()
    several = jax.process_count() > 1 or there[0].platform != "cpu"
    count = count or (len(there) if several else 1)
    if not 1 <= count <= len(there):
        raise UserError(f"{count} devices are asked for, but JAX sees {len(there)}; name a number from 1 to that.")
    if count == 1:
        yield
        return
    with jax.set_mesh(jax.make_mesh((count,), (_AXIS,), axis_types=(AxisType.Auto,), devices=there[:count])):
        yield


def number() -> int:
    """Over how many devices sequences are spread here."""
    return get_abstract_mesh().shape.get(_AXIS, 1)


def divides(chunks: Any) -> bool:
    """Whether arrays of chunks [C, ...] are spread, each device having as many as any other."""
    count = jax.tree.leaves(chunks)[0].shape[0]
    return number() > 1 and count > 0 and count % number() == 0


def spread(chunks: np.ndarray) -> jax.Array:
    """Chunks [C, ...] on the devices, each device having its own; all on each where they cannot be divided.

    Every process gives all of them and keeps its devices' share.
    """
    if number() == 1:
        return jnp.asarray(chunks)
    spec = PartitionSpec(_AXIS) if divides(chunks) else PartitionSpec()
    return jax.make_array_from_callback(chunks.shape, NamedSharding(get_mesh(), spec), lambda index: chunks[index])


def everywhere(tree: Any) -> Any:
    """Arrays on every device, so that a program takes them and what it made of them alike."""
    return tree if number() == 1 else jax.device_put(tree, NamedSharding(get_mesh(), PartitionSpec()))


def total(sums: Callable[..., Any], chunks: Any, *alike: Any) -> Any:
    """``sums(chunks, *alike)``, sums over the chunks: each device adds up its own, then one reduction the devices'.

    What lies on every device may also be closed over, but for what gradients are taken through: JAX refuses that.
    """
    if not divides(chunks):
        return sums(chunks, *alike)

    def own(chunks: Any, *alike: Any) -> Any:
        return jax.lax.psum(sums(chunks, *alike), _AXIS)

    given = (PartitionSpec(_AXIS), *(PartitionSpec() for _ in alike))
    return jax.shard_map(own, in_specs=given, out_specs=PartitionSpec(), check_vma=False)(chunks, *alike)


def apart(change: Callable[[Any], Any], chunks: Any) -> Any:
    """``change(chunks)``, which treats each chunk by itself: each device treats its own."""
    if not divides(chunks):
        return change(chunks)
    spec = PartitionSpec(_AXIS)
    return jax.shard_map(change, in_specs=spec, out_specs=spec, check_vma=False)(chunks)


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
        chunk = places[0] - jax.lax.axis_index(_AXIS) * len(a)
        mine = (chunk >= 0) & (chunk < len(a))
        picked = a[(jnp.clip(chunk, 0, len(a) - 1), *places[1:])]
        picked = jnp.where(mine.reshape(-1, *[1] * (picked.ndim - 1)), picked, 0)
        return jax.lax.psum_scatter(picked, _AXIS, tiled=True) if evenly else jax.lax.psum(picked, _AXIS)

    given = PartitionSpec(_AXIS) if evenly else PartitionSpec()
    return jax.tree.map(jax.shard_map(own, in_specs=PartitionSpec(_AXIS), out_specs=given, check_vma=False), chunks)
