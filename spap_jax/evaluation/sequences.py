"""Log-likelihoods and continuations of token sequences of any length, in batches over the devices.

Lengths are padded to a few sizes, so that a new length causes no new compilation.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.errors import UserError
from spap_jax.evaluation.generation import keys_of, segments
from spap_jax.models import DecoderConfig, decoder
from spap_jax.models.loss import token_groups
from spap_jax.models.model import Model
from spap_jax.numerics import forward_precision
from spap_jax.parallel import collectives, mesh

SHORTEST = 32
"""Minimum length to which sequences are padded, in tokens."""


class Batch(NamedTuple):
    """Sequences that pass through the model together.

    Attributes:
        rows: Number of rows of the batch, at least the number of members.
        length: Number of tokens of a row, at least the length of the longest member.
    """

    members: list[int]
    rows: int
    length: int


class Score(NamedTuple):
    """Score of one sequence: the log-likelihood of the predicted tokens, and whether each is the likeliest one."""

    log_likelihood: float
    is_greedy: bool


def batches(
    lengths: Sequence[int], longest: int, batch_tokens: int, devices: int, following: int = 0
) -> Iterator[Batch]:
    """Groups sequences into batches of few different shapes, the longest first.

    Args:
        longest: Maximum length to which a row is padded.
        batch_tokens: Number of tokens that a device processes at once; it processes at least one sequence.
        following: Number of tokens that will be appended to each sequence.
    """
    by_size = defaultdict(list)
    for member, length in enumerate(lengths):
        by_size[max(length, min(longest, max(SHORTEST, _rounded_up(length))))].append(member)
    for size, members in sorted(by_size.items(), reverse=True):
        share = min(max(1, batch_tokens // (size + following)), power_of_two(-(-len(members) // devices)))
        rows = devices * share
        yield from (Batch(members[first : first + rows], rows, size) for first in range(0, len(members), rows))


def log_likelihoods(
    model: Model, sequences: Sequence[Sequence[int]], predicted: Sequence[int], batch_tokens: int
) -> Iterator[dict[int, Score]]:
    """Scores the last tokens of each sequence, given the tokens before them.

    Args:
        model: Its parameters are placed by ``shard_params``.
        sequences: Token ids, the first of which is not predicted; at most one more than the model's positions.
        predicted: Number of tokens to score at the end of each sequence, less than its length.

    Yields:
        The scores of a batch, keyed by the indices of their sequences.

    Raises:
        UserError: a token id is not in the model's vocabulary.
    """
    # Sequences that differ in their last token alone, as the choices of many tasks, pass through the model once.
    groups = defaultdict[tuple[int, ...], list[int]](list)
    for member, (sequence, count) in enumerate(zip(sequences, predicted, strict=True)):
        groups[count, *sequence[:-1]].append(member)
    members, inputs = list(groups.values()), [list(key[1:]) for key in groups]
    parts = list(batches([len(given) for given in inputs], model.config.positions, batch_tokens, mesh.data_size()))
    most: dict[int, tuple[int, int]] = {}  # by length: one program for all batches of a length
    for batch in parts:
        own, (count, choices) = [members[group] for group in batch.members], most.get(batch.length, (1, 1))
        count = max(count, *(power_of_two(predicted[first]) for first, *_ in own))
        most[batch.length] = count, max(choices, *(power_of_two(len(each)) for each in own))

    def scores(batch: Batch) -> tuple[jax.Array, jax.Array]:
        given = [inputs[group] for group in batch.members]
        tokens, valid = padded(model.config, given, batch.rows, batch.length, left=False)
        ends = valid.sum(axis=1)
        count, choices = most[batch.length]
        places = ends[:, None] - np.arange(count, 0, -1)
        targets = np.take_along_axis(tokens, np.clip(places + 1, 0, batch.length - 1), axis=1)
        targets = np.repeat(targets[:, :, None], choices, axis=2)
        counts = np.zeros(batch.rows, int)
        for row, group in enumerate(batch.members):
            last = [sequences[member][-1] for member in members[group]]
            targets[row, -1, : len(last)], counts[row] = last, predicted[members[group][0]]
        _check_known(model.config, targets)
        counted = np.arange(count, 0, -1) <= counts[:, None]
        arrays = tokens, np.maximum(places, 0), targets, counted
        return _score(model.config, model.params, *map(mesh.shard_chunks, arrays))

    dispatched = itertools.chain(map(scores, parts), [None])  # each is fetched after the next one is dispatched
    for batch, (result, _) in zip(parts, itertools.pairwise(dispatched), strict=True):
        sums, greedy = jax.device_get(result)
        yield {
            member: Score(float(sums[row, choice]), bool(greedy[row, choice]))
            for row, group in enumerate(batch.members)
            for choice, member in enumerate(members[group])
        }


@functools.partial(jax.jit, static_argnames="config")
@forward_precision
def _score(
    config: DecoderConfig,
    params: decoder.Params,
    tokens: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores a batch, computing the logits of K places only.

    Args:
        tokens: [B, T].
        places: Places of the K tokens whose successors are predicted [B, K].
        targets: These successors, for each of C choices [B, K, C].
        counted: Which of the K count [B, K].

    Returns:
        Log-likelihoods [B, C], and whether all successors that count are the likeliest ones [B, C].
    """

    def own(batch: tuple[jax.Array, ...], params: decoder.Params) -> tuple[jax.Array, jax.Array]:
        tokens, places, targets, counted = batch

        def score(_: None, some: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            x, following = some
            logits = decoder.head(config, params, x[None])[0].astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, following, axis=-1)
            likeliest = logits.argmax(axis=-1, keepdims=True) == following
            return None, (chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True), likeliest)

        stream = jnp.take_along_axis(decoder.last_stream(config, params, tokens), places[:, :, None], axis=1)
        each = jax.lax.scan(score, None, token_groups((stream, targets)))[1]
        rows, size, choices = targets.shape
        values, greedy = (a.reshape(-1, choices)[: rows * size].reshape(targets.shape) for a in each)
        mask = counted[:, :, None]
        return jnp.where(mask, values, 0).sum(axis=1), (greedy | ~mask).all(axis=1)

    return collectives.map_chunks(own, (tokens, places, targets, counted), params)


def continuations(
    model: Model, prompts: Sequence[Sequence[int]], new: int, ended: Callable[[list[int]], bool], batch_tokens: int
) -> Iterator[dict[int, list[int]]]:
    """Continues prompts by the likeliest tokens.

    Args:
        prompts: Token ids, at least one in each prompt.
        ended: Returns whether a text is complete, given the tokens generated so far; later tokens are ignored.
        batch_tokens: Number of tokens that a device processes at once, including the new ones.

    Yields:
        The tokens generated in a batch, keyed by the indices of their prompts.

    Raises:
        UserError: a token id is not in the model's vocabulary.
    """
    lengths = [len(prompt) for prompt in prompts]
    for batch in batches(lengths, model.config.positions, batch_tokens, mesh.data_size(), new):
        given = [prompts[member] for member in batch.members]
        tokens, valid = padded(model.config, given, batch.rows, batch.length, left=True)
        keys = keys_of(jax.random.key(0), np.arange(batch.rows))  # without effect at temperature 0
        written: list[list[int]] = []
        for some in segments(model.config, model.params, tokens, valid, new, 0.0, keys, jnp.float32):
            written = some[: len(batch.members)].tolist()
            if all(map(ended, written)):
                break
        yield dict(zip(batch.members, written, strict=True))


def padded(
    config: DecoderConfig, sequences: Sequence[Sequence[int]], rows: int, length: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids [rows, length], and a mask of that shape that is False for padding, on the left or right.

    Raises:
        UserError: a token id is not in the model's vocabulary.
    """
    tokens = np.zeros((rows, length), np.int64)
    valid = np.zeros(tokens.shape, bool)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None) if left else slice(len(sequence))
        tokens[row, place], valid[row, place] = sequence, True
    _check_known(config, tokens)
    return tokens.astype(np.int32), valid


def _check_known(config: DecoderConfig, tokens: np.ndarray) -> None:
    if tokens.min() < 0 or tokens.max() >= config.vocabulary:
        raise UserError(
            f"the tokenizer gives token ids from {tokens.min()} to {tokens.max()}, but the model's go from 0 to "
            f"{config.vocabulary - 1}: its tokenizer files belong to another model, so put this model's in their place."
        )


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least the number."""
    return 1 << max(0, number - 1).bit_length()


def _rounded_up(length: int) -> int:
    """Returns the smallest power of two, or three quarters of one, that is at least the length."""
    power = power_of_two(length)
    return max(3 * power // 4, 1) if length <= 3 * power // 4 else power
