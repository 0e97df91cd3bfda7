"""Calibration and evaluation data: token blocks [B, T] from a hub name, a local file, texts or an array.

Texts become one stream of tokens, without special tokens; the rows of a data set are joined by a blank line. Evaluation
on a named set follows the protocol of the papers instead (`named_sets.py`). The stream is cut into windows of T tokens
that do not overlap: calibration samples some at random, evaluation takes them in order.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spap_jax.errors import UserError, option
from spap_jax.hub import cached_file, cached_splits, first_line, hub_file, hub_splits, require_hub
from spap_jax.in_memory import Data, encoder_of, rows_of
from spap_jax.named_sets import NAMED, Protocol, Role, data_name
from spap_jax.remote import fetch_file, is_address
from spap_jax.settings import is_count
from spap_jax.texts import is_file, joined, looks_local, read_file
from spap_jax.windows import check_ids, cut

SPLITS: dict[Role, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation")}
CHUNK = 4_000_000  # characters tokenised at once (about a second per 2 million, 150 bytes of memory each)
POOL = 4  # calibration reads text for this many times the windows asked for, to sample from
LOCAL = "name a local .txt, .jsonl, .json, .parquet or .npy file instead"
TOKENIZER = "name a model folder that holds its tokenizer files (tokenizer.json)"


@dataclass(frozen=True, eq=False, repr=False)
class TokenBlocks:
    """Token blocks and where they came from.

    Attributes:
        tokens: int32 [B, T].
        description: Short description of the data and of how the windows were chosen.
        sha256: SHA-256 of the bytes of `tokens` (little-endian int32, row by row).
        available: Number of windows of T tokens to choose from.
    """

    tokens: np.ndarray
    description: str
    sha256: str
    available: int

    def __repr__(self) -> str:
        return f"TokenBlocks({list(self.tokens.shape)}, {self.description!r}, sha256 {self.sha256[:8]}...)"


def load_tokens(
    data: Data,
    *,
    tokenizer: str | Path | Any | None,
    sequence_length: int,
    sequences: int | None,
    seed: int = 0,
    role: Role,
    vocabulary: int | None = None,
) -> TokenBlocks:
    """Loads data, given by name or as an object, as token blocks [B, T].

    Args:
        data: `wikitext2`, `c4` (`c4:FILE` for a copy of its file), a hub data set `owner/name` or
            `owner/name:config`, a .txt, .jsonl, .json (also with .gz), .parquet or .npy file by its path or
            address (gs://bucket/file.txt). Or an object: texts, or dicts with a ``text``, in an iterable such as a list
            or a data set; a dict of splits of these; or an array of token ids, a stream [N] or sequences [B, T'].
        tokenizer: A model folder, a hub id, or a tokenizer object of ``transformers`` or ``tokenizers``; not needed for
            token ids.
        sequence_length: Number of tokens in a window, T.
        sequences: Number of windows, B; None takes all of them.
        seed: Seed of the choice of calibration windows.
        role: Calibration samples windows at random; evaluation takes the first ones in order, from another split.
        vocabulary: Size of the vocabulary, v; token ids must be below it.

    Raises:
        UserError: The data cannot be read or do not provide what was asked for.
    """
    if role not in SPLITS:
        raise UserError(f"there is no role {role!r}: tokens are for {' or '.join(map(repr, SPLITS))}.")
    if not is_count(sequence_length) or (sequences is not None and not is_count(sequences)):
        raise UserError(
            f"{option('sequence_length')} and {option('sequences')} must be at least 1: give positive whole numbers"
        )
    if not is_count(seed, least=0):
        raise UserError(f"{option('seed')} must be a whole number of at least 0, not {seed!r}: give one.")
    name, content, protocol, file = _open(data, role)
    text = not isinstance(content, np.ndarray)
    if text:
        times = POOL if role == "calibration" else 1
        enough = None if sequences is None else times * sequences * sequence_length
        content = _tokenise(content, name, tokenizer, enough, protocol.special_tokens)
        content = content[: protocol.windows and protocol.windows * sequence_length]
    windows = cut(content, name, sequence_length, sequences)
    check_ids(windows, name, vocabulary, tokenizer if text else None)
    taken = np.arange(len(windows))
    if role == "calibration":
        taken = np.random.default_rng(seed).permutation(len(windows))
    tokens = np.ascontiguousarray(windows[taken[:sequences]], dtype="<i4")
    drawn = f", seed {seed}" if role == "calibration" else ""
    description = f"{file or name}: {len(tokens)} of {len(windows)} windows of {sequence_length} tokens{drawn}"
    return TokenBlocks(tokens, description, hashlib.sha256(tokens.tobytes()).hexdigest(), len(windows))


# Tokens


def _tokenise(
    pieces: Iterable[str], name: str, tokenizer: str | Path | Any | None, enough: int | None, special: bool
) -> np.ndarray:
    """Token ids [N] of a text given in pieces; stops reading once there are `enough` (None: reads all).

    Special tokens, if any, are added once, since the pieces together are a single text.
    """
    if tokenizer is None:
        raise UserError(f"{name} is text and needs a tokenizer: name a model folder that has one, or give token ids")
    encode = encoder_of(load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer)
    parts: list[np.ndarray] = []
    for text in _chunks(pieces, CHUNK):
        try:
            ids = encode(text, special and not parts)
        except TypeError as error:  # the tokenizer's error for an unpaired surrogate, which JSON can spell
            raise UserError(f"{name} holds text that is not valid Unicode: repair it") from error
        parts.append(np.asarray(ids, np.int64))
        if enough is not None and sum(map(len, parts)) >= enough:
            break
    if not parts:
        raise UserError(f"{name} holds no text: {LOCAL}")
    return np.concatenate(parts)


def _chunks(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Yields the text of the pieces in chunks of `size` characters; the last one may be shorter."""
    held: list[str] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= size:
            text = "".join(held)
            whole = count - count % size
            yield from (text[start : start + size] for start in range(0, whole, size))
            held, count = [text[whole:]], count - whole
    if count:
        yield "".join(held)


def load_tokenizer(named: str | Path) -> Any:
    """Loads the tokenizer of a model folder or of a hub id through transformers.

    Raises:
        UserError: It cannot be loaded, or is the empty one that transformers makes for a folder without tokenizer
            files; or transformers, which reads config.json to find it, rejects a value there.
    """
    from huggingface_hub.errors import StrictDataclassError

    folder = Path(named).expanduser()
    if folder.is_dir():
        loaded = _pretrained(str(folder), local=True)
    elif isinstance(named, Path) or looks_local(named):
        loaded = FileNotFoundError("there is no such folder")
    else:
        loaded = _hub_tokenizer(named)
    if isinstance(loaded, StrictDataclassError):
        said = " ".join(str(loaded).split()).partition(" Errors:")[0].rstrip(".")
        raise UserError(f"transformers does not take the config.json of {named} ({said}): correct it") from loaded
    if isinstance(loaded, Exception):
        raise UserError(f"the tokenizer {named} cannot be loaded ({first_line(loaded)}): {TOKENIZER}") from loaded
    return loaded


def _hub_tokenizer(named: str) -> Any:
    """Returns the tokenizer of a hub id, cached or downloaded, or the error that loading it raised."""
    loaded = _pretrained(named, local=True)
    if isinstance(loaded, Exception):
        require_hub(f"the tokenizer {named}", TOKENIZER)
        return _pretrained(named, local=False)
    return loaded


def _pretrained(where: str, *, local: bool) -> Any:
    """Returns the tokenizer that transformers loads, or the error that it raised."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing PyTorch
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises all kinds of exceptions for a missing or broken file
        return error
    return loaded if len(loaded) > len(loaded.all_special_ids) else ValueError("it has no vocabulary")


# Sources


class _Opened(NamedTuple):
    """Opened data: their name, token ids or text in pieces, how rows were joined, and the public name of a file."""

    name: str
    content: Iterator[str] | np.ndarray
    protocol: Protocol = Protocol()
    file: str | None = None


def _open(data: Data, role: Role) -> _Opened:
    """Finds and opens the data."""
    if isinstance(data, Mapping):
        return _open_split(data, "the given data set", role, Protocol())
    if not isinstance(data, str | Path):
        rows, name = rows_of(data), "the given text"
        return _Opened("the given array", np.asarray(data)) if rows is None else _Opened(name, joined(rows, name))
    short, _, copy = str(data).partition(":")
    if short in NAMED:
        return _open_named(short, copy, role)
    if isinstance(data, Path) or is_file(data):
        return _Opened(str(data), read_file(local_file(data)), file=data_name(data))
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", data)
    if named is None:
        raise UserError(
            f"there is no file and no data set {data}: "
            f"name {', '.join(NAMED)}, a hub data set owner/name, or a local file"
        )
    return _open_split(hub_splits(named[1], named[2], remedy=LOCAL), data, role, Protocol())


def local_file(named: str | Path) -> Path:
    """Returns the local path of a file; a file at an address is downloaded.

    Raises:
        UserError: It cannot be downloaded.
    """
    return fetch_file(str(named)) if is_address(named) else Path(named).expanduser()


def _open_named(short: str, copy: str, role: Role) -> _Opened:
    """Opens a named data set: a local copy, its cached file, the cache of `datasets`, or else a download."""
    named = NAMED[short]
    split, file = named.files[role]
    protocol = named.protocol(role)
    if copy:
        content = read_file(local_file(copy), protocol.join)
        return _Opened(f"{short} ({copy})", content, protocol, data_name(f"{short}:{copy}"))
    if cached_file(named.repo, file, named.revision) is None:
        splits = cached_splits(named.repo, named.config)
        if splits is not None:
            return _open_split(splits, short, role, protocol)
    path = hub_file(named.repo, file, named.revision, remedy=f"give a local copy as {short}:FILE, or {LOCAL}")
    return _Opened(f"{short} ({split} split)", read_file(path, protocol.join), protocol)


def _open_split(splits: Mapping[str, Iterable[Any]], name: str, role: Role, protocol: Protocol) -> _Opened:
    """Opens the split of a data set that the role uses."""
    for split in SPLITS[role]:
        if split in splits:
            return _Opened(f"{name} ({split} split)", protocol.join(_rows(splits[split], name), name), protocol)
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
