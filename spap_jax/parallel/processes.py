"""Joining the processes of a run, and collectives of their hosts; without effect in a run of one process.

The leading process prints and writes. All processes have to call the functions below `is_leader` at the same places.
"""

import functools
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from spap_jax.errors import NotJoinedError, UserError, first_line, option

AUTO = "auto"
"""Process whose number and companions JAX finds by itself."""

_JOINING_SECONDS = 300
"""How long the first processes wait for the last one."""

_SILENT_SECONDS = 60
"""A process without a heartbeat for this long is considered dead, and the others end too."""

_BARRIER_SECONDS = 86400
"""Seconds that processes wait for the leading one, which may have much to read, to evaluate, to write or to upload."""

_BARRIERS = itertools.count()
"""Numbers of the barriers; all processes pass them in the same order."""


class Process(NamedTuple):
    """One of the processes of a run.

    Attributes:
        number: Its number, from 0; None if JAX finds all three by itself, as on a TPU pod or under SLURM.
        total: How many there are.
        coordinator: Host and port of process 0.
    """

    number: int | None = None
    total: int | None = None
    coordinator: str | None = None

    @property
    def words(self) -> str:
        """The number and the count, for a message."""
        return "" if self.number is None else f" as process {self.number} of {self.total}"


def parse_process(text: str) -> Process:
    """Reads what ``--process`` says, such as 0/2@first-server:8476 or auto.

    Raises:
        UserError: it is of another form, or there is no such process or port.
    """
    if text == AUTO:
        return Process()
    found = re.fullmatch(r"(\d+)/(\d+)@(.+:(\d+))", text, re.ASCII)
    if not found or int(found[1]) >= int(found[2]) or not 0 < int(found[4]) < 2**16:
        raise UserError(
            f"{option('process', text)} is not of the form NUMBER/COUNT@HOST:PORT: name this process, counted from 0, "
            f"how many there are, and where process 0 is, as in 0/2@first-server:8476; or {AUTO} on a TPU pod or under "
            "SLURM."
        )
    return Process(int(found[1]), int(found[2]), found[3])


def join(process: Process) -> None:
    """Joins the processes of one run, each with its own devices; call it before anything is computed.

    Raises:
        NotJoinedError: the others do not join in time.
        UserError: JAX does not find the others.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM and do nothing
    # While JAX waits, no signal reaches Python, and after its own timeout it aborts the process: in a thread it can do
    # neither. The thread ends with the process, which has to exit at once (``cli/failures.py``).
    start = functools.partial(
        jax.distributed.initialize,
        process.coordinator,
        process.total,
        process.number,
        local_device_ids=_own_devices(),
        initialization_timeout=2 * _JOINING_SECONDS,
        heartbeat_timeout_seconds=_SILENT_SECONDS,
        shutdown_timeout_seconds=_BARRIER_SECONDS,
    )
    try:
        ThreadPoolExecutor(1).submit(start).result(_JOINING_SECONDS)
    except TimeoutError:
        others = "the other processes"
        if process.total is not None:
            others = f"process {', '.join(str(other) for other in range(process.total) if other != process.number)}"
        raise NotJoinedError(
            f"this process waited {_JOINING_SECONDS} s{process.words}, and not all others came: start the same command "
            f"for {others} as well, and see that all of them reach process 0 at its address."
        ) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run could not be joined: {first_line(error)}.") from error


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
