"""The device mesh of a run, with the axes ``data`` and ``model``.

Calibration sequences are sharded along ``data``. They are independent, so each device processes its own chunks, and
only sums are communicated: those of a layer's second moments, and of the gradient of a step. Weights are sharded along
``model`` (``placement.py``), and so is what is computed from them: the compiler partitions the programs along this axis
and inserts the collectives. The rows of second moments, and of the solver's arrays, are sharded along both axes.
Everything else is replicated. Code under ``use_mesh`` uses the mesh around it; without a mesh, all functions do what a
single device does anyway.

Names say what happens in JAX's words: ``*_size`` and ``*_spec`` describe the mesh, ``shard_*``, ``replicate`` and
``from_parts`` put arrays on it, ``to_*`` and ``parts_of`` bring them back; ``map_*``, ``psum_*``, ``take_*``,
``shard_map_*`` compute.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.mesh_utils import create_device_mesh
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh, get_mesh

from spap_jax.backend import platform, quick_compilation
from spap_jax.errors import UserError, option
from spap_jax.settings import is_count

DATA, _MODEL = "data", "model"

DATA_SPEC = PartitionSpec(DATA)
"""The spec of arrays whose leading axis is sharded over ``data``."""

_AT_ONCE = 2**30
"""Bytes that are replicated on every device at once, on their way to the hosts."""

_MEETINGS = itertools.count()
"""Numbers of the moments at which processes wait for each other; all pass them in the same order."""

_PATIENCE = 86400
"""Seconds that a process waits for the others, of which the leading one may have much to read or to write."""

one_device = jax.make_user_context(False)
"""True in a run on one device, although there may be others; see `division_is_known`."""

_FOR_WEIGHTS = 0.7
"""Maximum fraction of a device's memory for weights; the rest is for what is computed with them."""


def leads() -> bool:
    """Whether this is the leading process, which prints and writes."""
    return jax.process_index() == 0


def meet() -> None:
    """Waits until all processes have come here; a collective computation waits for some minutes only."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    everyone = set(range(jax.process_count()))
    multihost.sync_global_processes(f"meeting {next(_MEETINGS)}", timeout=_PATIENCE, processes=everyone)


def broadcast_from_leader(arrays: dict[str, Any]) -> dict[str, Any]:
    """Broadcasts nested dicts of numpy arrays from the leading process; all processes have to call this.

    The arrays are sent as integers of the same width: a broadcast is a sum over processes, which would turn -0 into 0.

    Args:
        arrays: The arrays of the leading process; those of other processes are ignored.
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


def told_to_all(told: Any) -> Any:
    """Broadcasts a JSON-serialisable value from the leading process; all processes have to call this."""
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    return json.loads(broadcast_from_leader({"told": text})["told"].tobytes())


def known_to_all(numbers: Iterable[int]) -> set[int]:
    """Returns those of this process's numbers that every process has; all processes have to call this."""
    mine = set(numbers)
    asked = told_to_all(sorted(mine))  # what the leading process does not have, not all have
    if jax.process_count() == 1 or not asked:
        return set(asked)
    known = process_allgather(np.array([number in mine for number in asked]))
    return {number for number, by_all in zip(asked, known.all(axis=0), strict=True) if by_all}


def smallest_model_size(weights: int, memory: int | None, count: int) -> int:
    """Returns how many of ``count`` devices have to share weights of this size, a divisor of ``count``.

    Args:
        weights: Bytes of the weights.
        memory: Bytes of memory of a device; None if it has no memory of its own, as a CPU.
        count: Number of devices.
    """
    if memory is None:
        return 1
    fitting = (n for n in range(1, count + 1) if count % n == 0 and weights <= n * _FOR_WEIGHTS * memory)
    return next(fitting, count)


@contextmanager
def use_mesh(count: int | None, model: int | None = 1, weights: int = 0, groups: int | None = None) -> Iterator[None]:
    """Sets the mesh for the code inside: sequences are sharded along one axis, weights along the other.

    Args:
        count: Number of devices. By default all of them, but only ``model`` of them if they are CPUs, since these are
            as fast together as one; see also ``groups``.
        model: Number of devices that the weights are sharded over; the sequences are sharded over ``count / model``.
            If it is None, as many as `smallest_model_size` says, or one in a run of several processes.
        weights: Bytes of the weights, for this decision.
        groups: Number of groups of ``model`` devices that are used if ``count`` is None. By default as many as there
            are, or one if the devices are CPUs.

    Raises:
        UserError: there are fewer devices, or they cannot be divided in this way; or a mesh of the caller's own is set.
    """
    check_mesh_around()
    if model is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        several = jax.process_count() > 1 or (count is not None and not is_count(count))
        model = 1 if several else smallest_model_size(weights, memory, count or jax.device_count())
    if not is_count(model):
        raise UserError(f"groups of {model} devices cannot share the weights: give --model-devices a number from 1 on.")
    there = jax.devices()
    if count is None:
        several = jax.process_count() > 1 or there[0].platform != "cpu"
        count = model * groups if groups else len(there) if several else model
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
    taking_part = {device.process_index for device in there[:count]}
    if len(taking_part) < jax.process_count():
        raise UserError(
            f"{count} devices are asked for, and only {len(taking_part)} of {jax.process_count()} processes have any "
            f"of them: {option('devices')} counts those of all processes; leave it out, or start fewer processes."
        )
    with quick_compilation(), one_device(True) if count == 1 else jax.set_mesh(arranged(there[:count], model)):
        yield


def check_mesh_around() -> None:
    """Checks that the code around has no mesh but one of `use_mesh`.

    Raises:
        UserError: It has.
    """
    mesh = get_abstract_mesh()
    if mesh.axis_names and (mesh.axis_names != (DATA, _MODEL) or AxisType.Explicit in mesh.axis_types):
        raise UserError(
            f"a mesh with the axes {', '.join(map(str, mesh.axis_names))} is set around this call, which makes its "
            f"own: call it outside of jax.set_mesh, and give {option('devices')} and {option('model_devices')}."
        )


def arranged(devices: Sequence[Any], model: int) -> Mesh:
    """Makes a mesh of devices, of which groups of ``model`` share the weights: neighbours, where links form a grid.

    `jax.make_mesh` refuses groups that take up a part of an axis of links, except on v5e.
    """
    shape = (len(devices) // model, model)
    try:
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):  # of some of a slice's chips, or of several slices
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, (DATA, _MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def only_device() -> list[Any] | None:
    """Returns the device that does all work inside `use_mesh`; None if several share it, which the mesh then names."""
    return None if mesh_size() > 1 else jax.local_devices()[:1]


def data_size() -> int:
    """Number of devices along ``data``, over which sequences are sharded."""
    return get_abstract_mesh().shape.get(DATA, 1)


def model_size() -> int:
    """Number of devices along ``model``, over which weights are sharded."""
    return get_abstract_mesh().shape.get(_MODEL, 1)


def mesh_size() -> int:
    """Number of devices of the run, along all axes of its mesh."""
    return get_abstract_mesh().size or 1


def shards_evenly(chunks: Any) -> bool:
    """Whether arrays of chunks [C, ...] are sharded, which requires that all devices get the same number."""
    count = jax.tree.leaves(chunks)[0].shape[0]
    return data_size() > 1 and count > 0 and count % data_size() == 0


def shard_chunks(chunks: np.ndarray) -> jax.Array:
    """Shards chunks [C, ...] along ``data``; replicates them if they cannot be divided evenly.

    Every process passes all chunks and keeps the shards of its own devices.
    """
    if mesh_size() == 1:
        return jnp.asarray(chunks)
    spec = DATA_SPEC if shards_evenly(chunks) else PartitionSpec()
    return jax.make_array_from_callback(chunks.shape, NamedSharding(get_mesh(), spec), lambda index: chunks[index])


def replicate(tree: Any) -> Any:
    """Replicates arrays on every device, so that a program accepts them and its own outputs alike."""
    return tree if mesh_size() == 1 else jax.device_put(tree, NamedSharding(get_mesh(), PartitionSpec()))


def model_spec(size: int, axis: int) -> PartitionSpec:
    """The spec of an array that is sharded over ``model`` along one axis; replicated if its size cannot be divided."""
    divided = model_size() > 1 and size % model_size() == 0
    return PartitionSpec(*[None] * axis, _MODEL) if divided else PartitionSpec()


def shard_rows(matrix: jax.Array) -> jax.Array:
    """Shards the rows of a matrix over all devices, inside a jitted program; see `row_axes`."""
    axes = row_axes(matrix.shape[0])
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec(axes)) if axes else matrix


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh over which rows are sharded: all, or ``model``, or none if they cannot be divided evenly.

    Inside a function that each device computes on its own part along ``data``, only ``model`` is left.
    """
    mesh = get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    for axes in ((_MODEL, DATA), (_MODEL,)):
        there = tuple(name for name in axes if name in free)
        count = math.prod(mesh.shape[name] for name in there)
        if count > 1 and rows % count == 0:
            return there
    return ()


def to_host(tree: Any) -> Any:
    """Gathers sharded arrays on the host of every process, one after the other; all processes have to call this."""
    return tree if mesh_size() == 1 else jax.tree.map(array_to_host, tree)


def array_to_host(array: jax.Array) -> np.ndarray:
    """Gathers an array on the host of every process; all processes have to call this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return gathered(array)


def gathered(array: jax.Array, most: int = _AT_ONCE) -> np.ndarray:
    """Gathers a sharded array on the host of every process; all processes have to call this.

    Args:
        array: Its rows are gathered, as many at once as ``most`` allows: no device holds the weights of all layers.
        most: Bytes that are replicated on every device at once, or a single row.
    """
    count = len(array)
    rows = min(count, max(1, most * count // array.nbytes))
    found = np.empty(array.shape, array.dtype)
    for start in range(0, count, rows):
        first = min(start, count - rows)  # all parts have the same shape, and one program slices them
        part = jax.lax.dynamic_slice_in_dim(array, np.int32(first), rows)
        found[first : first + rows] = replicate(part).addressable_data(0)
    return found


def parts_of(array: jax.Array) -> dict[str, np.ndarray]:
    """Copies the parts of an array that this process's devices hold to the host, each once, by where they begin."""
    held = {_start_of(shard.index): shard.data for shard in array.addressable_shards}
    return {start: np.asarray(part) for start, part in held.items()}


def from_parts(parts: dict[str, np.ndarray], like: jax.Array) -> jax.Array:
    """Inverts `parts_of`: an array with the shape and the sharding of ``like``.

    Raises:
        UserError: the parts are those of other devices, or there are none.
    """
    held = like.sharding.addressable_devices_indices_map(like.shape).values()
    if not {_start_of(index) for index in held} <= parts.keys():
        raise UserError(
            "what the interrupted run kept is of other devices than those of this process, or of another version of "
            f"SPAP-JAX: start its processes where they were, or start over with {option('resume', False)}."
        )
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: parts[_start_of(index)])


def _start_of(index: Any) -> str:
    """Names a part of an array by its first element; all parts of a sharded array have the same shape."""
    return "-".join(str(cut.start or 0) for cut in index) or "0"


def to_process(tree: Any) -> Any:
    """Brings arrays to this process, for what it computes without the others; all processes have to call this."""
    return tree if jax.process_count() == 1 else to_host(tree)


def psum_over_chunks(sums: Callable[..., Any], chunks: Any, *alike: Any) -> Any:
    """Computes ``sums(chunks, *alike)``, sums over the chunks: each device sums its own, then one psum adds them up.

    Replicated arrays may also be closed over, unless gradients are taken through them or they are indexed: JAX refuses
    that.
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
        in_specs=PartitionSpec(_MODEL), out_specs=PartitionSpec(_MODEL), axis_names={_MODEL}, check_vma=False,
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

    Args:
        function: What a device computes; along ``model``, the compiler partitions it.
        given: Specs of the arguments, which name no other axis.
        out: Specs of the results.
    """
    # The check of values that vary across devices (check_vma) mistakes constants in the carries of loops for an error.
    return jax.shard_map(function, in_specs=given, out_specs=out, axis_names={DATA}, check_vma=False)


def division_is_known() -> bool:
    """Whether the program that is being traced says how it is divided among devices, or runs on one.

    Elsewhere, as in ``spap.loss`` of a model that several devices share, the compiler learns it from the arrays, and
    kernels that it cannot partition must not be in it.
    """
    return mesh_size() > 1 or one_device.value or jax.device_count() == 1


def shard_map_over_heads(kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes ``kernel(q, k, v)``, which the compiler cannot partition, on each device's own heads.

    Args:
        kernel: Attention whose heads are independent of each other.
        q: [B, T, n, h].
        k: [B, m, S, h].
        v: [B, m, S, h].

    Returns:
        [B, T, n, h]; all heads on every device if the key/value heads cannot be divided evenly.
    """
    mesh = get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not free:
        return kernel(q, k, v)
    shares = model_spec(k.shape[1], 1) if _MODEL in free else PartitionSpec()
    mine = PartitionSpec(None, None, *shares[1:])
    return jax.shard_map(kernel, in_specs=(mine, shares, shares), out_specs=mine, axis_names=free, check_vma=False)(
        q, k, v
    )


def take_from_chunks(chunks: Any, places: tuple[jax.Array, ...]) -> Any:
    """Picks items [P, ...] from chunks [C, B, ...]; they are sharded if P can be divided evenly.

    Each device contributes the items that it holds, so that no device ever holds all chunks.

    Args:
        chunks: Arrays with the same leading axes.
        places: Index arrays [P] for these axes, or for the first ones.
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


def take_large_from_chunks(chunks: Any, places: tuple[jax.Array, ...]) -> Any:
    """Like `take_from_chunks`, one item after the other.

    Together, large items would take as much memory on each device as there are devices, and a gather of them by a TPU
    copies all that it picks from. CPUs take them together: they may run independent loops at the same time, and the
    collectives of two processes would meet in different orders.
    """
    if platform() == "cpu":
        return take_from_chunks(chunks, places)
    count = len(places[0])
    if not shards_evenly(chunks):
        return jax.tree.map(lambda a: jax.lax.map(lambda place: a[place], places), chunks)
    share = count // data_size() if count % data_size() == 0 else count

    def own(a: jax.Array) -> jax.Array:
        me = jax.lax.axis_index(DATA)

        def pick(kept: jax.Array, numbered: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, None]:
            number, (chunk, *others) = numbered
            chunk = chunk - me * len(a)
            item = a[(jnp.clip(chunk, 0, len(a) - 1), *others)]
            item = jax.lax.psum(jnp.where((chunk >= 0) & (chunk < len(a)), item, 0), DATA).astype(a.dtype)
            slot = number % share
            wanted = (share == count) | (number // share == me)
            return kept.at[slot].set(jnp.where(wanted, item, kept[slot])), None

        empty = jnp.zeros((share, *a.shape[len(places) :]), a.dtype)
        return jax.lax.scan(pick, empty, (jnp.arange(count), places))[0]

    given = PartitionSpec() if share == count else DATA_SPEC
    return jax.tree.map(shard_map_over_data(own, (DATA_SPEC,), given), chunks)


def vmap_over_data(function: Callable[..., Any], *by_device: Any) -> Any:
    """Maps a function over arrays [devices, ...] of which each device along ``data`` has its own.

    The compiler partitions the result, also inside the function, where `constrain_replicated` keeps it from another
    choice.
    """
    if mesh_size() == 1:  # without an axis of length 1, beside which XLA's sums on CPUs are ten times as slow
        alone = function(*jax.tree.map(lambda a: a[0], by_device))
        return jax.tree.map(lambda a: a[None], alone)
    own = jax.lax.with_sharding_constraint(by_device, PartitionSpec(DATA))
    return jax.vmap(function, spmd_axis_name=DATA)(*own)


def constrain_replicated(array: jax.Array) -> jax.Array:
    """Replicates an array, inside a jitted program; inside `vmap_over_data`, on its own devices along ``model``."""
    return array if mesh_size() == 1 else jax.lax.with_sharding_constraint(array, PartitionSpec())


def divide_along_model(array: jax.Array, axis: int) -> jax.Array:
    """Divides an axis along ``model`` if its size is divisible, inside a jitted program; see `constrain_replicated`."""
    if mesh_size() == 1:
        return array
    return jax.lax.with_sharding_constraint(array, model_spec(array.shape[axis], axis))


def keep_for_group(kept: Any, item: Any, group: int | jax.Array) -> Any:
    """Keeps an item until `exchange` gives it to its group of devices, inside a jitted program.

    The devices at one place along ``data`` are a group: those that share the weights.

    Args:
        kept: What is kept so far, arrays [groups, ...]; None if nothing is. Of matrices, each device of the mesh holds
            some rows of all; their number is made up to one that the devices can divide.
        item: The item.
        group: Number of the group that it is for.
    """
    count = mesh_size()

    def one(a: jax.Array, all_kept: jax.Array | None) -> jax.Array:
        if a.ndim > 1:
            a = jnp.pad(a, [(0, -len(a) % count), *[(0, 0)] * (a.ndim - 1)])
        before = jnp.zeros((data_size(), *a.shape), a.dtype) if all_kept is None else all_kept
        after = jax.lax.dynamic_update_index_in_dim(before, a, group, 0)
        return after if count == 1 else jax.lax.with_sharding_constraint(after, _kept_spec(after))

    return jax.tree.map(one, item, kept) if kept is not None else jax.tree.map(lambda a: one(a, None), item)


def exchange(kept: jax.Array, rows: int) -> jax.Array:
    """Gives each group its own of the arrays that `keep_for_group` kept, inside a jitted program: an all-to-all.

    Args:
        kept: [groups, ...]; of matrices, with the rows that were added.
        rows: Number of rows without these.

    Returns:
        [groups, ...] sharded along ``data``, and the rows of matrices along ``model`` if they can be divided evenly.
    """
    if mesh_size() == 1:
        return kept

    def own(some: jax.Array) -> jax.Array:
        if some.ndim > 2:
            return jax.lax.all_to_all(some, DATA, split_axis=0, concat_axis=1, tiled=True)
        return jax.lax.dynamic_index_in_dim(some, jax.lax.axis_index(DATA), axis=0)

    out = PartitionSpec(DATA, _MODEL) if kept.ndim > 2 else DATA_SPEC
    given = jax.shard_map(own, in_specs=_kept_spec(kept), out_specs=out, check_vma=False)(kept)
    return given[:, :rows] if kept.ndim > 2 else given


def _kept_spec(kept: jax.Array) -> PartitionSpec:
    """The spec of what `keep_for_group` keeps: the rows in the order of `row_axes`, so that a group has its own."""
    return PartitionSpec(None, (_MODEL, DATA)) if kept.ndim > 2 else PartitionSpec()


def in_any_group(flag: jax.Array) -> jax.Array:
    """Whether a flag [] is set in any of the groups that `map_over_groups` or `map_chunks` lets work at the same time.

    A loop that divides rows among a group has collectives, for which all devices have to make the same turns: it ends
    when no group needs it any more. Groups of one device end by themselves.
    """
    mesh = get_abstract_mesh()
    apart = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(DATA) == AxisType.Manual
    return jax.lax.psum(flag.astype(jnp.int32), DATA) > 0 if apart and model_size() > 1 else flag


def map_over_groups(solve: Callable[..., Any], own: Any, *alike: Any) -> Any:
    """Runs ``solve(item, number, *alike)`` on each group's own item and all-gathers the results [groups, ...].

    Args:
        solve: Function that each group runs by itself; inside, rows are sharded along ``model``.
        own: The items of all groups, as `exchange` returns them.
        alike: Replicated arrays.
    """

    def one(number: int | jax.Array, own: Any, *alike: Any) -> Any:
        found = solve(jax.tree.map(lambda a: a[0], own), number, *alike)
        return jax.tree.map(lambda a: a[None], found)

    if mesh_size() == 1:
        return one(0, own, *alike)
    given = (DATA_SPEC, *(PartitionSpec() for _ in alike))
    each = shard_map_over_data(lambda *given: one(jax.lax.axis_index(DATA), *given), given, DATA_SPEC)(own, *alike)
    return jax.tree.map(constrain_replicated, each)
