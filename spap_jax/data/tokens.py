"""Calibration and evaluation data as token blocks [B, T], from a hub name, a local file, texts or an array.

Texts, or conversations through the chat template, become one stream of tokens, cut into windows of T tokens that do not
overlap: calibration samples some at random, evaluation takes them in order. Where a model needs it, each window begins
with the beginning-of-text token. Named sets follow the protocol of the papers (`sources.NAMED`).
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from spap_jax.data import chat
from spap_jax.data.auto_tokenizer import auto_tokenizer
from spap_jax.data.sources import (
    LOCAL,
    SPLITS,
    Data,
    Opened,
    Piece,
    Role,
    Share,
    is_file,
    open_data,
    sequence_counts,
    shares_of,
)
from spap_jax.errors import UserError, first_line, option, warn
from spap_jax.settings import is_count, is_seed
from spap_jax.storage.files import require_hub

POOL = 8
"""Calibration reads text for this many times the windows asked for, to sample from; the rest is kept too."""

CHUNK = 4_000_000
"""Characters tokenised at once."""

_REMEDY = "name a model folder that holds its tokenizer files (tokenizer.json)"


@dataclass(frozen=True, eq=False, repr=False)
class TokenBlocks:
    """Token blocks and where they came from.

    Attributes:
        tokens: int32 [B, T].
        description: Short description of the data and of how the windows were chosen.
        available: Number of windows of T tokens to choose from.
        mask: bool [B, T], True on the tokens whose predictions count, as the assistant's; None if all count.
        further: For calibration, other windows of the same data, for joint steps; None if the data hold no more.
    """

    tokens: np.ndarray
    description: str
    available: int
    mask: np.ndarray | None = None
    further: "TokenBlocks | None" = None

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the bytes of `tokens` (little-endian int32, row by row), and of those of `mask`, if any."""
        ids = np.ascontiguousarray(self.tokens, dtype="<i4").tobytes()
        return hashlib.sha256(ids + (b"" if self.mask is None else self.mask.tobytes())).hexdigest()

    def __repr__(self) -> str:
        return f"TokenBlocks({list(self.tokens.shape)}, {self.description!r}, sha256 {self.sha256[:8]}...)"


def ids_of(tokens: Any) -> Any:
    """Returns the token ids [B, T] of `TokenBlocks`, or the argument itself."""
    return getattr(tokens, "tokens", tokens)


def mask_of(tokens: Any) -> np.ndarray | None:
    """Returns the mask [B, T] of `TokenBlocks`; None for those without one, and for arrays of token ids."""
    return tokens.mask if isinstance(tokens, TokenBlocks) else None


def further_of(tokens: Any) -> TokenBlocks | None:
    """Returns the further windows of `TokenBlocks`; None for those without, and for arrays of token ids."""
    return tokens.further if isinstance(tokens, TokenBlocks) else None


def check_counted(mask: np.ndarray | None, which: str) -> None:
    """Checks that a mask [B, T] lets a prediction count; each sequence has T - 1, none of its first token.

    Raises:
        UserError: It lets none count.
    """
    if mask is not None and not mask[:, 1:].any():
        raise UserError(f"the mask lets no prediction of {which} count: give sequences in which some do.")


def concatenated(parts: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Concatenates blocks [B, T] and their masks; None is a mask that lets all tokens count."""
    tokens, masks = zip(*parts, strict=True)
    if all(mask is None for mask in masks):
        return np.concatenate(tokens), None
    marked = (np.ones(ids.shape, bool) if mask is None else mask for ids, mask in zip(tokens, masks, strict=True))
    return np.concatenate(tokens), np.concatenate([*marked])


def load_tokens(
    data: Data,
    *,
    tokenizer: str | Path | Any | None,
    sequence_length: int,
    sequences: int | None,
    seed: int = 0,
    role: Role,
    vocabulary: int | None = None,
    bos: bool | None = None,
) -> TokenBlocks:
    """Loads data, given by name or as an object, as token blocks [B, T].

    Args:
        data: `wikitext2`, `c4` (`c4:FILE` for a copy of its file), a hub data set `owner/name` or `owner/name:config`,
            a .txt, .jsonl, .json (also with .gz), .parquet or .npy file by its path or address (gs://bucket/file.txt);
            for calibration also several of these, each with its weight: `a.jsonl:0.7,b.txt:0.3`. Or an object: texts,
            or dicts with a ``text``, in an iterable such as a list or a data set; a dict of splits of these; or an
            array of token ids, a stream [N] or sequences [B, T']. Rows with ``messages`` in place of ``text`` are
            conversations, of which the tokens that the assistant wrote count.
        tokenizer: A model folder, a hub id, or a tokenizer object of ``transformers`` or ``tokenizers``; not needed for
            token ids.
        sequence_length: Number of tokens in a window, T.
        sequences: Number of windows, B; None takes all of them.
        role: Calibration samples windows at random, of long data from its beginning; evaluation takes the first ones in
            order, from another split.
        vocabulary: Size of the vocabulary, v; token ids must be below it.
        bos: Whether each window begins with the beginning-of-text token, followed by T - 1 tokens of the text. By
            default only for Gemma, whose models predict badly without. Token ids are taken as they are.

    Raises:
        UserError: The data cannot be read or do not provide what was asked for.
    """
    if role not in SPLITS:
        raise UserError(f"there is no role {role!r}: tokens are for {' or '.join(map(repr, SPLITS))}.")
    if not is_count(sequence_length) or (sequences is not None and not is_count(sequences)):
        raise UserError(
            f"{option('sequence_length')} and {option('sequences')} must be at least 1: give positive whole numbers"
        )
    if not is_seed(seed):
        raise UserError(f"{option('seed')} must be a whole number of at least 0, not {seed!r}: give one.")
    given = {"tokenizer": tokenizer, "sequence_length": sequence_length, "vocabulary": vocabulary, "bos": bos}
    parts = shares_of(data) if isinstance(data, str) else []
    if len(parts) > 1:
        return _mixed(parts, sequences, seed, role, given)
    opened = open_data(data, role)
    tokens, mask, start, more = _windows(opened, sequences, role, **given)
    source = f"{'the first ' * more}{len(tokens)} windows of {sequence_length} tokens"
    source += f" that begin with {start.text}" if start else ""
    source += f", seed {seed}" if role == "calibration" else ""

    def taken(rows: np.ndarray, further: TokenBlocks | None = None) -> TokenBlocks:
        description = f"{opened.file or opened.name}: {len(rows)} of {source}"
        counts = None if mask is None else mask[rows]
        if counts is not None:
            description += f", counting the {counts[:, 1:].sum()} tokens that the assistant wrote"
        return TokenBlocks(tokens[rows].astype(np.int32), description, len(tokens), counts, further)

    order = np.arange(len(tokens))
    if role == "calibration":
        order = np.random.default_rng(seed).permutation(len(order))
    rest = order[sequences : POOL * sequences] if sequences and role == "calibration" else order[:0]
    return taken(order[:sequences], taken(rest) if len(rest) else None)


def _mixed(parts: list[Share], sequences: int | None, seed: int, role: Role, given: dict[str, Any]) -> TokenBlocks:
    """Draws sequences, and further ones, from each part in proportion to its weight, in random order."""
    if role != "calibration" or sequences is None:
        raise UserError(
            f"a mixture is drawn from for calibration and training, with a number of {option('sequences')}: to "
            "evaluate, name each data set by itself"
        )
    blocks = [
        load_tokens(part.data, sequences=count, seed=seed, role=role, **given)
        for part, count in zip(parts, sequence_counts(parts, sequences), strict=True)
    ]
    further = [each.further for each in blocks if each.further]
    least = min((len(more.tokens) / len(each.tokens) for each in blocks if (more := each.further)), default=0)
    counts = [int(least * len(each.tokens)) for each in blocks] if len(further) == len(blocks) else [0]
    rest = _shuffled(further, counts, seed, None) if all(counts) else None
    return _shuffled(blocks, [len(each.tokens) for each in blocks], seed, rest)


def _shuffled(blocks: list[TokenBlocks], counts: list[int], seed: int, further: TokenBlocks | None) -> TokenBlocks:
    """Returns the first windows of several data sets, as many of each as asked for, in random order."""
    pairs = zip(blocks, counts, strict=True)
    tokens, mask = concatenated((own.tokens[:n], None if own.mask is None else own.mask[:n]) for own, n in pairs)
    order = np.random.default_rng(seed).permutation(len(tokens))
    description, available = "; ".join(own.description for own in blocks), sum(own.available for own in blocks)
    return TokenBlocks(tokens[order], description, available, None if mask is None else mask[order], further)


class _Start(NamedTuple):
    """The token that each window begins with: its id, and its text."""

    id: int
    text: str


def _windows(
    opened: Opened,
    sequences: int | None,
    role: Role,
    tokenizer: str | Path | Any | None,
    sequence_length: int,
    vocabulary: int | None,
    bos: bool | None,
) -> tuple[np.ndarray, np.ndarray | None, _Start | None, bool]:
    """Returns all windows in order: ids [W, T], mask [W, T] or None, start or None, and whether more can be read."""
    name, content, mask, start, more = opened.name, opened.content, None, None, False
    if isinstance(content, np.ndarray):
        if bos:
            raise UserError(f"{name} holds token ids, which are taken as they are: leave out {option('bos')}")
    else:
        if tokenizer is None:
            raise UserError(
                f"{name} is text and needs a tokenizer: name a model folder that has one, or give token ids"
            )
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        start = _start_of_windows(loaded, bos, sequence_length)
        length = sequence_length - (start is not None)  # tokens of the text in a window
        # One token more than the windows hold, as the first may be left out below.
        enough = sequences and sequences * length * (POOL if role == "calibration" else 1) + 1
        # If each window begins with a token of its own, the text as a whole has no special tokens.
        ids, mask, more = _tokenise(content, name, loaded, enough, opened.protocol.special_tokens and not start)
        if mask is not None and start and start.id in ids[:1]:  # the template's, which would be there twice
            ids, mask = ids[1:], mask[1:]
        used = opened.protocol.windows and opened.protocol.windows * length
        content, mask = ids[:used], None if mask is None else mask[:used]
    tokens = _cut(content, name, sequence_length, sequences, start and start.id)
    low, high, limit = int(tokens.min()), int(tokens.max()), vocabulary or 2**31
    if low < 0 or high >= limit:
        raise UserError(
            f"{name} gives token id {low if low < 0 else high}, outside the model's vocabulary of {limit}: make the "
            "ids with the tokenizer that belongs to this model, whose files are beside its weights"
        )
    if mask is not None:
        mask = _cut(mask, name, sequence_length, sequences, start and 0) > 0
        tokens, mask = _answered(tokens, mask, name, role, sequences)
    return tokens, mask, start, more


def _answered(
    windows: np.ndarray, mask: np.ndarray, name: str, role: Role, asked: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the windows [B, T] and masks [B, T]; for calibration only those with a token that counts."""
    counts = mask[:, 1:].any(axis=1)  # nothing predicts the first token
    least = (asked or 1) if role == "calibration" else 1
    if counts.sum() < least:
        raise UserError(
            f"{name} has {counts.sum()} windows in which the assistant writes, not the {least} asked for: give more "
            f"conversations, fewer {option('sequences')}, or a larger {option('sequence_length')}"
        )
    return (windows[counts], mask[counts]) if role == "calibration" else (windows, mask)


def _cut(ids: np.ndarray, name: str, length: int, asked: int | None, first: int | None) -> np.ndarray:
    """Cuts a stream [N], or sequences [B, T'], to windows [B, T], each of which begins with ``first``, if given."""
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        shape = list(ids.shape)
        raise UserError(f"{name} holds {ids.dtype} {shape}: give whole token ids, a stream [N] or sequences [B, T]")
    per_window = length - (first is not None)
    rows = ids if ids.ndim == 2 else ids[None]
    windows = rows[:, : rows.shape[1] // per_window * per_window].reshape(-1, per_window)
    if first is not None:
        windows = np.insert(windows, 0, first, axis=1)
    if len(windows) < (asked or 1):
        raise UserError(
            f"{name} holds token ids {list(ids.shape)}, which make {len(windows)} windows of {length}, not the "
            f"{asked or 1} asked for: give more text, fewer {option('sequences')} or a smaller "
            f"{option('sequence_length')}"
        )
    return windows


def _start_of_windows(tokenizer: Any, bos: bool | None, length: int) -> _Start | None:
    """Returns the token that windows begin with, or None; by default only the tokenizer class of Gemma has one."""
    if not (type(tokenizer).__name__.startswith("Gemma") if bos is None else bos):
        return None
    if getattr(tokenizer, "bos_token", None) is None:
        raise UserError(
            f"the tokenizer names no beginning-of-text token, so windows cannot begin with one: add bos_token to its "
            f"tokenizer_config.json, or leave out {option('bos')}"
        )
    if length < 2:
        raise UserError(
            f"windows that begin with {tokenizer.bos_token} need room for text: give {option('sequence_length', 2)} or "
            "more"
        )
    return _Start(tokenizer.bos_token_id, tokenizer.bos_token)


def _tokenise(
    pieces: Iterable[Piece], name: str, tokenizer: Any, enough: int | None, special: bool
) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Returns token ids [N], a mask [N] for conversations, and whether more was left; stops after `enough` tokens."""
    pieces = iter(pieces)
    first = next(pieces, "")
    texts: Iterator[Any] = chain([first], pieces)
    if isinstance(first, chat.Conversation):
        encode = chat.encoder_of(tokenizer)
    else:
        texts, encode = _chunks(texts, CHUNK), _text_encoder(tokenizer, special)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    count, more = 0, False
    for text in texts:
        try:
            some, mask = encode(text)
        except TypeError as error:  # the tokenizer's error for an unpaired surrogate, which JSON can spell
            raise UserError(f"{name} holds text that is not valid Unicode: repair it") from error
        ids.append(some)
        masks += [] if mask is None else [mask]
        count += len(some)
        if enough is not None and count >= enough:
            more = next(texts, None) is not None
            break
    if not ids:
        raise UserError(f"{name} holds no text: {LOCAL}")
    return np.concatenate(ids), np.concatenate(masks) if masks else None, more


def _text_encoder(tokenizer: Any, special: bool) -> Callable[[str], tuple[np.ndarray, None]]:
    """Returns the function that encodes the chunks of one text, the first of which may have special tokens."""
    if not hasattr(tokenizer, "encode") or not (callable(tokenizer) or hasattr(tokenizer, "token_to_id")):
        raise UserError(
            f"{type(tokenizer).__name__} is no tokenizer: give a model folder, a hub id, or a tokenizer object of "
            "transformers or of tokenizers."
        )
    at_start = iter([special])

    def encode(text: str) -> tuple[np.ndarray, None]:
        special_tokens = next(at_start, False)
        if not callable(tokenizer):  # a tokenizer of the library tokenizers, which does not warn of long texts
            return np.asarray(tokenizer.encode(text, add_special_tokens=special_tokens).ids, np.int64), None
        call = cast(Callable[..., Mapping[str, Sequence[int]]], tokenizer)
        found = call(text, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
        return np.asarray(found["input_ids"], np.int64), None

    return encode


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
            files.
    """
    from huggingface_hub.errors import StrictDataclassError

    folder = Path(os.path.expanduser(named))
    try:
        if folder.is_dir():
            return _pretrained(str(folder), local=True)
        if isinstance(named, Path) or is_file(named):
            raise FileNotFoundError("there is no such folder")
        try:
            return _pretrained(named, local=True)
        except Exception:  # it is not in the cache
            require_hub(f"the tokenizer {named}", _REMEDY)
            return _pretrained(named, local=False)
    except UserError:
        raise
    except StrictDataclassError as error:
        said = " ".join(str(error).split()).partition(" Errors:")[0].rstrip(".")
        raise UserError(f"transformers does not take the config.json of {named} ({said}): correct it") from error
    except Exception as error:  # transformers raises all kinds of exceptions for a missing or broken file
        raise UserError(f"the tokenizer {named} cannot be loaded ({first_line(error)}): {_REMEDY}") from error


def _pretrained(where: str, *, local: bool) -> Any:
    loaded = auto_tokenizer().from_pretrained(where, local_files_only=local, trust_remote_code=False)
    if len(loaded) <= len(loaded.all_special_ids):
        raise ValueError("it has no vocabulary")
    return loaded


def warn_of_overlap(learned: np.ndarray, evaluated: np.ndarray | None) -> None:
    """Warns if perplexity will be measured on sequences [T] that the model is pruned or trained on."""
    if evaluated is None:
        return
    both = {row.tobytes() for row in learned} & {row.tobytes() for row in evaluated}
    if both:
        warn(
            f"{len(both)} of the {len(learned)} sequences that are learned from are also measured on, so the "
            "perplexity will look better than it is: name other text for one of the two."
        )
