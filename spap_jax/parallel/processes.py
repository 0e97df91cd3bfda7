"""What the processes of a run say to each other; a run of one process has nobody to talk to.

The leading process prints and writes, and decides what only it can see, as files of its own disk. All processes call
these functions at the same places, as all have to take part.
"""

import itertools
import json
import socket
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

_MEETINGS = itertools.count()
"""Numbers of the moments at which processes wait for each other; all pass them in the same order."""

_PATIENCE = 86400
"""Seconds that a process waits for the others, of which the leading one may have much to read or to write."""


def leads() -> bool:
    """Whether this is the leading process, which prints and writes."""
    return jax.process_index() == 0


def on_this_host() -> int:
    """The number of the run's processes on this host, which share its memory; all processes have to call this."""
    if jax.process_count() == 1:
        return 1
    host = np.uint32(zlib.crc32(socket.gethostname().encode()))
    return int((process_allgather(host) == host).sum())


def meet() -> None:
    """Waits until all processes have come here; a collective computation waits for some minutes only."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint.multihost import sync_global_processes

    everyone = set(range(jax.process_count()))
    sync_global_processes(f"meeting {next(_MEETINGS)}", timeout=_PATIENCE, processes=everyone)


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
