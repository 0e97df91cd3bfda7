"""Writes files all or none, each complete or absent: temporary files beside their destinations, then renamed."""

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from spap_jax.errors import UserError, option
from spap_jax.storage.location import real_path

COMMAND = "spap report"
"""The program that a page and its plots name as their author."""


_MARKS = (b'name="generator" content="spap report"', b"Software\0spap report")
"""What the first bytes of a page, or of a plot, say of their author."""

_HEAD = 1024


def check_places(places: list[Path], overwrite: bool) -> None:
    """Checks that files may be written to all places.

    Raises:
        UserError: a place is a folder, or a file that may not be replaced: one that ``spap report`` did not write never
            is.
    """
    for place in places:
        file = real_path(place)
        if file.is_dir():
            raise UserError(f"{place} is a folder: name a file.")
        if file.exists() and not overwrite:
            way = f"pass {option('overwrite', True)} to replace it"
            raise UserError(f"{place} exists: name another place, or {way}.")
        if file.exists() and not _is_ours(file):
            raise UserError(f"{place} is not a file that {COMMAND} wrote, so it is not replaced: name another file.")


def _is_ours(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    return any(mark in head for mark in _MARKS)


def write_all(files: Mapping[Path, bytes], overwrite: bool) -> None:
    """Writes files in order.

    Args:
        files: Contents by path; missing folders are created.
        overwrite: Whether existing files that ``spap report`` wrote may be replaced.

    Raises:
        UserError: a path is occupied by something that may not be replaced, or a file cannot be written.
    """
    check_places(list(files), overwrite)
    files = {real_path(place): content for place, content in files.items()}  # symbolic links are kept
    partial = {place: place.with_name(f".{secrets.token_hex(8)}.partial") for place in files}
    place = next(iter(files))
    try:
        for place, content in files.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial[place].open("wb") as file:
                file.write(content)
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
