"""How the processes of one run find each other, and the error messages if they do not."""

import functools
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import jax

from spap_jax.errors import NotJoinedError, UserError, first_line, option

AUTO = "auto"
"""Coordinator address that JAX finds by itself."""

_JOINING_SECONDS = 300
"""How long the first processes wait for the last one."""

_SILENT_SECONDS = 60
"""A process without a heartbeat for this long is considered dead, and the others end too."""

_ANSWER_SECONDS = 5
"""How long the leading process may take to answer at its address."""

_ENDING_SECONDS = 86400
"""How long the others wait at the end for the leading process, which still evaluates, writes and uploads the result."""


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, each with its own devices; call it before anything is computed.

    Args:
        coordinator: Host and port of the first process; "auto" on a TPU pod or under SLURM, which provide them.
        processes: Number of processes.
        process_id: Number of this process, from 0.

    Raises:
        NotJoinedError: the others do not join in time.
        UserError: only some of the three are given, or they are not valid.
    """
    check_processes(coordinator, processes, process_id)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM and do nothing
    # While JAX waits, no signal reaches Python, and after its own timeout it aborts the process: in a thread it can do
    # neither. The thread ends with the process, which has to exit at once (``cli/processes.py``).
    start = functools.partial(
        jax.distributed.initialize,
        None if coordinator == AUTO else coordinator,
        processes,
        process_id,
        local_device_ids=_own_devices(),
        initialization_timeout=2 * _JOINING_SECONDS,
        heartbeat_timeout_seconds=_SILENT_SECONDS,
        shutdown_timeout_seconds=_ENDING_SECONDS,
    )
    try:
        ThreadPoolExecutor(1).submit(start).result(_JOINING_SECONDS)
    except TimeoutError:
        raise NotJoinedError(_who_is_missing(coordinator, processes, process_id)) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run could not be joined: {first_line(error)}.") from error


def _own_devices() -> list[int] | None:
    """Returns [], so that this process uses all devices that it sees, if none of them is for another process.

    Under SLURM and Open MPI, JAX gives each process of a host the GPU of its number there: also where there is one
    process for all of them, and where the launcher lets each see one GPU alone, which has the number 0 for it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    alone = os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES", "unknown")
    alone |= os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (visible != "" and "," not in visible)
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def check_processes(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Checks the arguments of ``join``.

    Raises:
        UserError: only some of the three are given, or they are not valid.
    """
    if coordinator == AUTO:
        return
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            f"a run of several processes needs all of {option('coordinator', 'HOST:PORT')}, {option('processes')} and "
            f"{option('process_id')}; on a TPU pod or under SLURM {option('coordinator', 'auto')} is enough."
        )
    if not 0 <= process_id < processes:
        raise UserError(f"there is no process {process_id} of {processes}: {option('process_id')} counts from 0.")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"{option('coordinator')} {coordinator} is not of the form HOST:PORT: name a host and a port of process 0."
        )


def _who_is_missing(coordinator: str | None, processes: int | None, process_id: int | None) -> str:
    """The error message if not all processes joined in time; JAX does not report which are missing."""
    waited = f"this process waited {_JOINING_SECONDS} s for the other processes of the run"
    if coordinator is None or coordinator == AUTO or processes is None or process_id is None:
        return f"{waited}, and not all came: see what they said."
    if process_id > 0 and not _answers(coordinator):
        return f"{waited}, and nothing answers at {coordinator}: start process 0 there, and see that it is reached."
    others = ", ".join(str(number) for number in range(processes) if number != process_id)
    return (
        f"{waited} at {coordinator}, and not all came: start the same command with {option('process_id')} {others} as "
        f"well, and see that those processes reach {coordinator}."
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
