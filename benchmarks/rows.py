"""Measured rows in a file, a line of JSON each."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

Row = TypeVar("Row", bound=msgspec.Struct)


def rows_in(file: Path, kind: type[Row]) -> list[Row]:
    """Returns the rows of a file; none if there is no file."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [msgspec.json.decode(line, type=kind) for line in lines]


def store(file: Path, rows: Iterable[msgspec.Struct]) -> None:
    """Writes a file of rows, which it replaces whole: it holds hours of work."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f"{file.name}.new")
    written.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    written.replace(file)
