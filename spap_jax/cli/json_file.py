"""Numbers of a command as a file, beside what it prints."""

import json
import secrets
from pathlib import Path
from typing import Any

from spap_jax.errors import UserError
from spap_jax.written import check_file


def check_place(file: Path | None, command: str) -> None:
    """Said before a run that takes long.

    Args:
        file: Where the numbers are to be written, if anywhere.
        command: The command that writes them, such as "spap eval"; it replaces a file of its own.

    Raises:
        UserError: a file is wanted in a folder that is not there, where a folder is, under a name that cannot be, or in
            place of a file that the command did not write.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise UserError(f"{file} cannot be written (there is no folder {file.parent}): name another file.")
    try:
        if file.is_dir():
            raise UserError(f"{file} is a folder: name a file.")
        check_file(file, command)
    except OSError as error:  # the name is too long, or a file there may not be read
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file.") from error


def write_json(file: Path, command: str, result: dict[str, Any]) -> None:
    """Writes what a command found: a whole file, or none where it cannot be written.

    Raises:
        UserError: the file cannot be written, or is there and not one that the command wrote.
    """
    check_place(file, command)
    text = json.dumps({"written_by": command, **result}, indent=1, default=_plain) + "\n"
    place = file.resolve()  # of a link what it leads to, which stays where it is
    try:
        if place.exists() and not place.is_file():  # /dev/stdout, a pipe: nothing can be put in its place
            place.write_text(text, encoding="utf-8")
        else:
            _write_whole(place, text)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file.") from error


def _write_whole(place: Path, text: str) -> None:
    """Writes beside the place, then renames."""
    partial = place.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """A numpy number as a number; whatever else JSON has no word for as a text."""
    return value.item() if hasattr(value, "item") else str(value)
