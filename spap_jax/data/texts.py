"""Reads local files as text in pieces, as conversations, or as token ids, with one reader for each suffix.

The pieces of a file together are its text: if a file holds several texts, they are joined by a blank line, unless the
caller joins them otherwise. Readers are lazy, so a caller that has enough reads no further.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from spap_jax.data.chat import MESSAGES, PROMPT, Conversation, conversations, holds_conversation
from spap_jax.errors import UserError, first_line
from spap_jax.storage.location import is_address

LOCAL = "name a local .txt, .jsonl, .json, .parquet or .npy file instead"
"""What to do about data that cannot be had."""

BLOCK = 1 << 20  # characters read at once
ROWS = 1 << 10  # rows of a parquet file read at once

_COLUMNS = ("text", MESSAGES, PROMPT)
"""Columns that some join reads; the others of a parquet file may be large."""

Piece = str | Conversation
"""A piece of text, or a conversation; data are of one kind."""

Join = Callable[[Iterable[Any], str], Iterator[Piece]]
"""Joins rows to one text, in pieces, or yields their conversations; the name is that of the data in errors."""


def joined(rows: Iterable[Any], name: str, between: str = "\n\n") -> Iterator[Piece]:
    """Yields the texts of rows (dicts with a `text`, or texts) with a separator between them; null texts are skipped.

    Rows whose first one has `messages`, and no text, are conversations, which are yielded one by one.

    Raises:
        UserError: A row has no text, or no conversation.
    """
    rows = iter(rows)
    first = list(islice(rows, 1))
    rows = chain(first, rows)
    if first and holds_conversation(first[0]):
        yield from conversations(rows, name)
        return
    separator = ""
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and "text" not in row:
            columns = ", ".join(map(str, row)) or "none"
            raise UserError(
                f'{name} has no column "text" but {columns}: rename the column with the text to "text", or '
                f'that with conversations to "{MESSAGES}"'
            )
        text = row["text"] if isinstance(row, dict) else row
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f'row {number} of {name} is no text ({str(text)[:40]}): "text" must hold strings')
        yield separator + text
        separator = between


def read_file(path: Path, join: Join = joined) -> Iterator[Piece] | np.ndarray:
    """Reads a local file: its text in pieces, its conversations, or the token ids of an .npy file.

    Args:
        path: Path of the file.
        join: Function that joins several texts to one.

    Raises:
        UserError: The file is missing, empty, of an unknown type or not what its suffix says (also while iterating).
    """
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "not there"
        raise UserError(f"{path} is {kind}: check the path")
    reader = READERS.get(suffix(path))
    if reader is None:
        raise UserError(f"{path} is of an unsupported type: use one of {', '.join(READERS)} (text also with .gz)")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: name a file with text")
    if suffix(path) == ".npy":
        return read_ids(path)
    return _guarded(path, reader, join)


def suffix(path: Path) -> str:
    """The suffix that determines a file's type, in lower case and without .gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def read_ids(path: Path) -> np.ndarray:
    """Memory-maps an .npy file, without unpickling: a header cannot ask for more memory than the file has."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy parses a header as Python, and raises all kinds of exceptions for a damaged one
        raise UserError(
            f"{path} holds no plain array of numbers ({first_line(error)}): save the token ids with numpy.save"
        ) from error


def _guarded(path: Path, reader: Callable[[Path, Join], Iterator[Piece]], join: Join) -> Iterator[Piece]:
    """Yields from the reader, and raises the errors of a broken file as `UserError`."""
    try:
        yield from reader(path, join)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({first_line(error)}): convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): check the file") from error


def _open_text(path: Path) -> IO[str]:
    """Opens a text file, gzipped or not; line ends stay as they are and a byte order mark is dropped."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return cast(IO[str], opener(path, "rt", encoding="utf-8-sig", newline=""))


def _plain(path: Path, join: Join) -> Iterator[Piece]:
    """Reads a text file; there is nothing to join."""
    with _open_text(path) as file:
        yield from iter(lambda: file.read(BLOCK), "")


def _json_lines(path: Path, join: Join) -> Iterator[Piece]:
    """Reads JSON lines, with an object or a text on each."""
    with _open_text(path) as file:
        yield from join(_parsed_lines(file, path), str(path))


def _json(path: Path, join: Join) -> Iterator[Piece]:
    """Reads one JSON value, a list of rows or a row; or JSON lines, which some data sets also name .json."""
    with _open_text(path) as file:
        first = file.readline()
        try:
            lines = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            lines = False
        if lines:
            rows: Iterable[Any] = _parsed_lines(chain([first], file), path)
        else:
            value = _parsed(first + file.read(), path, 1)
            rows = value if isinstance(value, list) else [value]
        yield from join(rows, str(path))


def _parsed_lines(lines: Iterable[str], path: Path) -> Iterator[Any]:
    """The JSON value of each line that is not blank."""
    return (_parsed(line, path, number) for number, line in enumerate(lines, 1) if line.strip())


def _parsed(text: str, path: Path, line: int) -> Any:
    """Parses a JSON value; `line` is the line of the file on which the text starts."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{path} is not valid JSON at {at} ({error.msg}): correct that line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deeply nested brackets
        raise UserError(f"{path} cannot be read at line {line} ({first_line(error)}): correct that line") from error


def _parquet(path: Path, join: Join) -> Iterator[Piece]:
    """Reads the rows of a parquet file: the columns that matter, or all if there are none, for an error to name."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            read = [name for name in file.schema_arrow.names if name in _COLUMNS]
            batches = file.iter_batches(ROWS, columns=read or None)
            yield from join((row for batch in batches for row in batch.to_pylist()), str(path))
    except ArrowException as error:
        raise UserError(f"{path} is a broken parquet file ({first_line(error)}): check the file") from error


READERS: dict[str, Callable[..., Any]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".npy": read_ids,
}


def looks_local(text: str) -> bool:
    """Whether a text names a local path, existing or not, rather than something on the hub."""
    return text.startswith((".", "/", "~")) or suffix(Path(text)) in READERS or os.path.exists(text)


def is_file(data: str) -> bool:
    """Whether a name is that of a file, local or at an address, rather than of something on the hub."""
    return is_address(data) or looks_local(data)
