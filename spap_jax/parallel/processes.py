"""Joining the processes of a run, and collectives of their hosts; without effect in a run of one process.

The leading process prints and writes. All processes have to call the functions below `is_leader` at the same places.
"""

import functools
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from spap_jax.errors import NotJoinedError, UserError, first_line, option

AUTO = "auto"
"""Coordinator address that JAX finds by itself."""

_JOINING_SECONDS = 300
"""How long the first processes wait for the last one."""

_SILENT_SECONDS = 60
"""A process without a heartbeat for this long is considered dead, and the others end too."""

_BARRIER_SECONDS = 86400
"""Seconds that processes wait for the leading one, which may have much to read, to evaluate, to write or to upload."""

_BARRIERS = itertools.count()
"""Numbers of the barriers; all processes pass them in the same order."""


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, each with its own devices; call it before anything is computed.

    Args:
        coordinator: Host and port of the first process; "auto" on a TPU pod or under SLURM, which provide them.
        process_id: Number of this process, from 0.

    Raises:
        NotJoinedError: the others do not join in time.
        UserError: only some of the three are given, or they are not valid.
    """
    check_processes(coordinator, processes, process_id)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM and do nothing
    # While JAX waits, no signal reaches Python, and after its own timeout it aborts the process: in a thread it can do
    # neither. The thread ends with the process, which has to exit at once (``cli/failures.py``).
    start = functools.partial(
        jax.distributed.initialize,
        None if coordinator == AUTO else coordinator,
        processes,
        process_id,
        local_device_ids=_own_devices(),
        initialization_timeout=2 * _JOINING_SECONDS,
        heartbeat_timeout_seconds=_SILENT_SECONDS,
        shutdown_timeout_seconds=_BARRIER_SECONDS,
    )
    try:
        ThreadPoolExecutor(1).submit(start).result(_JOINING_SECONDS)
    except TimeoutError:
        others = "the other processes"
        if processes is not None:
            others = f"process {', '.join(str(number) for number in range(processes) if number != process_id)}"
        raise NotJoinedError(
            f"this process waited {_JOINING_SECONDS} s at {coordinator}, and not all others came: start the same "
            f"command for {others} as well, and see that all of them reach process 0 at its address."
        ) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run could not be joined: {first_line(error)}.") from error


def check_processes(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Checks the arguments of `join`.

    Raises:
        UserError: only some of the three are given, or they are not valid.
    """
    if coordinator == AUTO:
        return
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            f"a run of several processes needs all of {option('coordinator')} HOST:PORT, {option('processes')} and "
            f"{option('process_id')}; on a TPU pod or under SLURM {option('coordinator', AUTO)} is enough."
        )
    if not 0 <= process_id < processes:
        raise UserError(f"there is no process {process_id} of {processes}: {option('process_id')} counts from 0.")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"{option('coordinator', coordinator)} is not of the form HOST:PORT: name those of process 0.")


def _own_devices() -> list[int] | None:
    """Returns [] if JAX should use all devices that this process sees, and not the one with the process's number."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    alone = os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES", "unknown")
    alone |= os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (visible != "" and "," not in visible)
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def is_leader() -> bool:
    """Whether this is the leading process, which prints and writes."""
    return jax.process_index() == 0


def barrier() -> None:
    """Waits until all processes have come here; a collective computation would wait for some minutes only."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint.multihost import sync_global_processes

    everyone = set(range(jax.process_count()))
    sync_global_processes(f"barrier {next(_BARRIERS)}", timeout=_BARRIER_SECONDS, processes=everyone)


def broadcast_from_leader(value: Any) -> Any:
    """Broadcasts a JSON-serialisable value from the leading process; those of other processes are ignored."""
    text = json.dumps(value).encode()
    if jax.process_count() > 1:
        length = int(broadcast_one_to_all(np.int32(len(text))))
        text = broadcast_one_to_all(np.frombuffer(text if is_leader() else bytes(length), np.uint8)).tobytes()
    return json.loads(text)


def all_gather_host(value: Any) -> np.ndarray:
    """Gathers a number of every process, [processes]."""
    return process_allgather(np.asarray(value)) if jax.process_count() > 1 else np.asarray([value])
