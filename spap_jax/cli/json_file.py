"""Files with the results of a command: JSON with the numbers that it prints."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from spap_jax.checkpoint.manifest import check_file, sealed
from spap_jax.errors import UserError
from spap_jax.report.write import write_all
from spap_jax.storage.location import real_path


def check_json_place(file: Path | None, command: str) -> None:
    """Checks, before a long run, that its results can be written.

    Args:
        file: File for the results, if any.
        command: The command that writes them, such as "spap eval"; it may replace a file of its own.

    Raises:
        UserError: the file's folder does not exist or may not be written to, the file is a folder, its name is invalid,
            or it exists and the command did not write it, or it was changed since.
    """
    if file is None or _is_standard_output(file):
        return
    if not file.parent.is_dir():
        raise UserError(f"{file} cannot be written (there is no folder {file.parent}): name another file.")
    try:
        if file.is_dir():
            raise UserError(f"{file} is a folder: name a file.")
        check_file(file, command)
        if file.is_file() or not file.exists():  # it is put in its place under another name, and no pipe is
            with tempfile.TemporaryFile(dir=real_path(file).parent):
                pass
    except OSError as error:  # the name is too long, a file there may not be read, or the folder not be written to
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file.") from error


def write_json(file: Path, command: str, result: dict[str, Any]) -> None:
    """Writes the results of a command: a complete file, or none if it cannot be written.

    Raises:
        UserError: the file cannot be written, or it exists and the command did not write it, or it was
            changed since.
    """
    text = msgspec.json.encode({"written_by": command, **result}, enc_hook=_plain)  # what is not finite is null
    _write(file, command, msgspec.json.format(text, indent=1) + b"\n")


def _write(file: Path, command: str, content: bytes) -> None:
    check_json_place(file, command)
    try:
        if _is_standard_output(file):  # after what was printed, which may have gone to a file
            sys.stdout.flush()
            with open(sys.stdout.fileno(), "wb", closefd=False) as printed:
                printed.write(sealed(content))
        elif file.exists() and not file.is_file():  # a pipe cannot be replaced by renaming
            file.write_bytes(sealed(content))
        else:
            write_all({file: content}, True, command)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file.") from error


def _is_standard_output(file: Path) -> bool:
    """Whether a file is /dev/stdout or another name of it, which a shell may have sent to a file."""
    try:
        named = file.parts[:2] in (("/", "dev"), ("/", "proc"))
        return named and os.path.samestat(file.stat(), os.fstat(sys.stdout.fileno()))
    except OSError:  # there is no such file, or no standard output
        return False


def _plain(value: Any) -> Any:
    """Converts a numpy number to a number, and other values that JSON does not support to text."""
    return value.item() if hasattr(value, "item") else str(value)
