"""Calibration and evaluation data: token blocks [B, T] from a hub name, a local file, texts or an array.

Texts become one stream of tokens, without special tokens; the rows of a data set are joined by a blank line. Evaluation
on a named set follows the protocol of the papers instead (`named_sets.py`). Conversations become one stream too, each
through the tokenizer's chat template, with a mask of what the assistant wrote. The stream is cut into windows of T
tokens that do not overlap: calibration samples some at random, evaluation takes them in order. Where a model needs it,
each window begins with the tokenizer's beginning-of-text token.
"""

from pathlib import Path
from typing import Any

import numpy as np

from spap_jax.data.blocks import TokenBlocks, concatenated, new_blocks
from spap_jax.data.in_memory import Data
from spap_jax.data.mixtures import Share, sequence_counts, shares_of
from spap_jax.data.named_sets import Role
from spap_jax.data.sources import SPLITS, Opened, open_data
from spap_jax.data.tokenizing import Start, start_of_windows, tokenise, tokenizer_for
from spap_jax.data.windows import check_ids, cut
from spap_jax.errors import UserError, option
from spap_jax.settings import is_count

POOL = 8
"""Calibration reads text for this many times the windows asked for, to sample from; the rest is kept too."""


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
        role: Calibration samples windows at random, of long data from its beginning, which is enough for eight times as
            many; evaluation takes the first ones in order, from another split.
        vocabulary: Size of the vocabulary, v; token ids must be below it.
        bos: Whether each window begins with the tokenizer's beginning-of-text token, followed by T - 1 tokens of the
            text. By default only with the tokenizer of Gemma, whose models predict badly without. Token ids are
            taken as they are.

    Raises:
        UserError: The data cannot be read or do not provide what was asked for.
    """
    _check_asked(sequence_length, sequences, seed, role)
    given = {"tokenizer": tokenizer, "sequence_length": sequence_length, "vocabulary": vocabulary, "bos": bos}
    parts = shares_of(data) if isinstance(data, str) else []
    if len(parts) > 1:
        return _mixed(parts, sequences, seed, role, given)
    opened = open_data(data, role)
    tokens, mask, start, more = _windows(opened, sequences, role, **given)
    there = f"{'the first ' * more}{len(tokens)} windows of {sequence_length} tokens"
    there += f" that begin with {start.text}" if start else ""
    there += f", seed {seed}" if role == "calibration" else ""

    def taken(rows: np.ndarray, further: TokenBlocks | None = None) -> TokenBlocks:
        description = f"{opened.file or opened.name}: {len(rows)} of {there}"
        own = None if mask is None else mask[rows]
        if own is not None:
            description += f", counting the {own[:, 1:].sum()} tokens that the assistant wrote"
        return new_blocks(tokens[rows], description, len(tokens), own, further)

    order = np.arange(len(tokens))
    if role == "calibration":
        order = np.random.default_rng(seed).permutation(len(order))
    rest = order[sequences : POOL * sequences] if sequences and role == "calibration" else order[:0]
    return taken(order[:sequences], taken(rest) if len(rest) else None)


def _check_asked(sequence_length: int, sequences: int | None, seed: int, role: Role) -> None:
    if role not in SPLITS:
        raise UserError(f"there is no role {role!r}: tokens are for {' or '.join(map(repr, SPLITS))}.")
    if not is_count(sequence_length) or (sequences is not None and not is_count(sequences)):
        raise UserError(
            f"{option('sequence_length')} and {option('sequences')} must be at least 1: give positive whole numbers"
        )
    if not is_count(seed, least=0):
        raise UserError(f"{option('seed')} must be a whole number of at least 0, not {seed!r}: give one.")


def _windows(
    opened: Opened,
    sequences: int | None,
    role: Role,
    tokenizer: str | Path | Any | None,
    sequence_length: int,
    vocabulary: int | None,
    bos: bool | None,
) -> tuple[np.ndarray, np.ndarray | None, Start | None, bool]:
    """Returns the windows that there are to take from, in order; the arguments are those of `load_tokens`.

    Returns:
        Token ids [W, T]; a mask [W, T] of those that the assistant wrote in conversations, or None; what each window
        begins with, before tokens of the text, or None; and whether the data hold more, which was not read.
    """
    name, content, mask, start, more = opened.name, opened.content, None, None, False
    if isinstance(content, np.ndarray):
        tokenizer = None
        if bos:
            raise UserError(f"{name} holds token ids, which are taken as they are: leave out {option('bos')}")
    else:
        loaded, protocol = tokenizer_for(name, tokenizer), opened.protocol
        start = start_of_windows(loaded, bos, sequence_length)
        own = sequence_length - (start is not None)  # tokens of the text in a window
        # One token more than the windows hold, as the first may be left out below.
        enough = sequences and sequences * own * (POOL if role == "calibration" else 1) + 1
        # If each window begins with a token of its own, the text as a whole has no special tokens.
        ids, mask, more = tokenise(content, name, loaded, enough, protocol.special_tokens and not start)
        if mask is not None and start and start.id in ids[:1]:  # the template's, which would be there twice
            ids, mask = ids[1:], mask[1:]
        used = protocol.windows and protocol.windows * own
        content, mask = ids[:used], None if mask is None else mask[:used]
    tokens = cut(content, name, sequence_length, sequences, start and start.id)
    check_ids(tokens, name, vocabulary, tokenizer)
    if mask is not None:
        mask = cut(mask, name, sequence_length, sequences, start and 0) > 0
        tokens, mask = _answered(tokens, mask, name, role, sequences)
    return tokens, mask, start, more


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


def _mixed(parts: list[Share], sequences: int | None, seed: int, role: Role, given: dict[str, Any]) -> TokenBlocks:
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
        for part, count in zip(parts, sequence_counts(parts, sequences), strict=True)
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
    tokens, mask = concatenated((blocks.tokens, blocks.mask) for blocks in each)
    order = np.random.default_rng(seed).permutation(len(tokens))
    description, available = "; ".join(blocks.description for blocks in each), sum(blocks.available for blocks in each)
    return new_blocks(tokens[order], description, available, None if mask is None else mask[order], further)
