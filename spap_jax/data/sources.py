"""Where data come from: local files, addresses, the hub, sets with a short name, mixtures, and objects in memory.

Opened data are token ids, or conversations, or the pieces of one text: several texts are joined by a blank line, unless
the caller joins them otherwise. Readers are lazy, so a caller that has enough reads no further.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from spap_jax.data.chat import MESSAGES, PROMPT, Conversation, conversations, holds_conversation
from spap_jax.errors import UserError, first_line, option
from spap_jax.settings import OWN
from spap_jax.storage.files import fetch_file, hub_file, hub_splits
from spap_jax.storage.location import is_address, public_name

Data = str | Path | ArrayLike | Iterable[Any] | Mapping[str, Iterable[Any]]
"""Data that `load_tokens` accepts: their name, or an object."""

Role = Literal["calibration", "evaluation"]

SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train", "train_sft"),
    "evaluation": ("test", "validation", "test_sft"),
}
"""The splits of a data set that a role reads: the first that there is. Those in ``_sft`` are of conversations."""

LOCAL = "name a local .txt, .jsonl, .json, .parquet or .npy file instead"
"""What to do about data that cannot be read."""

_BLOCK = 1 << 20  # characters read at once
_ROWS = 1 << 10  # rows of a parquet file read at once

_COLUMNS = ("text", MESSAGES, PROMPT)
"""Columns that some join reads; the others of a parquet file may be large."""

_WEIGHTED = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")

Piece = str | Conversation
"""A piece of text, or a conversation; data are of one kind."""

Join = Callable[[Iterable[Any], str], Iterator[Piece]]
"""Joins rows to one text, in pieces, or yields their conversations; the name is that of the data in errors."""


class Protocol(NamedTuple):
    """How rows are joined to one text, and the text is tokenised.

    Attributes:
        between: Separator between two rows.
        rows: Number of rows to read, from the first; None reads all.
        special_tokens: Whether the tokenizer's special tokens are added, once to the text.
        windows: Number of windows to use, from the first; None uses all.
    """

    between: str = "\n\n"
    rows: int | None = None
    special_tokens: bool = False
    windows: int | None = None

    def join(self, rows: Iterable[Any], name: str) -> Iterator[Piece]:
        """Yields the joined text of the rows in pieces, or their conversations."""
        return joined(islice(rows, self.rows), name, self.between)


_PLAIN = Protocol()


class NamedSet(NamedTuple):
    """A data set with a short name, on the hub at a pinned revision.

    Attributes:
        files: Name and file of the split for each role.
        evaluation: How perplexity is measured on it; calibration uses the default protocol.
    """

    repo: str
    revision: str
    files: dict[Role, tuple[str, str]]
    evaluation: Protocol


NAMED = {
    "wikitext2": NamedSet(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {
            "calibration": ("train", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
            "evaluation": ("test", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        },
        Protocol(special_tokens=True),
    ),
    "c4": NamedSet(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {
            "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
            "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
        },
        Protocol(" ", rows=1100, special_tokens=True, windows=256),
    ),
}
"""The evaluation protocols are those of GPTQ, SparseGPT and Wanda; docs/evaluation.md spells them out."""


class Share(NamedTuple):
    """A data set of a mixture by its name, and its weight."""

    data: str
    weight: float


class Opened(NamedTuple):
    """Opened data: name, token ids or text in pieces or conversations, how rows were joined, public name of a file."""

    name: str
    content: Iterator[Piece] | np.ndarray
    protocol: Protocol = _PLAIN
    file: str | None = None


def is_file(data: str) -> bool:
    """Whether a name is that of a file, existing or not, local or at an address, rather than of a data set."""
    is_path = data.startswith((".", "/", "~")) or _suffix(Path(data)) in READERS or os.path.exists(data)
    return is_path or is_address(data)


def data_file(data: str) -> str | None:
    """The path or address of data, or of the copy of a named set; None for data sets of the hub."""
    if data == OWN:
        return None
    short, _, copy = data.partition(":")
    file = copy if short in NAMED else data if is_file(data) else ""
    return file or None


def data_name(data: str | Path) -> str:
    """The public name of data: its name on the hub, or the name of a file without its path."""
    short, colon, copy = str(data).partition(":")
    if short in NAMED:
        return f"{short}{colon}{copy and public_name(copy)}"
    return public_name(data) if isinstance(data, Path) or is_file(data) else data


def shares_of(data: str) -> list[Share]:
    """Returns the parts of a mixture such as ``a.jsonl:0.7,b.txt:0.3``; any other name is the only part.

    Raises:
        UserError: A weight is missing or 0, or a data set is named twice.
    """
    pieces = data.split(",")
    if len(pieces) == 1 or os.path.exists(os.path.expanduser(data)):
        return [Share(data, 1.0)]
    found = [_WEIGHTED.fullmatch(piece) for piece in pieces]
    parts = [Share(match[1], float(match[2])) for match in found if match]
    if len(parts) < len(pieces):
        without = pieces[found.index(None)]
        raise UserError(
            f"{without!r} has no weight in the mixture {data}: write each data set as NAME:WEIGHT, and rename a file "
            "whose name has a comma"
        )
    if not all(part.weight for part in parts) or len({part.data for part in parts}) < len(parts):
        raise UserError(f"a part of the mixture {data} is named twice or has the weight 0: leave it out")
    return parts


def sequence_counts(parts: list[Share], sequences: int) -> list[int]:
    """Returns the number of sequences of each part: in proportion to the weights, rounded to the given sum.

    Raises:
        UserError: A part would have none.
    """
    total = sum(part.weight for part in parts)
    exact = [sequences * part.weight / total for part in parts]
    whole = [int(number) for number in exact]
    largest = sorted(range(len(parts)), key=lambda number: whole[number] - exact[number])
    for number in largest[: sequences - sum(whole)]:
        whole[number] += 1
    if 0 in whole:
        part = parts[whole.index(0)]
        raise UserError(
            f"none of {sequences} sequences would be of {part.data} with the weight {part.weight:g}: raise its weight "
            f"or {option('sequences')}"
        )
    return whole


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
                f'{name} has no column "text" but {columns}: rename the column with the text to "text", or that with '
                f'conversations to "{MESSAGES}"'
            )
        text = row["text"] if isinstance(row, dict) else row
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f'row {number} of {name} is no text ({str(text)[:40]}): "text" must hold strings')
        yield separator + text
        separator = between


def open_data(data: Data, role: Role, join: Join = joined) -> Opened:
    """Finds and opens data.

    Args:
        role: What they are for, which decides on the split.
        join: Makes pieces of rows, except those of a named set, which has its own protocol.

    Raises:
        UserError: There are none, or they cannot be read.
    """
    if isinstance(data, Mapping):
        return _open_split(data, "the given data set", role, join)
    if not isinstance(data, str | Path):
        rows, name = _rows_of(data), "the given text"
        return Opened("the given array", _array(data)) if rows is None else Opened(name, join(rows, name))
    short, _, copy = str(data).partition(":")
    if short in NAMED:
        return _open_named(short, copy, role)
    if isinstance(data, Path) or is_file(data):
        return Opened(str(data), read_file(local_file(data), join), file=data_name(data))
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", data)
    if data == OWN:
        raise UserError(f"only a command reads {OWN!r}: in Python, give the rows that spap.write(model) returns")
    if named is None:
        raise UserError(
            f"there is no file and no data set {data[:80]}: name {', '.join(NAMED)}, a hub data set owner/name, or a "
            "local file"
        )
    return _open_split(hub_splits(named[1], named[2], remedy=LOCAL), data, role, join)


def _rows_of(data: Any) -> Iterable[Any] | None:
    """Returns the texts in an object, or the rows that hold them; None for an array of token ids, or nested lists."""
    if hasattr(data, "__array__"):
        return data.tolist() if getattr(getattr(data, "dtype", None), "kind", "") in "OU" else None
    if isinstance(data, Sequence):
        return data if len(data) and isinstance(data[0], str | dict) else None
    return data if isinstance(data, Iterable) else None


def _array(data: Any) -> np.ndarray:
    try:
        return np.asarray(data)
    except (TypeError, ValueError) as error:  # rows of several lengths, or a tensor on a device
        said = first_line(error)
        raise UserError(
            f"the given data are no array ({said}): give whole token ids [B, T], all sequences as long as the others."
        ) from error


def local_file(named: str | Path) -> Path:
    """Returns the local path of a file; a file at an address is downloaded.

    Raises:
        UserError: It cannot be downloaded.
    """
    return fetch_file(str(named)) if is_address(named) else Path(os.path.expanduser(named))


def _open_named(short: str, copy: str, role: Role) -> Opened:
    """Opens a named data set: a local copy, or the file of the hub, which is downloaded once."""
    named = NAMED[short]
    split, file = named.files[role]
    protocol = named.evaluation if role == "evaluation" else _PLAIN
    if copy:
        content = read_file(local_file(copy), protocol.join)
        return Opened(f"{short} ({copy})", content, protocol, data_name(f"{short}:{copy}"))
    path = hub_file(named.repo, file, named.revision, remedy=f"give a local copy as {short}:FILE, or {LOCAL}")
    return Opened(f"{short} ({split} split)", read_file(path, protocol.join), protocol)


def _open_split(splits: Mapping[str, Iterable[Any]], name: str, role: Role, join: Join) -> Opened:
    """Opens the split of a data set that the role uses."""
    for split in SPLITS[role]:
        if split in splits:
            return Opened(f"{name} ({split} split)", join(_rows(splits[split], name), name))
    raise UserError(
        f"{name} has no split {' or '.join(SPLITS[role])} for {role}, but {', '.join(splits)}: "
        "save the split you want as a local .jsonl or .parquet file and name that"
    )


def _rows(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Yields the rows; a hub that fails half-way raises a `UserError`."""
    try:
        yield from rows
    except Exception as error:  # whatever the client raises
        raise UserError(f"{name} cannot be read to its end ({first_line(error)}): try again, or {LOCAL}") from error


def read_file(path: Path, join: Join = joined) -> Iterator[Piece] | np.ndarray:
    """Reads a local file: its text in pieces, its conversations, or the token ids of an .npy file.

    Raises:
        UserError: The file is missing, empty, of an unknown type or not what its suffix says (also while iterating).
    """
    if not path.is_file():
        kind = "not a file" if path.exists() else "not there"
        raise UserError(f"{path} is {kind}: check the path")
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise UserError(f"{path} is of an unsupported type: use one of {', '.join(READERS)} (text also with .gz)")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: name a file with text")
    return _read_ids(path) if reader is _read_ids else _guarded(path, reader, join)


def _suffix(path: Path) -> str:
    """The suffix that determines a file's type, in lower case and without .gz."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _read_ids(path: Path) -> np.ndarray:
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
        yield from iter(lambda: file.read(_BLOCK), "")


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
            batches = file.iter_batches(_ROWS, columns=read or None)
            yield from join((row for batch in batches for row in batch.to_pylist()), str(path))
    except ArrowException as error:
        raise UserError(f"{path} is a broken parquet file ({first_line(error)}): check the file") from error


READERS: dict[str, Callable[..., Any]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".npy": _read_ids,
}
"""The reader of each type of file."""
