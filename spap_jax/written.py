"""How to tell what this program wrote, so that nothing else is ever replaced.

A checkpoint folder holds a manifest of its files. A file that stands alone, such as a page or numbers in JSON, says in
its first bytes which command wrote it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from spap_jax.errors import UserError, option

MANIFEST = "spap_files.json"
"""The name of the manifest: a hash of each file by its path below the folder."""

_SHOWN = 3

_HEAD = 1024
_MARKS = (
    rb'<!DOCTYPE html>.*?<meta name="generator" content="(spap \w+)">',
    rb"\x89PNG\r\n.*?tEXtSoftware\0(spap \w+)",
    rb'\{\s*"written_by": "(spap \w+)"',
)

_PIECE, _PIECES = 1 << 16, 256


def pieces(file: Path) -> Iterator[bytes]:
    """256 pieces of 64 kB of a file, at even distances from its first bytes to its last.

    A file of up to 16 MB comes whole. Training changes every tensor, and so every piece of a file of weights.
    """
    length = file.stat().st_size
    count = min(_PIECES, -(-length // _PIECE))
    with file.open("rb") as opened:
        for start in np.linspace(0, max(0, length - _PIECE), count, dtype=np.int64).tolist():
            opened.seek(start)
            yield opened.read(_PIECE)


def write_manifest(folder: Path) -> None:
    """Records every file of a finished folder in it."""
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in _below(folder)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def sort_files(folder: Path) -> tuple[list[str], list[str]]:
    """Tells what this program wrote in a folder from what it did not, or what was changed since.

    Returns:
        The paths relative to the folder of the files of each kind; the manifest is the last of the first kind. A link
        and a folder that cannot be read count as files that this program did not write.
    """
    recorded = read_manifest(folder)
    ours: list[str] = []
    others: list[str] = []
    for path in _below(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            (ours if _is_ours(path, recorded.get(name)) else others).append(name)
    if recorded:
        ours.append(MANIFEST)
    elif os.path.lexists(folder / MANIFEST):
        others.append(MANIFEST)
    return ours, sorted(others)


def read_manifest(folder: Path) -> dict[str, object]:
    """What the manifest of a folder records of each file; nothing without a manifest that can be read."""
    file = folder / MANIFEST
    return parse_manifest(file.read_bytes()) if file.is_file() and not file.is_symlink() else {}


def parse_manifest(content: bytes | None) -> dict[str, object]:
    """What a manifest records of each file, by its path."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def check_replaceable(place: str | Path, overwrite: bool, others: Sequence[str]) -> None:
    """Refuses to replace a folder unless that was asked for and loses nothing.

    Args:
        place: The path or address of a folder that exists.
        overwrite: Whether it may be replaced.
        others: The files in it that this program did not write.

    Raises:
        UserError: It may not be replaced.
    """
    if not overwrite:
        raise UserError(f"{place} exists: name another folder, or pass {option('overwrite', True)} to replace it.")
    if others:
        shown = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
        raise UserError(
            f"{place} is not overwritten, because it holds files that spap did not write or that were changed since "
            f"({shown}): name another folder, or move them out of it."
        )


def check_file(file: Path, command: str) -> None:
    """Refuses to replace a file that another than a command of this program wrote.

    Args:
        file: The place of a file that is to be written; nothing has to be there.
        command: The command that writes there, such as "spap report".

    Raises:
        UserError: There is a file that the command did not write.
    """
    if os.path.isfile(file) and os.path.getsize(file) and _writer(file) != command:
        raise UserError(f"{file} is not a file that {command} wrote, so it is not replaced: name another file.")


def _writer(file: Path) -> str | None:
    """The command that wrote a file, such as "spap report"; None if no command did, or the file cannot be read."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
    except OSError:
        return None
    found = (re.match(mark, head, re.DOTALL) for mark in _MARKS)
    return next((match[1].decode() for match in found if match), None)


def _is_ours(path: Path, recorded: object) -> bool:
    """Whether a file was written by this program; one that cannot be read is not known to be."""
    try:
        regular = path.is_file() and not path.is_symlink()
        return regular and (_writer(path) is not None or recorded == _digest(path))
    except OSError:
        return False


def _digest(file: Path) -> str:
    total = hashlib.sha256(f"{file.stat().st_size}\n".encode())
    for piece in pieces(file):
        total.update(piece)
    return total.hexdigest()


def _below(folder: Path) -> Iterator[Path]:
    """Files of every kind and links, which are not followed, at any depth; and the folders that cannot be read."""
    unread: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: unread.append(Path(error.filename))):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in [*files, *links])
    yield from unread
