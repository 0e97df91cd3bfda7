"""Text generation with a key/value cache: greedy, or sampled with temperature, top-k and top-p."""

import functools
import json
from typing import Any, NamedTuple

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


CACHE = decoder.Cache(P(None, "data"), P(None, "data"), mesh.DATA_SPEC, P())  # pyright: ignore[reportArgumentType]
"""The specs of a cache whose sequences are sharded over ``data``."""


class Sampling(NamedTuple):
    """How the next token is sampled.

    Attributes:
        temperature: Divides the logits; 0 selects the likeliest token.
        top_k: Number of the likeliest tokens to sample from; 0 means all.
        top_p: Sample from the smallest set of the likeliest tokens whose total probability reaches this value.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@functools.partial(jax.jit, static_argnames=("config", "size", "dtype"))
@full_precision
def prefill(
    config: DecoderConfig,
    params: decoder.Params,
    tokens: jax.Array,
    valid: jax.Array,
    size: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, decoder.Cache]:
    """Reads prompts [B, T] into a new cache -> logits of the last token [B, v], and the cache.

    Args:
        valid: [B, T], False for padding, which is on the left.
        size: Capacity of the cache (S) in tokens, including padding.
        dtype: Data type of the cache and of the computation.
    """
    return decoder.extend(config, params, tokens, valid, decoder.empty_cache(config, tokens.shape[0], size, dtype))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
@full_precision
def decode_step(
    config: DecoderConfig, params: decoder.Params, token: jax.Array, cache: decoder.Cache
) -> tuple[jax.Array, decoder.Cache]:
    """Appends one token to each sequence. token: [B] -> logits [B, v], and the cache, updated in place."""
    return decoder.extend(config, params, token[:, None], jnp.ones((token.shape[0], 1), bool), cache)


def choose(sampling: Sampling, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Selects or samples the next token of each sequence, with its own key. logits: [B, v], keys: [B] -> [B] int32."""
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # No probability precedes the likeliest token, so at least one token is kept.
        least = jnp.where(before < sampling.top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keys_of(key: jax.Array, numbers: ArrayLike) -> jax.Array:
    """Returns a random key for each number of a sequence. numbers: [B] -> [B] keys."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers))


def keys_at(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns the random keys of one step. keys: [B] -> [B] keys."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


class _State(NamedTuple):
    step: jax.Array  # tokens written
    token: jax.Array  # [B], the last token written
    ended: jax.Array  # [B]
    written: jax.Array  # [B, new]
    cache: decoder.Cache


@functools.partial(jax.jit, static_argnames=("config", "new", "sampling", "dtype"))
@full_precision
def _continue(
    config: DecoderConfig,
    params: decoder.Params,
    tokens: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    is_end: jax.Array,
    pad: jax.Array,
    new: int,
    sampling: Sampling,
    dtype: DTypeLike,
) -> jax.Array:
    """Generates tokens. tokens, valid: [B, T], keys: [B], is_end: [v] -> the tokens that follow [B, new]."""

    def continued(own: tuple[jax.Array, ...], params: decoder.Params, is_end: jax.Array, pad: jax.Array) -> jax.Array:
        tokens, valid, keys = own
        batch = tokens.shape[0]

        def write(state: _State, logits: jax.Array) -> _State:
            token = choose(sampling, logits, keys_at(keys, state.step))
            token = jnp.where(state.ended, pad, token)
            written = jax.lax.dynamic_update_slice_in_dim(state.written, token[:, None], state.step, axis=1)
            ended = state.ended | is_end[token]
            return _State(state.step + 1, token, ended, written, state.cache)

        def advance(state: _State) -> _State:
            logits, cache = decode_step(config, params, state.token, state.cache)
            return write(state._replace(cache=cache), logits)

        def is_going(state: _State) -> jax.Array:
            return (state.step < new) & collectives.in_any_group(~state.ended.all())

        # The last token written is not read back, so it needs no space in the cache.
        logits, cache = prefill(config, params, tokens, valid, tokens.shape[1] + new - 1, dtype)
        written = jnp.full((batch, new), pad, jnp.int32)
        state = _State(jnp.int32(0), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), written, cache)
        state = jax.lax.while_loop(is_going, advance, write(state, logits))
        return state.written

    return collectives.map_chunks(continued, (tokens, valid, keys), params, is_end, pad)


def generate(
    model: Model,
    tokens: Any,
    max_new_tokens: int = 64,
    *,
    valid: ArrayLike | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos: int | tuple[int, ...] | None = None,
    pad: int | None = None,
    dtype: DTypeLike = "float32",
) -> np.ndarray:
    """Continues prompts.

    Inside ``mesh.use_mesh``, weights and prompts are sharded over the mesh; all processes of a run must call this.

    Args:
        tokens: Prompts [B, T], padded on the left to a common length; or the result of ``load_tokens``.
        max_new_tokens: Maximum number of tokens to generate.
        valid: [B, T], False for padding. By default the prompts have no padding.
        temperature: 0 selects the likeliest token each time; above 0, tokens are sampled, which requires ``key``.
        top_k: Number of the likeliest tokens to sample from; 0 means all.
        top_p: Sample from the smallest set of the likeliest tokens whose total probability reaches this value.
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
    sampling = Sampling(float(temperature), int(top_k), float(top_p))
    _check_prompts(model.config, prompts, mask, max_new_tokens)
    check_sampling(sampling, key)
    ends = end_tokens(model) if eos is None else _as_tuple(eos)
    prompts = prompts.astype(np.int32)
    left = ((0, 0), (-prompts.shape[1] % PROMPT_STEP, 0))
    new = _continue(
        model.config,
        shard_params(model.config, model.params),
        mesh.shard_chunks(np.pad(prompts, left)),
        mesh.shard_chunks(np.pad(mask, left)),
        _own_keys(jax.random.key(0) if key is None else key, len(prompts)),
        np.isin(np.arange(model.config.vocabulary), ends),
        np.int32(_filler(model.source, ends) if pad is None else pad),
        max_new_tokens,
        sampling,
        jnp.dtype(dtype),
    )
    return np.concatenate([prompts, mesh.array_to_host(new)], axis=1)


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
    return json.loads(source.config_text)


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


def check_sampling(sampling: Sampling, key: jax.Array | None) -> None:
    """Checks that the settings of sampling are in range, and that there is a random key if one is needed.

    Raises:
        UserError: they are not.
    """
    if not 0 <= sampling.temperature < float("inf"):
        raise UserError(f"{option('temperature')} is {sampling.temperature}, but must be 0 or more.")
    if sampling.top_k < 0:
        raise UserError(f"{option('top_k')} is {sampling.top_k}, but must be 0 (no limit) or more.")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"{option('top_p')} is {sampling.top_p}, but must be above 0 and at most 1.")
    if sampling.temperature == 0 and (sampling.top_k or sampling.top_p < 1):
        name = option("top_k" if sampling.top_k else "top_p")
        raise UserError(f"{name} has no meaning at temperature 0: give a {option('temperature')}, or leave it out.")
    if sampling.temperature > 0 and key is None:
        raise UserError("sampling needs a random key: pass key=jax.random.key(0), or temperature=0 for no sampling.")
