"""Numbers of a command as a file, beside what it prints."""

import json
import secrets
from pathlib import Path
from typing import Any

from spap_jax.errors import UserError


def check_place(file: Path | None) -> None:
    """Said before a run that takes long.

    Raises:
        UserError: a file is wanted in a folder that is not there, where a folder is, or under a name that cannot be.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise UserError(f"{file} cannot be written (there is no folder {file.parent}): name another file.")
    try:
        if file.is_dir():
            raise UserError(f"{file} is a folder: name a file.")
    except OSError as error:  # the name is too long
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file.") from error


def write_json(file: Path, result: dict[str, Any]) -> None:
    """Writes what a command found: a whole file, or none where it cannot be written.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(result, indent=1, default=_plain) + "\n"
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
