"""Text and conversations as token ids, and the tokenizer that makes them."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spap_jax.data.auto_tokenizer import auto_tokenizer
from spap_jax.data.chat import Conversation
from spap_jax.data.chat import encoder_of as conversation_encoder
from spap_jax.data.in_memory import encoder_of
from spap_jax.data.texts import LOCAL, Piece, looks_local
from spap_jax.errors import UserError, first_line, option
from spap_jax.storage.files import require_hub

CHUNK = 4_000_000
"""Characters tokenised at once: about a second per 2 million, and 150 bytes of memory each."""

_REMEDY = "name a model folder that holds its tokenizer files (tokenizer.json)"


class Start(NamedTuple):
    """The token that each window begins with: its id, and its text."""

    id: int
    text: str


def tokenizer_for(name: str, tokenizer: str | Path | Any | None) -> Any:
    """Returns the tokenizer object for data of a given name, from a model folder, a hub id or the object itself.

    Raises:
        UserError: There is none, or it cannot be loaded.
    """
    if tokenizer is None:
        raise UserError(f"{name} is text and needs a tokenizer: name a model folder that has one, or give token ids")
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer


def start_of_windows(tokenizer: Any, bos: bool | None, length: int) -> Start | None:
    """Returns the beginning-of-text token of a tokenizer, if windows of T tokens are to begin with it.

    Args:
        tokenizer: A tokenizer object.
        bos: Whether they are; None leaves it to the model. Those of Gemma, which alone have its tokenizer, were trained
            on no text without the token, and predict badly without.
        length: Tokens in a window, T.

    Raises:
        UserError: The tokenizer has no such token, or windows have no room for another.
    """
    needed = type(tokenizer).__name__.startswith("Gemma")
    if not (needed if bos is None else bos):
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
    return Start(tokenizer.bos_token_id, tokenizer.bos_token)


def tokenise(
    pieces: Iterable[Piece], name: str, tokenizer: Any, enough: int | None, special: bool
) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Returns token ids [N] of a text in pieces, or of conversations; stops reading once there are `enough`, if given.

    The last value is whether there was more to read. Special tokens, if any, are added once to a text, since its pieces
    together are a single text. Conversations have those of the chat template, and a mask [N], 1 on what the assistant
    wrote.
    """
    pieces = iter(pieces)
    first = next(pieces, "")
    pieces, encode = _encoder(chain([first], pieces), isinstance(first, Conversation), tokenizer, special)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    count, more = 0, False
    for piece in pieces:
        try:
            some, mask = encode(piece)
        except TypeError as error:  # the tokenizer's error for an unpaired surrogate, which JSON can spell
            raise UserError(f"{name} holds text that is not valid Unicode: repair it") from error
        ids.append(some)
        masks += [] if mask is None else [mask]
        count += len(some)
        if enough is not None and count >= enough:
            more = next(pieces, None) is not None
            break
    if not ids:
        raise UserError(f"{name} holds no text: {LOCAL}")
    return np.concatenate(ids), np.concatenate(masks) if masks else None, more


def _encoder(
    pieces: Iterator[Any], chat: bool, tokenizer: Any, special: bool
) -> tuple[Iterator[Any], Callable[[Any], tuple[np.ndarray, np.ndarray | None]]]:
    """Returns what to encode, one after the other, and the function that returns the ids and the mask of each."""
    if chat:
        return pieces, conversation_encoder(tokenizer)
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

    folder = Path(os.path.expanduser(named))
    try:
        if folder.is_dir():
            return _pretrained(str(folder), local=True)
        if isinstance(named, Path) or looks_local(named):
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
