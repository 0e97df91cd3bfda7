"""Calibration and evaluation data: token blocks [B, T] from a hub name, a local file, texts or an array.

Texts become one stream of tokens, without special tokens; the rows of a data set are joined by a blank line. Evaluation
on a named set follows the protocol of the papers instead (`named_sets.py`). Conversations become one stream too, each
through the tokenizer's chat template, with a mask of what the assistant wrote. The stream is cut into windows of T
tokens that do not overlap: calibration samples some at random, evaluation takes them in order.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spap_jax import conversations
from spap_jax.conversations import Conversation
from spap_jax.errors import UserError, option
from spap_jax.hub import cached_file, cached_splits, first_line, hub_file, hub_splits, require_hub
from spap_jax.in_memory import Data, encoder_of, rows_of
from spap_jax.mixtures import Part, parts_of, shares
from spap_jax.named_sets import NAMED, Protocol, Role, data_name
from spap_jax.remote import fetch_file, is_address
from spap_jax.settings import is_count
from spap_jax.texts import Piece, is_file, joined, looks_local, read_file
from spap_jax.windows import check_ids, cut

SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train", "train_sft"),  # the latter is usual for conversations
    "evaluation": ("test", "validation", "test_sft"),
}
CHUNK = 4_000_000  # characters tokenised at once (about a second per 2 million, 150 bytes of memory each)
POOL = 8  # calibration reads text for this many times the windows asked for, to sample from; the rest is kept too
LOCAL = "name a local .txt, .jsonl, .json, .parquet or .npy file instead"
TOKENIZER = "name a model folder that holds its tokenizer files (tokenizer.json)"


@dataclass(frozen=True, eq=False, repr=False)
class TokenBlocks:
    """Token blocks and where they came from.

    Attributes:
        tokens: int32 [B, T].
        description: Short description of the data and of how the windows were chosen.
        sha256: SHA-256 of the bytes of `tokens` (little-endian int32, row by row), and of those of `mask`, if any.
        available: Number of windows of T tokens to choose from.
        mask: bool [B, T], True on the tokens whose predictions count, such as those that the assistant wrote in
            conversations; None if all count.
        further: For calibration, other windows of the same data, which are for pruning with joint steps as well; None
            if the data hold no more.
    """

    tokens: np.ndarray
    description: str
    sha256: str
    available: int
    mask: np.ndarray | None = None
    further: "TokenBlocks | None" = None

    def __repr__(self) -> str:
        return f"TokenBlocks({list(self.tokens.shape)}, {self.description!r}, sha256 {self.sha256[:8]}...)"


def mask_of(tokens: Any) -> np.ndarray | None:
    """Returns the mask [B, T] of `TokenBlocks`; None for those without one, and for arrays of token ids."""
    return tokens.mask if isinstance(tokens, TokenBlocks) else None


def further_of(tokens: Any) -> TokenBlocks | None:
    """Returns the further windows of `TokenBlocks`; None for those without, and for arrays of token ids."""
    return tokens.further if isinstance(tokens, TokenBlocks) else None


def new_blocks(
    tokens: np.ndarray,
    description: str,
    available: int,
    mask: np.ndarray | None = None,
    further: TokenBlocks | None = None,
) -> TokenBlocks:
    """Returns token blocks [B, T] with their hash."""
    tokens = np.ascontiguousarray(tokens, dtype="<i4")
    sha256 = hashlib.sha256(tokens.tobytes() + (b"" if mask is None else mask.tobytes())).hexdigest()
    return TokenBlocks(tokens, description, sha256, available, mask, further)


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
            address (gs://bucket/file.txt); for calibration also several of these, each with its weight:
            `a.jsonl:0.7,b.txt:0.3`. Or an object: texts, or dicts with a ``text``, in an iterable such as a list
            or a data set; a dict of splits of these; or an array of token ids, a stream [N] or sequences [B, T'].
            Rows with ``messages`` in place of ``text`` are conversations, of which the tokens that the assistant wrote
            count.
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
    given = {"tokenizer": tokenizer, "sequence_length": sequence_length, "vocabulary": vocabulary}
    parts = parts_of(data) if isinstance(data, str) else []
    if len(parts) > 1:
        return _mixed(parts, sequences, seed, role, given)
    name, content, protocol, file = _open(data, role)
    used, mask = None, None
    if not isinstance(content, np.ndarray):
        used = tokenizer
        times = POOL if role == "calibration" else 1
        enough = None if sequences is None else times * sequences * sequence_length
        content, mask = _tokenise(content, name, tokenizer, enough, protocol.special_tokens)
        content = content[: protocol.windows and protocol.windows * sequence_length]
    windows = cut(content, name, sequence_length, sequences)
    check_ids(windows, name, vocabulary, used)
    if mask is not None:
        mask = cut(mask[: len(content)], name, sequence_length, sequences) > 0
        windows, mask = _answered(windows, mask, name, role, sequences)
    order = np.arange(len(windows))
    if role == "calibration":
        order = np.random.default_rng(seed).permutation(len(windows))
    drawn = f", seed {seed}" if role == "calibration" else ""

    def blocks(taken: np.ndarray, further: TokenBlocks | None = None) -> TokenBlocks:
        own = None if mask is None else mask[taken]
        description = f"{file or name}: {len(taken)} of {len(windows)} windows of {sequence_length} tokens{drawn}"
        if own is not None:
            description += f", counting the {own[:, 1:].sum()} tokens that the assistant wrote"
        return new_blocks(windows[taken], description, len(windows), own, further)

    rest = order[sequences : POOL * sequences] if sequences and role == "calibration" else order[:0]
    return blocks(order[:sequences], blocks(rest) if len(rest) else None)


def _answered(
    windows: np.ndarray, mask: np.ndarray, name: str, role: Role, asked: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the windows [B, T] and masks [B, T], for calibration only those in which something counts.

    Raises:
        UserError: There are too few.
    """
    counts = mask[:, 1:].any(axis=1)  # nothing predicts the first token
    least = (asked or 1) if role == "calibration" else 1
    if counts.sum() < least:
        raise UserError(
            f"{name} has {counts.sum()} windows in which the assistant writes, not the {least} asked for: give more "
            f"conversations, fewer {option('sequences')}, or a larger {option('sequence_length')}"
        )
    return (windows[counts], mask[counts]) if role == "calibration" else (windows, mask)


def _mixed(parts: list[Part], sequences: int | None, seed: int, role: Role, given: dict[str, Any]) -> TokenBlocks:
    """Draws sequences from each part in proportion to its weight, in random order.

    Raises:
        UserError: It is not for a given number of sequences to calibrate on, or a part cannot be read.
    """
    if role != "calibration" or sequences is None:
        raise UserError(
            f"a mixture is drawn from for calibration and training, with a number of {option('sequences')}: to "
            "evaluate, name each data set by itself"
        )
    each = [
        load_tokens(part.data, sequences=count, seed=seed, role=role, **given)
        for part, count in zip(parts, shares(parts, sequences), strict=True)
    ]
    return _shuffled(each, seed, _further_mixed(each, seed))


def _further_mixed(each: list[TokenBlocks], seed: int) -> TokenBlocks | None:
    """Mixes the further windows of several data sets in the proportions of their windows, as many as all can give."""
    least = min(len(blocks.further.tokens) / len(blocks.tokens) if blocks.further else 0 for blocks in each)
    counts = [int(least * len(blocks.tokens)) for blocks in each]
    parts = [_first(blocks.further, count) for blocks, count in zip(each, counts, strict=True) if blocks.further]
    return _shuffled(parts, seed, None) if all(counts) else None


def _first(blocks: TokenBlocks, count: int) -> TokenBlocks:
    """Returns the first windows of a data set, as those of a smaller one."""
    mask = None if blocks.mask is None else blocks.mask[:count]
    return new_blocks(blocks.tokens[:count], blocks.description, blocks.available, mask)


def _shuffled(each: list[TokenBlocks], seed: int, further: TokenBlocks | None) -> TokenBlocks:
    """Returns the windows of several data sets in random order."""
    order, mask = np.random.default_rng(seed).permutation(sum(len(blocks.tokens) for blocks in each)), None
    if any(blocks.mask is not None for blocks in each):
        whole = (np.ones(blocks.tokens.shape, bool) for blocks in each)
        masks = [ones if blocks.mask is None else blocks.mask for ones, blocks in zip(whole, each, strict=True)]
        mask = np.concatenate(masks)[order]
    tokens = np.concatenate([blocks.tokens for blocks in each])[order]
    description = "; ".join(blocks.description for blocks in each)
    return new_blocks(tokens, description, sum(blocks.available for blocks in each), mask, further)


# Tokens


def _tokenise(
    pieces: Iterable[Piece], name: str, tokenizer: str | Path | Any | None, enough: int | None, special: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids [N] of a text given in pieces, or of conversations; stops reading once there are `enough`, if given.

    Special tokens, if any, are added once to a text, since its pieces together are a single text. Conversations have
    those of the chat template, and a mask [N], 1 on what the assistant wrote.
    """
    if tokenizer is None:
        raise UserError(f"{name} is text and needs a tokenizer: name a model folder that has one, or give token ids")
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    pieces = iter(pieces)
    first = next(pieces, "")
    pieces, encode = _encoder(chain([first], pieces), isinstance(first, Conversation), loaded, special)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        try:
            some, mask = encode(piece)
        except TypeError as error:  # the tokenizer's error for an unpaired surrogate, which JSON can spell
            raise UserError(f"{name} holds text that is not valid Unicode: repair it") from error
        ids.append(some)
        masks += [] if mask is None else [mask]
        count += len(some)
        if enough is not None and count >= enough:
            break
    if not ids:
        raise UserError(f"{name} holds no text: {LOCAL}")
    return np.concatenate(ids), np.concatenate(masks) if masks else None


def _encoder(
    pieces: Iterable[Any], chat: bool, tokenizer: Any, special: bool
) -> tuple[Iterable[Any], Callable[[Any], tuple[np.ndarray, np.ndarray | None]]]:
    """Returns what to encode, one after the other, and the function that returns the ids and the mask of each."""
    if chat:
        return pieces, conversations.encoder_of(tokenizer)
    encode, chunks = encoder_of(tokenizer), enumerate(_chunks(pieces, CHUNK))
    return chunks, lambda chunk: (np.asarray(encode(chunk[1], special and chunk[0] == 0), np.int64), None)


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
    """Opened data: name, token ids or text in pieces or conversations, how rows were joined, public name of a file."""

    name: str
    content: Iterator[Piece] | np.ndarray
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
