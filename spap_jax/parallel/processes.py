"""Joining the processes of a run, and collectives of their hosts; without effect in a run of one process.

The leading process prints and writes. All processes have to call the functions below `is_leader` at the same places.
"""

import functools
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from spap_jax.errors import NotJoinedError, UserError, first_line, option

AUTO = "auto"
"""Value of ``--process`` where JAX finds all that it says by itself."""

_JOINING_SECONDS = 300
"""How long the first processes wait for the last one."""

_SILENT_SECONDS = 60
"""A process without a heartbeat for this long is considered dead, and the others end too."""

_BARRIER_SECONDS = 86400
"""Seconds that processes wait for the leading one, which may have much to read, to evaluate, to write or to upload."""

_BARRIERS = itertools.count()
"""Numbers of the barriers; all processes pass them in the same order."""


def join(process: str) -> None:
    """Joins the processes of one run, each with its own devices; call it before anything is computed.

    Args:
        process: Number of this process, from 0, their number, and the place of process 0, as in 0/2@first-server:8476;
            "auto" on a TPU pod or under SLURM, which provide them.

    Raises:
        NotJoinedError: the others do not join in time.
        UserError: it is of another form, or JAX does not find the others.
    """
    coordinator, count, number = parse_process(process)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM and do nothing
    # While JAX waits, no signal reaches Python, and after its own timeout it aborts the process: in a thread it can do
    # neither. The thread ends with the process, which has to exit at once (``cli/failures.py``).
    start = functools.partial(
        jax.distributed.initialize,
        coordinator,
        count,
        number,
        local_device_ids=_own_devices(),
        initialization_timeout=2 * _JOINING_SECONDS,
        heartbeat_timeout_seconds=_SILENT_SECONDS,
        shutdown_timeout_seconds=_BARRIER_SECONDS,
    )
    try:
        ThreadPoolExecutor(1).submit(start).result(_JOINING_SECONDS)
    except TimeoutError:
        others = "the other processes"
        if count is not None:
            others = f"process {', '.join(str(other) for other in range(count) if other != number)}"
        raise NotJoinedError(
            f"this process, {process}, waited {_JOINING_SECONDS} s, and not all others came: start the same command "
            f"for {others} as well, and see that all of them reach process 0 at its address."
        ) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run could not be joined: {first_line(error)}.") from error


def parse_process(process: str) -> tuple[str | None, int | None, int | None]:
    """Returns the place of process 0, the number of processes and that of this one; None if JAX finds them.

    Raises:
        UserError: it is of another form, or there is no such process or port.
    """
    if process == AUTO:
        return None, None, None
    found = re.fullmatch(r"(\d+)/(\d+)@(.+:(\d+))", process, re.ASCII)
    if not found or int(found[1]) >= int(found[2]) or not 0 < int(found[4]) < 2**16:
        raise UserError(
            f"{option('process', process)} is not of the form NUMBER/COUNT@HOST:PORT: name this process, counted from "
            f"0, how many there are, and where process 0 is, as in 0/2@first-server:8476; or {AUTO} on a TPU pod or "
            "under SLURM."
        )
    return found[3], int(found[2]), int(found[1])


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
