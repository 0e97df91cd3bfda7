"""Writes files all or none, each complete or absent: temporary files beside their destinations, then renamed."""

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from spap_jax.checkpoint.manifest import check_file, sealed
from spap_jax.errors import UserError, option
from spap_jax.storage.location import real_path

COMMAND = "spap report"
"""The program that a page and its plots name as their author."""


def check_places(places: list[Path], overwrite: bool, command: str = COMMAND) -> None:
    """Checks that files may be written to all places.

    Raises:
        UserError: a place is a folder, or a file that may not be replaced. A file that the command did not write, or
            that was changed since, may never be replaced.
    """
    for place in places:
        file = real_path(place)
        if os.path.isdir(file):
            raise UserError(f"{place} is a folder: name a file.")
        if os.path.exists(file) and not overwrite:
            way = f"pass {option('overwrite', True)} to replace it"
            raise UserError(f"{place} exists: name another place, or {way}.")
        check_file(place, command)


def write_all(files: Mapping[Path, bytes], overwrite: bool, command: str = COMMAND) -> None:
    """Writes files in order.

    Args:
        files: Contents by path; missing folders are created.
        overwrite: Whether existing files that the command wrote and nobody changed may be replaced.
        command: The command that writes them, such as "spap eval".

    Raises:
        UserError: a path is occupied by something that may not be replaced, or a file cannot be written.
    """
    check_places(list(files), overwrite, command)
    files = {real_path(place): content for place, content in files.items()}  # symbolic links are kept
    partial = {place: place.with_name(f".{secrets.token_hex(8)}.partial") for place in files}
    place = next(iter(files))
    try:
        for place, content in files.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial[place].open("wb") as file:
                file.write(sealed(content))
                file.flush()
                os.fsync(file.fileno())
        for place in files:
            partial[place].replace(place)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}): name another place.") from error
    finally:
        for leftover in partial.values():
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
