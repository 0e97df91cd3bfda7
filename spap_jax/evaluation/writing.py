"""Text that a model writes by itself, to calibrate on: from beginnings of all kinds, or in answer to prompts."""

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from spap_jax.data.chat import Conversation, check_template, encode_prompt, prompts_of
from spap_jax.data.openings import openings
from spap_jax.data.sources import Data, open_data
from spap_jax.data.tokens import load_tokenizer
from spap_jax.errors import UserError, option, warn
from spap_jax.evaluation.generation import end_tokens, generate, keys_of
from spap_jax.evaluation.sequences import padded, power_of_two
from spap_jax.models.model import Model, checked
from spap_jax.numerics import generation_dtype
from spap_jax.parallel.mesh import data_size, use_mesh
from spap_jax.parallel.placement import bytes_of, shard_params
from spap_jax.settings import LENGTH, SEQUENCES, WriteSettings

OPENING = 64
"""Most tokens of a beginning of ours; tokenizers that need more for a language do not know it well."""

Row = dict[str, Any]
"""A row of a data set: a "text", or the "messages" of a conversation."""


class Writing(NamedTuple):
    """What a model is to write, and how.

    Attributes:
        beginnings: Token ids that are continued, in turn.
        conversations: The conversations that the beginnings are, to be answered; None if they are texts.
        sequences: Number of texts or conversations.
        length: Most tokens that are written in each.
    """

    settings: WriteSettings
    tokenizer: Any
    beginnings: list[list[int]]
    conversations: list[Conversation] | None
    sequences: int
    length: int

    def digest(self, weights: str) -> str:
        """A short hash of all that decides on the rows, except their number, with what identifies the weights."""
        sampling = [self.length, self.settings.temperature, self.settings.seed]
        what = [weights, self.beginnings, self.conversations is None, *sampling]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def write(
    model: Model,
    *,
    data: Data | None = None,
    prompts: Data | None = None,
    tokenizer: str | Path | Any | None = None,
    settings: WriteSettings | None = None,
    devices: int | None = None,
    model_devices: int | None = None,
    watch: Callable[[int, int], None] = lambda done, total: None,
    **changes: Any,
) -> list[Row]:
    """Lets a model write text to calibrate on: what pruning is to keep is what the model says by itself.

    Every setting of `WriteSettings` can be given as a keyword argument, which overrides the value in ``settings``.

    Args:
        data: Text, as for ``load_tokens``: the model continues the first words of its paragraphs. By default it
            continues beginnings of texts and conversations of many kinds, and every fourth time its start token alone.
        prompts: Prompts that a chat model answers, in place of ``data``: a file, a data set of the hub, or rows: texts,
            or dicts with a ``prompt`` or with ``messages``. What the assistant says at the end is left out. An answer
            may end early; a text goes on after an end token, as texts in training do.
        tokenizer: A model folder, a hub id or a tokenizer object of transformers. By default the model's own.
        devices: Number of devices; by default all of them, but only one if they are CPUs.
        model_devices: Number of devices that share the weights; by default as many as they need.
        watch: Called with the number of sequences written and the total.

    Returns:
        Rows that ``load_tokens`` takes: dicts with a ``text``, or with the ``messages`` of a conversation.

    Raises:
        UserError: The text or the prompts do not fit the model, it has no start token or no chat template, or a setting
            is out of its range.
    """
    model = checked(model)
    writing = prepare(model, (settings or WriteSettings()).replace(**changes), data, prompts, tokenizer)
    rows: list[Row] = []
    with use_mesh(devices, model_devices, bytes_of(model.params)):
        watch(0, writing.sequences)
        for batch in write_batches(model, writing):
            rows += batch
            watch(len(rows), writing.sequences)
    return rows


def settings_for(model: Model, sequences: int, length: int) -> WriteSettings:
    """Returns the settings with which a model writes enough text for a number of sequences of ``length`` tokens."""
    positions = model.config.positions
    each = max(1, min(length, LENGTH, positions - _most_given(positions)))
    # A sixteenth more, since what was sampled may take fewer tokens when it is read again.
    return WriteSettings(sequences=math.ceil(17 / 16 * sequences * length / each) + 1, length=each)


def prepare(
    model: Model, settings: WriteSettings, data: Data | None, prompts: Data | None, tokenizer: str | Path | Any = None
) -> Writing:
    """Reads and checks what a model is to write; arguments and errors are those of `write`."""
    if data is not None and prompts is not None:
        raise UserError(f"give first words with {option('data')}, or {option('prompts')} to answer, not both.")
    named = (model.source.folder or model.source.name) if tokenizer is None else tokenizer
    tokenizer = load_tokenizer(named) if isinstance(named, str | Path) else named
    conversations = None
    if prompts is None:
        start = _start_of(tokenizer)
        if data is None:
            room = model.config.positions - (settings.length or 1)
            beginnings = _own_beginnings(tokenizer, start, min(room, _most_given(model.config.positions)))
        else:
            beginnings = _first_words(tokenizer, start, data, settings.first_words, settings.sequences or SEQUENCES)
    else:
        check_template(tokenizer)
        conversations = _read_prompts(prompts)
        beginnings = [encode_prompt(tokenizer, conversation) for conversation in conversations]
    sequences = settings.sequences or (len(beginnings) if conversations else SEQUENCES)
    if not settings.temperature and sequences > len(beginnings):
        raise UserError(
            f"at temperature 0 only {len(beginnings)} of {sequences} sequences differ: give {option('temperature', 1)}."
        )
    longest, positions = max(map(len, beginnings)), model.config.positions
    length = settings.length or min(LENGTH, max(1, positions - longest))
    if longest + length > positions:
        raise UserError(
            f"{longest} given tokens and {length} new ones do not fit the model's {positions} positions: shorten the "
            f"longest prompt, or lower {option('length')}."
        )
    return Writing(settings, tokenizer, beginnings, conversations, sequences, length)


def write_batches(model: Model, writing: Writing, first: int = 0) -> Iterator[list[Row]]:
    """Yields the rows from number ``first`` on, batch by batch; batches do not depend on ``first``.

    Inside ``use_mesh``, weights and sequences are sharded over the mesh; all processes of a run must call this.
    """
    model = model.replace(params=shard_params(model.config, model.params))
    number, beginnings = writing.sequences, writing.beginnings
    share = max(1, writing.settings.batch_tokens // (max(map(len, beginnings)) + writing.length)) * data_size()
    batches = math.ceil(number / share)  # of equal size, as a small one takes as long as a large one
    size = math.ceil(number / batches / data_size()) * data_size()
    # Texts go on after an end token, as the next one does in training; so a chat model's text has all its turns.
    ends = {*end_tokens(model), writing.tokenizer.eos_token_id} if writing.conversations else set()
    key = jax.random.fold_in(jax.random.key(writing.settings.seed), zlib.crc32(b"write"))
    cut_off = 0
    for start in range(first - first % size, number, size):
        members = np.minimum(np.arange(start, start + size), number - 1)  # the last batch has the shape of the others
        given = [beginnings[member % len(beginnings)] for member in members]
        length = power_of_two(max(map(len, given)))  # so that few programs are compiled
        prompts, valid = padded(model.config, given, size, length, left=True)
        written = generate(
            model,
            prompts,
            writing.length,
            valid=valid,
            temperature=writing.settings.temperature,
            key=keys_of(key, members),
            eos=tuple(ends - {None}),
            dtype=generation_dtype(model.params),
        )[:, prompts.shape[1] :].tolist()
        fresh = range(max(start, first), min(start + size, number))
        cut_off += sum(ends.isdisjoint(written[member - start]) for member in fresh)
        yield [_row(writing, member, written[member - start], ends) for member in fresh]
    if writing.conversations and cut_off:
        warn(
            f"{cut_off} answers were cut off after {writing.length} tokens, and the conversations read as if they "
            f"ended there: give a larger {option('length')}."
        )


def _row(writing: Writing, member: int, written: list[int], ends: set[int]) -> Row:
    number = member % len(writing.beginnings)
    if writing.conversations is None:  # with the special tokens between two texts
        given = writing.beginnings[number]
        if given[0] not in given[1:]:  # a start, for the reader to add, and not the token before every turn
            given = given[1:]
        return {"text": writing.tokenizer.decode(given + written, skip_special_tokens=False)}
    answer = list(itertools.takewhile(lambda token: token not in ends, written))
    text = writing.tokenizer.decode(answer, skip_special_tokens=True)
    return {"messages": [*writing.conversations[number].messages, {"role": "assistant", "content": text}]}


def _most_given(positions: int) -> int:
    """The most tokens of a beginning of ours: a quarter of few positions."""
    return min(OPENING, positions // 4)


def _start_of(tokenizer: Any) -> int:
    tokens = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    start = next((token for token in tokens if token is not None), None)
    if start is None:
        raise UserError(
            "the tokenizer names neither a beginning nor an end token, and the model has to begin with one: add "
            "bos_token to its tokenizer_config.json."
        )
    return start


def _own_beginnings(tokenizer: Any, start: int, most: int) -> list[list[int]]:
    """Returns the beginnings of up to ``most`` tokens, and before every three of them the start token alone."""
    given = [some for some in openings(tokenizer, start) if len(some) <= most]
    return [some for first in range(0, max(1, len(given)), 3) for some in ([start], *given[first : first + 3])]


def _first_words(tokenizer: Any, start: int, data: Data, first_words: int, sequences: int) -> list[list[int]]:
    """Returns the start token before the first words of up to ``sequences`` paragraphs."""
    name, content, *_ = open_data(data, "calibration")
    if isinstance(content, np.ndarray):
        raise UserError(f"{name} holds token ids, which have no words: give text.")
    words = (some for some in _paragraphs(name, content) if len(some) >= first_words)
    texts = [" ".join(some[:first_words]) for some in itertools.islice(words, sequences)]
    if not texts:
        raise UserError(f"{name} has no paragraph of {first_words} words: give fewer {option('first_words')}.")
    return [[start, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]


def _paragraphs(name: str, pieces: Iterator[Any]) -> Iterator[Sequence[str]]:
    """Yields the words of each paragraph of a text in pieces; blank lines stand between paragraphs."""
    held = ""
    for piece in pieces:
        if isinstance(piece, Conversation):
            raise UserError(f"{name} holds conversations: give them as {option('prompts')}.")
        *whole, held = (held + piece).split("\n\n")
        yield from map(str.split, whole)
    yield held.split()


def _read_prompts(data: Data) -> list[Conversation]:
    """Reads conversations that end with a message to the model."""
    name, content, *_ = open_data(data, "calibration", prompts_of)
    conversations = [piece for piece in content if isinstance(piece, Conversation)]
    if not conversations:
        raise UserError(f'{name} holds no prompts: give rows with a "prompt" or with "messages", as in a .jsonl file')
    return conversations
