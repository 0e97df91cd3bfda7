"""How the processes of one run find each other, and what is said when they do not."""

import functools
import socket
from concurrent.futures import ThreadPoolExecutor

import jax

from spap_jax.errors import UserError
from spap_jax.hub import first_line

AUTO = "auto"
"""Stands for an address that the machine knows by itself."""

_JOINING_SECONDS = 300
"""How long the first processes wait for the last."""

_SILENT_SECONDS = 60
"""A process that is not heard of for so long is taken for dead, and the others end too."""

_ANSWER_SECONDS = 5
"""How long the process that leads may take to answer at its address."""

_ENDING_SECONDS = 86400
"""How long the others wait at the end for the one that leads, which still judges the result, writes it and sends it."""


def join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run, each with its own devices; before anything is computed.

    Args:
        coordinator: Host and port of the first process; "auto" where a TPU pod or SLURM tells.
        processes: How many there are.
        process_id: Which of them this is, from 0.

    Raises:
        UserError: only some of the three are given, they cannot be, or the others do not come in time.
    """
    check_processes(coordinator, processes, process_id)
    # JAX waits where no signal reaches Python, and aborts the process when its own time is up: in a thread it can do
    # neither. The thread ends with the process, which has to leave at once (``cli/processes.py``).
    start = functools.partial(
        jax.distributed.initialize,
        None if coordinator == AUTO else coordinator,
        processes,
        process_id,
        initialization_timeout=2 * _JOINING_SECONDS,
        heartbeat_timeout_seconds=_SILENT_SECONDS,
        shutdown_timeout_seconds=_ENDING_SECONDS,
    )
    try:
        ThreadPoolExecutor(1).submit(start).result(_JOINING_SECONDS)
    except TimeoutError:
        raise UserError(_who_is_missing(coordinator, processes, process_id)) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run could not be joined: {first_line(error)}.") from error


def check_processes(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Refuses what cannot be joined; see ``join``.

    Raises:
        UserError: only some of the three are given, or they cannot be.
    """
    if coordinator == AUTO:
        return
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            "a run of several processes needs all of --coordinator HOST:PORT, --processes and --process-id; "
            "on a TPU pod or under SLURM --coordinator auto is enough."
        )
    if not 0 <= process_id < processes:
        raise UserError(f"there is no process {process_id} of {processes}: --process-id counts from 0.")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"--coordinator {coordinator} is not of the form HOST:PORT: name a host and a port of process 0."
        )


def _who_is_missing(coordinator: str | None, processes: int | None, process_id: int | None) -> str:
    """What to say when not all processes came in time; JAX does not tell which."""
    waited = f"this process waited {_JOINING_SECONDS} s for the other processes of the run"
    if coordinator is None or coordinator == AUTO or processes is None or process_id is None:
        return f"{waited}, and not all came: see what they said."
    if process_id > 0 and not _answers(coordinator):
        return f"{waited}, and nothing answers at {coordinator}: start process 0 there, and see that it is reached."
    others = ", ".join(str(number) for number in range(processes) if number != process_id)
    return (
        f"{waited} at {coordinator}, and not all came: start the same command with --process-id {others} as well, and "
        f"see that those processes reach {coordinator}."
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
