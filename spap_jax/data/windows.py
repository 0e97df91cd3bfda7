"""Cuts token ids to windows [B, T], with errors for too few windows and for ids outside the vocabulary."""

from pathlib import Path
from typing import Any

import numpy as np

from spap_jax.errors import UserError, option


def cut(ids: np.ndarray, name: str, length: int, asked: int | None, first: int | None = None) -> np.ndarray:
    """Cuts a stream [N], or each of several sequences [B, T'], to windows [B, T] that do not overlap.

    Args:
        ids: The token ids.
        name: Name of the data in errors.
        length: Number of tokens in a window, T.
        asked: Smallest sufficient number of windows; None asks for one.
        first: What each window begins with, before the T - 1 next values of a stream; None for windows of the stream
            alone.

    Raises:
        UserError: They are not token ids, or give fewer windows.
    """
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        shape = list(ids.shape)
        raise UserError(f"{name} holds {ids.dtype} {shape}: give whole token ids, a stream [N] or sequences [B, T]")
    if ids.ndim == 2:
        if ids.shape[1] < length:
            raise UserError(_too_short(name, ids, length))
        windows = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    else:
        own = length - (first is not None)
        windows = ids[: len(ids) // own * own].reshape(-1, own)
        if first is not None:
            windows = np.insert(windows, 0, first, axis=1)
    if len(windows) < (asked or 1):
        raise UserError(_too_few(name, ids, length, len(windows), asked or 1))
    return windows


def _too_short(name: str, ids: np.ndarray, length: int) -> str:
    """The error message for sequences [B, T'] that are shorter than the windows asked for."""
    longest = ids.shape[1]
    advice = f"use {option('sequence_length', longest)} or less" if longest > 1 else "give longer ones"
    held = f"sequences of {longest} {'token' if longest == 1 else 'tokens'}"
    return f"{name} holds {held}, shorter than the {length} asked for: {advice}{_as_stream(ids)}"


def _too_few(name: str, ids: np.ndarray, length: int, count: int, asked: int) -> str:
    """The error message for data that hold `count` windows if `asked` were asked for."""
    shorter = ids.size // asked if ids.ndim == 1 else 0
    ways = [option("sequences", count)] * (count > 0) + [option("sequence_length", shorter)] * (shorter > 1)
    held = f"{ids.size} tokens, which make {count} {'window' if count == 1 else 'windows'} of {length}"
    advice = f"use {' or '.join(ways)} at most, or more text" if ways else "give more text"
    return f"{name} holds {held}, not the {asked} asked for: {advice}{_as_stream(ids)}"


def _as_stream(ids: np.ndarray) -> str:
    """Advice for an array of a single row or column, which is probably one stream rather than sequences."""
    if ids.ndim == 1 or 1 not in ids.shape:
        return ""
    return f"; if its shape {list(ids.shape)} is to be one stream of tokens, save it with a single axis, as ids.ravel()"


def check_ids(windows: np.ndarray, name: str, vocabulary: int | None, tokenizer: Any) -> None:
    """Refuses token ids that the model has no embedding for.

    Args:
        windows: Token ids [B, T].
        name: Name of the data that they were read from.
        vocabulary: Size of the model's vocabulary, v.
        tokenizer: The folder, hub id or object that made the ids from text; None if the data hold ids.

    Raises:
        UserError: One of the ids is outside the vocabulary.
    """
    limit = vocabulary if vocabulary is not None else 2**31
    low, high = int(windows.min()), int(windows.max())
    if low >= 0 and high < limit:
        return
    if tokenizer is None:
        why = "the ids were made by the tokenizer of another model, so make them with this model's"
    elif isinstance(tokenizer, str | Path):
        why = f"the tokenizer files in {tokenizer} belong to another model, so put this model's in their place"
    else:
        why = "the tokenizer belongs to another model, so give this model's"
    raise UserError(
        f"{name} gives token id {low if low < 0 else high}, outside the model's vocabulary of {limit}: {why}"
    )
