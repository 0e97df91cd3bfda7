"""Recognises files that this program wrote, so that nothing else is ever replaced.

A checkpoint folder holds a manifest of its files. A standalone file, such as a page or numbers in JSON, names in its
first bytes the command that wrote it, followed by a hash of all else in it.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from spap_jax.errors import UserError, option

MANIFEST = "spap_files.json"
"""The name of the manifest, which holds a hash of each file by its path below the folder."""

_SHOWN = 3

_PIECE, _PIECES = 1 << 16, 256


def _png_text(digest: bytes) -> bytes:
    chunk = b"tEXtsha256\0" + digest
    return (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


_HEAD = 1024
_MARKS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (rb'<!DOCTYPE html>.*?<meta name="generator" content="(spap \w+)">', b'<meta name="sha256" content="%b">'.__mod__),
    (rb"\x89PNG\r\n.*?tEXtSoftware\0(spap \w+).{4}", _png_text),
    (rb'\{\s*"written_by": "(spap \w+)"', b',\n "sha256": "%b"'.__mod__),
)
"""Marks, which name the command that wrote a file, and the form of the hash that follows each."""


def pieces(file: Path) -> Iterator[bytes]:
    """Yields 256 evenly spaced pieces of 64 kB of a file, from its first bytes to its last.

    A file of up to 16 MB is read completely. Training changes every tensor, and thus every piece of a weight file.
    """
    length = file.stat().st_size
    count = min(_PIECES, -(-length // _PIECE))
    with file.open("rb") as opened:
        for start in np.linspace(0, max(0, length - _PIECE), count, dtype=np.int64).tolist():
            opened.seek(start)
            yield opened.read(_PIECE)


def write_manifest(folder: Path) -> None:
    """Writes the manifest of all files of a finished folder."""
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in _below(folder)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def sort_files(folder: Path) -> tuple[list[str], list[str]]:
    """Separates the files in a folder that this program wrote from those that it did not or that were changed since.

    Returns:
        The paths of the files of each kind, relative to the folder; the manifest is the last of the first kind. A link
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
    """The entries of a folder's manifest, by path; empty if there is no readable manifest."""
    file = folder / MANIFEST
    return parse_manifest(file.read_bytes()) if file.is_file() and not file.is_symlink() else {}


def parse_manifest(content: bytes | None) -> dict[str, object]:
    """The entries of a manifest, by path; empty if it is not valid."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def check_replaceable(place: str | Path, overwrite: bool, others: Sequence[str]) -> None:
    """Refuses to replace a folder unless that was asked for and loses no other files.

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
    """Refuses to replace a file that the command did not write.

    Args:
        file: Path of the file to write; it does not have to exist.
        command: The command that writes it, such as "spap report".

    Raises:
        UserError: There is a file that the command did not write, or that was changed since.
    """
    real = Path(os.path.expanduser(file))
    if os.path.isfile(real) and os.path.getsize(real) and _writer(real) != command:
        raise UserError(
            f"{file} is not a file that {command} wrote, or was changed since, so it is not replaced: name another "
            "file."
        )


def sealed(content: bytes) -> bytes:
    """The content of a file with its hash behind the mark, by which changes are noticed; as it is without a mark."""
    marked = _marked(content)
    if marked is None:
        return content
    end, seal = marked[0].end(), marked[1]
    return content[:end] + seal(hashlib.sha256(content).hexdigest().encode()) + content[end:]


def _marked(content: bytes) -> tuple[re.Match[bytes], Callable[[bytes], bytes]] | None:
    """The mark that content begins with, and the form of its hash."""
    found = ((re.match(mark, content[:_HEAD], re.DOTALL), seal) for mark, seal in _MARKS)
    return next(((match, seal) for match, seal in found if match), None)


def _writer(file: Path) -> str | None:
    """The command that wrote a file, such as "spap report"; None if no command did, or not all of it as it is now."""
    try:
        with file.open("rb") as opened:
            content = opened.read(_HEAD)
            marked = _marked(content)
            if marked is None:
                return None
            content += opened.read()
    except OSError:
        return None
    end, hashed = marked[0].end(), len(marked[1](b"0" * 64))
    unchanged = sealed(content[:end] + content[end + hashed :]) == content
    return marked[0][1].decode() if unchanged else None


def _is_ours(path: Path, recorded: object) -> bool:
    """Whether a file is known to be written by this program; False if it cannot be read."""
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
    """Yields files of every kind and links (not followed), at any depth; then the folders that cannot be read."""
    unread: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: unread.append(Path(error.filename))):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in [*files, *links])
    yield from unread
