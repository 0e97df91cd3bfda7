"""Options that several commands share: their types, ``--json``, and those that join several processes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter, validators

from spap_jax.errors import UserError

Count = Annotated[int, Parameter(validator=validators.Number(gte=1, lt=2**31))]
"""A whole number of at least one."""

_RESUME = "Go on with an interrupted run of the same command; --no-resume discards it and starts over."
Resume = Annotated[bool, Parameter(negative="--no-resume", help=_RESUME)]
"""A switch that is on by default; it needs its own --no-resume, since cli/app.py disables negative forms."""

_BOS = "Begin each sequence with the beginning-of-text token. By default only for Gemma, which needs it."
Bos = Annotated[bool | None, Parameter(negative="--no-bos", help=_BOS)]
"""A switch whose default depends on the model."""

Overwrite = Annotated[bool, Parameter(help="Replace the output, if it holds only files that spap wrote.")]
Devices = Annotated[int | None, Parameter(help="Number of devices to use. By default all, but only one of a CPU's.")]
_PROCESS = "Number of this process of several, and the place of process 0: 0/2@HOST:PORT; auto on a TPU pod and SLURM."
Process = Annotated[str | None, Parameter(help=_PROCESS)]
JsonFile = Annotated[Path | None, Parameter(help="JSON file to which the results are written as well.")]

if TYPE_CHECKING:
    ModelName = Data = OutputPath = str
else:
    # The value stays a string, since it may be a hub id or an address. `Path` makes shells complete it as a path.
    ModelName, Data, OutputPath = (
        Annotated[str | Path, Parameter(metavar=word)] for word in ("MODEL", "DATA", "FOLDER")
    )


def check_json_place(file: Path | None) -> None:
    """Raises UserError, before a long run, if a file for its results exists or its folder does not."""
    if file is not None and (file.is_file() or file.is_dir() or not file.parent.is_dir()):
        raise UserError(f"{file} exists, or its folder does not: name another file.")


def write_json(file: Path, command: str, result: dict[str, Any]) -> None:
    """Writes the results of a command, null for what is not finite; UserError if the file is there or unwritable."""
    check_json_place(file)
    text = msgspec.json.encode({"written_by": command, **result}, enc_hook=_plain)
    is_new = not file.exists()  # it may be a pipe
    try:
        file.write_bytes(msgspec.json.format(text, indent=1) + b"\n")
    except OSError as error:
        if is_new:
            file.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file.") from error


def _plain(value: Any) -> Any:
    """Converts a numpy number to a number, and other values that JSON does not support to text."""
    return value.item() if hasattr(value, "item") else str(value)


def wait_for_others(process: str | None) -> None:
    """Joins the other processes of a run, if any, and shows that it waits; afterwards only one process prints.

    Raises:
        NotJoinedError, UserError: see ``processes.join``.
    """
    from spap_jax.cli.console import err, out, waiting
    from spap_jax.parallel.processes import is_leader, join

    if process is not None:
        with waiting(f"waiting for the other processes ({process})"):
            join(process)
    out.quiet = err.quiet = not is_leader()
