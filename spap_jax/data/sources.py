"""Where data come from: a local file, an address, the hub, a named set, or objects in memory."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spap_jax.data.in_memory import Data, rows_of
from spap_jax.data.named_sets import NAMED, Protocol, Role, data_name
from spap_jax.data.texts import LOCAL, Join, Piece, is_file, joined, read_file
from spap_jax.errors import UserError, first_line
from spap_jax.storage.files import cached_file, cached_splits, fetch_file, hub_file, hub_splits
from spap_jax.storage.location import is_address

SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train", "train_sft"),
    "evaluation": ("test", "validation", "test_sft"),
}
"""The splits of a data set that a role reads: the first that there is. Those in ``_sft`` are of conversations."""


_PLAIN = Protocol()


class Opened(NamedTuple):
    """Opened data: name, token ids or text in pieces or conversations, how rows were joined, public name of a file."""

    name: str
    content: Iterator[Piece] | np.ndarray
    protocol: Protocol = _PLAIN
    file: str | None = None


def open_data(data: Data, role: Role, join: Join = joined) -> Opened:
    """Finds and opens data.

    Args:
        data: Their name, or an object.
        role: What they are for, which decides on the split.
        join: Function that makes pieces of rows, except those of a named set, which has its own protocol.

    Raises:
        UserError: There are none, or they cannot be read.
    """
    if isinstance(data, Mapping):
        return _open_split(data, "the given data set", role, join)
    if not isinstance(data, str | Path):
        rows, name = rows_of(data), "the given text"
        return Opened("the given array", _array(data)) if rows is None else Opened(name, join(rows, name))
    short, _, copy = str(data).partition(":")
    if short in NAMED:
        return _open_named(short, copy, role)
    if isinstance(data, Path) or is_file(data):
        return Opened(str(data), read_file(local_file(data), join), file=data_name(data))
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", data)
    if named is None:
        raise UserError(
            f"there is no file and no data set {str(data)[:80]}: "
            f"name {', '.join(NAMED)}, a hub data set owner/name, or a local file"
        )
    return _open_split(hub_splits(named[1], named[2], remedy=LOCAL), data, role, join)


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
    """Opens a named data set: a local copy, its cached file, the cache of `datasets`, or else a download."""
    named = NAMED[short]
    split, file = named.files[role]
    protocol = named.evaluation if role == "evaluation" else _PLAIN
    if copy:
        content = read_file(local_file(copy), protocol.join)
        return Opened(f"{short} ({copy})", content, protocol, data_name(f"{short}:{copy}"))
    if cached_file(named.repo, file, named.revision) is None:
        splits = cached_splits(named.repo, named.config)
        if splits is not None:
            return _open_split(splits, short, role, protocol.join, protocol)
    path = hub_file(named.repo, file, named.revision, remedy=f"give a local copy as {short}:FILE, or {LOCAL}")
    return Opened(f"{short} ({split} split)", read_file(path, protocol.join), protocol)


def _open_split(
    splits: Mapping[str, Iterable[Any]], name: str, role: Role, join: Join, protocol: Protocol = _PLAIN
) -> Opened:
    """Opens the split of a data set that the role uses."""
    for split in SPLITS[role]:
        if split in splits:
            return Opened(f"{name} ({split} split)", join(_rows(splits[split], name), name), protocol)
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
