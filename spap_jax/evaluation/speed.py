"""Prefill and decoding speed of models, timed in alternation so that fluctuations of the machine cancel."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from spap_jax import devices
from spap_jax.errors import UserError
from spap_jax.evaluation.generation import CACHE, decode_step, prefill
from spap_jax.evaluation.perplexity import check_length
from spap_jax.model import Model
from spap_jax.models import Cache, DecoderConfig, Params, cost, decoder
from spap_jax.placement import shard_params
from spap_jax.reporting.schema import GenerationWorkload


@dataclass(frozen=True)
class Speed:
    """Timings of one model. The timed runs are in order: run i of one model is paired with run i of the other.

    Attributes:
        prefill: Seconds for the prompt, one entry per run.
        decode: Seconds for one token of every sequence, one entry per run.
        prefill_operations: Floating-point operations of the prompt.
        decode_bytes: Bytes that one decoding step reads.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prefill_operations: int
    decode_bytes: int


def time_generation(models: list[Model], work: GenerationWorkload) -> list[Speed]:
    """Times models in turn, run by run, after one warm-up run of each model, which compiles.

    Inside ``devices.use_mesh``, weights and sequences are sharded over the mesh.

    Args:
        models: The models; their parameters may be values that are read lazily, a layer at a time.
        work: The work to time.

    Raises:
        UserError: prompt and new tokens do not fit a model's positions, or the sequences cannot be divided evenly.
    """
    for model in models:
        check_length(model.config, work.prompt + work.new)
    if work.batch % devices.data_size():
        raise UserError(
            f"a batch of {work.batch} cannot be divided evenly among {devices.data_size()} devices or groups of them: "
            "give a --batch that they divide, or fewer --devices."
        )
    runs = [_run(model, work) for model in models]
    for run in runs:
        run()
    timed = [[run() for run in runs] for _ in range(work.repeats)]
    return [_speed(model, work, [row[i] for row in timed]) for i, model in enumerate(models)]


def speed_up(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """Returns how many times faster ``after`` is than ``before``: the median over the paired runs."""
    return median(b / a for b, a in zip(before, after, strict=True))


def _run(model: Model, work: GenerationWorkload) -> Callable[[], tuple[float, float]]:
    random = np.random.default_rng(0)
    tokens = devices.shard_chunks(random.integers(0, model.config.vocabulary, (work.batch, work.prompt), np.int32))
    config, params = decoder.laid_out(model.config, model.params, shard_params)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        logits, cache = _read(config, work.prompt + work.new, params, tokens)
        token = logits.argmax(axis=-1).block_until_ready()
        middle = time.perf_counter()
        for _ in range(work.new):
            logits, cache = _write(config, params, token, cache)
            token = logits.argmax(axis=-1)
        token.block_until_ready()
        return middle - start, (time.perf_counter() - middle) / work.new

    return run


@functools.partial(jax.jit, static_argnames=("config", "size"))
def _read(config: DecoderConfig, size: int, params: Params, tokens: jax.Array) -> tuple[jax.Array, Cache]:
    """Reads prompts [B, T] into a new cache for ``size`` tokens; also returns the logits of the last ones [B, v]."""

    def own(params: Params, tokens: jax.Array) -> tuple[jax.Array, Cache]:
        return prefill(config, params, tokens, jnp.ones_like(tokens, dtype=bool), size)

    if devices.data_size() == 1:
        return own(params, tokens)
    return devices.shard_map_over_data(own, (P(), devices.DATA_SPEC), (devices.DATA_SPEC, CACHE))(params, tokens)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _write(config: DecoderConfig, params: Params, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Appends a token [B] to each sequence; returns the logits after it [B, v], and the cache."""
    own = functools.partial(decode_step, config)
    if devices.data_size() == 1:
        return own(params, token, cache)
    specs = (devices.DATA_SPEC, CACHE)
    return devices.shard_map_over_data(own, (P(), *specs), specs)(params, token, cache)


def _speed(model: Model, work: GenerationWorkload, timed: list[tuple[float, float]]) -> Speed:
    weight = jax.tree.leaves(model.params)[0].dtype.itemsize
    return Speed(
        prefill=tuple(prefill for prefill, _ in timed),
        decode=tuple(decode for _, decode in timed),
        prefill_operations=cost.prefill_operations(model.family, model.config, work.batch, work.prompt),
        decode_bytes=cost.decode_bytes(model.family, model.config, work.batch, work.prompt + work.new, weight),
    )
