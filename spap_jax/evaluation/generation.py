"""Text generation with a key/value cache: greedy, or sampled at a temperature."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from spap_jax.data.tokens import ids_of
from spap_jax.errors import UserError, option
from spap_jax.models import DecoderConfig, decoder
from spap_jax.models.model import Model, Source, checked
from spap_jax.numerics import full_precision
from spap_jax.parallel import collectives, mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.settings import is_count

PROMPT_STEP = 32
"""Prompts are padded to a multiple of this many tokens, so that not every length causes a compilation."""

SEGMENT = 32
"""Number of tokens that are generated before the host looks whether all texts have ended."""

_CACHE = decoder.Cache(P(None, "data"), P(None, "data"), mesh.DATA_SPEC, P())  # pyright: ignore[reportArgumentType]
"""The specs of a cache whose sequences are sharded over ``data``."""


def choose(temperature: float, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Selects or samples the next token of each sequence, with its own key. logits: [B, v], keys: [B] -> [B] int32."""
    if temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits.astype(jnp.float32) / temperature).astype(jnp.int32)


def keys_of(key: jax.Array, numbers: ArrayLike) -> jax.Array:
    """Returns a random key for each number of a sequence. numbers: [B] -> [B] keys."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers))


def segments(
    config: DecoderConfig,
    params: decoder.Params,
    prompts: np.ndarray,
    valid: np.ndarray,
    new: int,
    temperature: float,
    keys: jax.Array,
    dtype: DTypeLike,
) -> Iterator[np.ndarray]:
    """Continues prompts [B, T] by ``new`` tokens; yields what is written so far, [B, w], after every `SEGMENT` of them.

    All processes of a run have to take every segment.

    Args:
        params: Placed by ``shard_params``.
        valid: [B, T], False for padding, which is on the left.
        keys: Random keys [B].
    """
    given = mesh.shard_chunks(prompts), mesh.shard_chunks(valid)
    logits, cache = read(config, params, *given, prompts.shape[1] + new, dtype)
    written = np.zeros((len(prompts), 0), np.int32)
    for first in range(0, new, SEGMENT):
        count = min(SEGMENT, new - first)
        tokens, logits, cache = write(config, temperature, count, params, logits, cache, keys, np.int32(first))
        written = np.concatenate([written, mesh.array_to_host(tokens)], axis=1)
        yield written


@functools.partial(jax.jit, static_argnames=("config", "size", "dtype"))
@full_precision
def read(
    config: DecoderConfig, params: decoder.Params, tokens: jax.Array, valid: jax.Array, size: int, dtype: DTypeLike
) -> tuple[jax.Array, decoder.Cache]:
    """Reads prompts [B, T] into a new cache -> logits of the last token [B, v], and the cache.

    Args:
        valid: [B, T], False for padding, which is on the left.
        size: Capacity of the cache (S) in tokens, including padding.
        dtype: Data type of the cache and of the computation.
    """

    def own(params: decoder.Params, tokens: jax.Array, valid: jax.Array) -> tuple[jax.Array, decoder.Cache]:
        return decoder.extend(config, params, tokens, valid, decoder.empty_cache(config, len(tokens), size, dtype))

    return _each_device(own, tokens, (P(), *[mesh.DATA_SPEC] * 2), (mesh.DATA_SPEC, _CACHE))(params, tokens, valid)


@functools.partial(jax.jit, static_argnames=("config", "temperature", "count"), donate_argnames=("logits", "cache"))
@full_precision
def write(
    config: DecoderConfig,
    temperature: float,
    count: int,
    params: decoder.Params,
    logits: jax.Array,
    cache: decoder.Cache,
    keys: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array, decoder.Cache]:
    """Generates tokens; the cache is updated in place.

    logits: [B, v], keys: [B] -> tokens [B, count], the logits after them [B, v], the cache.
    """

    def own(params: decoder.Params, logits: jax.Array, cache: decoder.Cache, keys: jax.Array, first: jax.Array) -> Any:
        def step(carry: tuple[jax.Array, decoder.Cache], number: jax.Array) -> tuple[Any, jax.Array]:
            logits, cache = carry
            token = choose(temperature, logits, jax.vmap(jax.random.fold_in, (0, None))(keys, number))
            return decoder.extend(config, params, token[:, None], jnp.ones((len(token), 1), bool), cache), token

        (logits, cache), tokens = jax.lax.scan(step, (logits, cache), first + jnp.arange(count))
        return tokens.T, logits, cache

    batch = mesh.DATA_SPEC
    each = _each_device(own, logits, (P(), batch, _CACHE, batch, P()), (batch, batch, _CACHE))
    return each(params, logits, cache, keys, first)


def _each_device(function: Callable[..., Any], sequences: jax.Array, given: Any, out: Any) -> Callable[..., Any]:
    """Returns what each device computes of its own of some sequences [B, ...], if B can be divided."""
    return collectives.shard_map_over_data(function, given, out) if mesh.shards_evenly(sequences) else function


def generate(
    model: Model,
    tokens: Any,
    max_new_tokens: int = 64,
    *,
    valid: ArrayLike | None = None,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos: int | tuple[int, ...] | None = None,
    pad: int | None = None,
    dtype: DTypeLike = "float32",
) -> np.ndarray:
    """Continues prompts.

    Inside ``mesh.use_mesh``, weights and prompts are sharded over the mesh; all processes of a run must call this.

    Args:
        tokens: Prompts [B, T], padded on the left to a common length; or the result of ``load_tokens``.
        valid: [B, T], False for padding. By default the prompts have no padding.
        temperature: 0 selects the likeliest token each time; above 0, tokens are sampled, which requires ``key``.
        key: Random key of ``jax.random``, from which that of each sequence is made; or keys [B], one for each sequence.
        eos: Tokens that end a sequence; () for none. By default those of the model's config.
        pad: Token that fills up a sequence that has ended. By default the model's own, or else its first end token.
        dtype: Data type of the computation and of the cache.

    Returns:
        The prompts with the generated tokens appended, [B, T + max_new_tokens] int32.

    Raises:
        UserError: the prompts do not fit the model, or a setting is out of its range.
    """
    model = checked(model)
    try:
        prompts = np.asarray(ids_of(tokens))
    except (TypeError, ValueError) as error:  # lengths differ, or a tensor of another library is on a device
        raise UserError(
            "prompts must be whole numbers [sequences, length] in the memory of the host: pad shorter ones on the left "
            "(valid)."
        ) from error
    mask = np.ones(prompts.shape, bool) if valid is None else np.asarray(valid).astype(bool)
    _check_prompts(model.config, prompts, mask, max_new_tokens)
    if not 0 <= temperature < float("inf"):
        raise UserError(f"{option('temperature')} is {temperature}, but must be 0 or more.")
    if temperature > 0 and key is None:
        raise UserError("sampling needs a random key: pass key=jax.random.key(0), or temperature=0 for no sampling.")
    ends = end_tokens(model) if eos is None else _as_tuple(eos)
    prompts = prompts.astype(np.int32)
    left = ((0, 0), (-prompts.shape[1] % PROMPT_STEP, 0))
    config, filler = model.config, _filler(model.source, ends) if pad is None else pad
    keys = _own_keys(jax.random.key(0) if key is None else key, len(prompts))
    given = shard_params(config, model.params), np.pad(prompts, left), np.pad(mask, left)
    written = np.full((len(prompts), max_new_tokens), filler, np.int32)
    for some in segments(config, *given, max_new_tokens, float(temperature), keys, jnp.dtype(dtype)):
        is_end = np.isin(some, ends)
        after = np.cumsum(is_end, axis=1) > is_end
        written[:, : some.shape[1]] = np.where(after, filler, some)
        if is_end.any(axis=1).all():
            break
    return np.concatenate([prompts, written], axis=1)


def _filler(source: Source, ends: tuple[int, ...]) -> int:
    """The token that fills up sequences that have ended; configs name -1 for none."""
    named = named_settings(source).get("pad_token_id")
    return next(token for token in (named, *ends, 0) if token is not None and token >= 0)


def _own_keys(key: Any, count: int) -> jax.Array:
    """Returns a random key for each sequence [count], from one key or as many; raw keys are accepted too."""
    if isinstance(key, jax.Array):
        keys = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
        if keys.shape in ((), (count,)):
            return keys if keys.ndim else keys_of(keys, np.arange(count))
    raise UserError(f"key must be one random key of jax.random, or {count} of them, one for each prompt.")


def end_tokens(model: Model) -> tuple[int, ...]:
    """Returns the end-of-text tokens from the model's generation_config.json or config.json."""
    return _as_tuple(named_settings(model.source).get("eos_token_id"))


def named_settings(source: Source) -> dict[str, Any]:
    """Returns the settings of generation: those of generation_config.json, or of config.json if there is none."""
    path = None if source.folder is None else source.folder / "generation_config.json"
    if path is not None and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return json.loads(source.config_text or "{}")


def _as_tuple(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _check_prompts(config: DecoderConfig, prompts: np.ndarray, valid: np.ndarray, new: int) -> None:
    if prompts.ndim != 2 or prompts.size == 0 or not np.issubdtype(prompts.dtype, np.integer):
        raise UserError(
            f"prompts must be whole numbers [sequences, length], not {prompts.dtype} "
            f"{list(prompts.shape)}: give token ids."
        )
    if valid.shape != prompts.shape:
        raise UserError(f"valid must have the shape of the prompts, {list(prompts.shape)}, not {list(valid.shape)}.")
    if not valid[:, -1].all():
        raise UserError("a prompt ends in padding; pad prompts on the left, so that what follows joins on to them.")
    if prompts[valid].min() < 0 or prompts[valid].max() >= config.vocabulary:
        raise UserError(
            f"prompts hold token ids from {prompts[valid].min()} to {prompts[valid].max()}, but the model's go from 0 "
            f"to {config.vocabulary - 1}: make them with the tokenizer of this model."
        )
    if not is_count(new):
        raise UserError(f"max_new_tokens is {new}, but must be a whole number of at least 1.")
    longest = int(valid.sum(axis=1).max())
    if longest + new > config.positions:
        raise UserError(
            f"a prompt of {longest} tokens and {new} new ones do not fit the model's {config.positions} positions; "
            "shorten the prompt or lower max_new_tokens."
        )
