"""Log-likelihoods and continuations of token sequences of any length, in batches over the local devices.

Lengths are padded to a few sizes, so that a new length causes no new compilation. A batch is sharded along the mesh
axis ``data`` by ``shard_map``: attention iterates over the sequences in a loop, which the compiler would not partition
by itself.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, get_mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from spap_jax.errors import UserError
from spap_jax.evaluation.generation import CACHE, Sampling, choose, decode_step, keys_at, keys_of, prefill
from spap_jax.models import DecoderConfig, decoder
from spap_jax.models.loss import token_groups
from spap_jax.models.model import Model
from spap_jax.numerics import full_precision
from spap_jax.parallel.mesh import DATA_SPEC as BATCH
from spap_jax.parallel.mesh import check_count, check_mesh_around, mesh_size, one_device, use_mesh
from spap_jax.parallel.placement import bytes_of, shard_params

SHORTEST = 32
"""Minimum length to which sequences are padded, in tokens."""

SEGMENT = 32
"""Number of tokens generated before the host checks whether all texts of a batch have ended."""

_each_device = functools.partial(jax.shard_map, axis_names={"data"}, check_vma=False)  # as in devices


class Replicas(NamedTuple):
    """A model replicated on several devices, or on several groups of devices that share its weights.

    Attributes:
        params: Replicated along ``data``.
        mesh: The devices, along the axis ``data``, and along ``model`` if they share the weights.
    """

    config: DecoderConfig
    params: decoder.Params
    mesh: Mesh

    @property
    def number(self) -> int:
        """Number of devices, or of groups, among which sequences are divided."""
        return self.mesh.shape["data"]


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


def replicas_of(model: Model, devices: int | Sequence[Any] | None = None) -> Replicas:
    """Replicates a model on the devices.

    Args:
        devices: The devices, or how many of the local ones. By default those of ``mesh.use_mesh``, or else all local
            ones, in groups that share the weights if one device cannot hold them.

    Raises:
        UserError: the number is not one from 1 to that of the local devices.
    """
    if devices is not None and not isinstance(devices, Sequence):
        check_count(devices, jax.local_devices())
        devices = jax.local_devices()[:devices]
    if devices is None and one_device.value:
        devices = jax.local_devices()[:1]
    if devices is None:
        check_mesh_around()
        alone = mesh_size() == 1 and jax.process_count() == 1
        with use_mesh(None, None, bytes_of(model.params)) if alone else nullcontext():
            if mesh_size() > 1:
                return Replicas(model.config, shard_params(model.config, model.params), get_mesh())
    devices = jax.local_devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return Replicas(model.config, jax.device_put(model.params, NamedSharding(mesh, P())), mesh)


def batches(
    lengths: Sequence[int], longest: int, batch_tokens: int, devices: int, following: int = 0
) -> Iterator[Batch]:
    """Groups sequences into batches of few different shapes, the longest first.

    Args:
        lengths: Number of tokens of each sequence.
        longest: Maximum length to which a row is padded.
        batch_tokens: Number of tokens that a device processes at once; it processes at least one sequence.
        devices: Number of devices that share a batch.
        following: Number of tokens that will be appended to each sequence.
    """
    by_size = defaultdict(list)
    for member, length in enumerate(lengths):
        by_size[max(length, min(longest, max(SHORTEST, _rounded_up(length))))].append(member)
    for size, members in sorted(by_size.items(), reverse=True):
        share = min(max(1, batch_tokens // (size + following)), _power_of_two(-(-len(members) // devices)))
        rows = devices * share
        yield from (Batch(members[first : first + rows], rows, size) for first in range(0, len(members), rows))


def log_likelihoods(
    model: Replicas, sequences: Sequence[Sequence[int]], predicted: Sequence[int], batch_tokens: int
) -> Iterator[dict[int, Score]]:
    """Scores the last tokens of each sequence, given the tokens before them.

    Args:
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
    parts = list(batches([len(given) for given in inputs], model.config.positions, batch_tokens, model.number))
    most: dict[int, tuple[int, int]] = {}  # by length: one program for all batches of a length
    for batch in parts:
        own, (count, choices) = [members[group] for group in batch.members], most.get(batch.length, (1, 1))
        count = max(count, *(_power_of_two(predicted[first]) for first, *_ in own))
        most[batch.length] = count, max(choices, *(_power_of_two(len(each)) for each in own))

    def scores(batch: Batch) -> tuple[jax.Array, jax.Array]:
        tokens, valid = _padded(model.config, batch, inputs, left=False)
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
        return _score(model.config, model.mesh, model.params, *_split(model.mesh, *arrays))

    dispatched = itertools.chain(map(scores, parts), [None])  # each is fetched after the next one is dispatched
    for batch, (result, _) in zip(parts, itertools.pairwise(dispatched), strict=True):
        sums, greedy = jax.device_get(result)
        yield {
            member: Score(float(sums[row, choice]), bool(greedy[row, choice]))
            for row, group in enumerate(batch.members)
            for choice, member in enumerate(members[group])
        }


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
@full_precision
def _score(
    config: DecoderConfig,
    mesh: Mesh,
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

    @functools.partial(_each_device, mesh=mesh, in_specs=(P(), *[BATCH] * 4), out_specs=(BATCH, BATCH))
    def local(
        params: decoder.Params, tokens: jax.Array, places: jax.Array, targets: jax.Array, counted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
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

    return local(params, tokens, places, targets, counted)


def continuations(
    model: Replicas,
    prompts: Sequence[Sequence[int]],
    new: int,
    ended: Callable[[list[int]], bool],
    batch_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    dtype: DTypeLike = jnp.float32,
) -> Iterator[dict[int, list[int]]]:
    """Continues prompts.

    Args:
        prompts: Token ids, at least one in each prompt.
        ended: Returns whether a text is complete, given the tokens generated so far; later tokens are ignored.
        batch_tokens: Number of tokens that a device processes at once, including the new ones.
        key: Random key of ``jax.random``; it has no effect at temperature 0.

    Yields:
        The tokens generated in a batch, keyed by the indices of their prompts.

    Raises:
        UserError: a token id is not in the model's vocabulary.
    """
    segments = -(-new // SEGMENT)
    room = segments * SEGMENT
    lengths = [len(prompt) for prompt in prompts]
    for batch in batches(lengths, model.config.positions, batch_tokens, model.number, room):
        arrays = _split(model.mesh, *_padded(model.config, batch, prompts, left=True))
        logits, cache = _read(model.config, model.mesh, batch.length + room, dtype, model.params, *arrays)
        written = np.zeros((len(batch.members), 0), np.int32)
        own = np.pad(batch.members, (0, batch.rows - len(batch.members)))  # a key for each prompt, wherever it is
        [keys] = _split(model.mesh, keys_of(key, own))
        for segment in range(segments):
            state = logits, cache, keys, np.int32(segment * SEGMENT)
            tokens, logits, cache = _write(model.config, model.mesh, sampling, model.params, *state)
            written = np.concatenate([written, np.asarray(tokens)[: len(batch.members)]], axis=1)[:, :new]
            if all(map(ended, written.tolist())):
                break
        yield dict(zip(batch.members, written.tolist(), strict=True))


@functools.partial(jax.jit, static_argnames=("config", "mesh", "size", "dtype"))
@full_precision
def _read(
    config: DecoderConfig,
    mesh: Mesh,
    size: int,
    dtype: DTypeLike,
    params: decoder.Params,
    tokens: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, decoder.Cache]:
    """Prefills. tokens and valid: [B, T] -> logits of the last token [B, v], and a cache for ``size`` tokens."""
    own = functools.partial(prefill, config, size=size, dtype=dtype)
    return _each_device(own, mesh=mesh, in_specs=(P(), BATCH, BATCH), out_specs=(BATCH, CACHE))(params, tokens, valid)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "sampling"), donate_argnames=("logits", "cache"))
@full_precision
def _write(
    config: DecoderConfig,
    mesh: Mesh,
    sampling: Sampling,
    params: decoder.Params,
    logits: jax.Array,
    cache: decoder.Cache,
    keys: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array, decoder.Cache]:
    """Generates tokens. logits: [B, v], keys: [B] -> tokens [B, SEGMENT], the logits after them [B, v], the cache."""
    given = (P(), BATCH, CACHE, BATCH, P())

    @functools.partial(_each_device, mesh=mesh, in_specs=given, out_specs=(BATCH, BATCH, CACHE))
    def local(params: decoder.Params, logits: jax.Array, cache: decoder.Cache, keys: jax.Array, first: jax.Array):
        def step(carry: tuple[jax.Array, decoder.Cache], number: jax.Array):
            token = choose(sampling, carry[0], keys_at(keys, number))
            return decode_step(config, params, token, carry[1]), token

        (logits, cache), tokens = jax.lax.scan(step, (logits, cache), first + jnp.arange(SEGMENT))
        return tokens.T, logits, cache

    return local(params, logits, cache, keys, first)


def _padded(
    config: DecoderConfig, batch: Batch, sequences: Sequence[Sequence[int]], left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids [B, T] of a batch, and a mask [B, T] that is False for padding."""
    tokens = np.zeros((batch.rows, batch.length), np.int64)
    valid = np.zeros(tokens.shape, bool)
    for row, member in enumerate(batch.members):
        sequence = sequences[member]
        place = slice(batch.length - len(sequence), None) if left else slice(len(sequence))
        tokens[row, place], valid[row, place] = sequence, True
    _check_known(config, tokens)
    return tokens.astype(np.int32), valid


def _check_known(config: DecoderConfig, tokens: np.ndarray) -> None:
    if tokens.min() < 0 or tokens.max() >= config.vocabulary:
        raise UserError(
            f"the tokenizer gives token ids from {tokens.min()} to {tokens.max()}, but the model's go from 0 to "
            f"{config.vocabulary - 1}: its tokenizer files belong to another model, so put this model's in their place."
        )


def _split(mesh: Mesh, *arrays: np.ndarray | jax.Array) -> list[jax.Array]:
    """Shards arrays [B, ...] by rows over the devices."""
    return jax.device_put(list(arrays), NamedSharding(mesh, BATCH))


def _power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least the number."""
    return 1 << max(0, number - 1).bit_length()


def _rounded_up(length: int) -> int:
    """Returns the smallest power of two, or three quarters of one, that is at least the length."""
    power = _power_of_two(length)
    return max(3 * power // 4, 1) if length <= 3 * power // 4 else power
