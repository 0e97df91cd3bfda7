"""Prefill and decoding speed of models, timed in alternation so that fluctuations of the machine cancel."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import jax
import numpy as np

from spap_jax.errors import UserError, option
from spap_jax.evaluation.generation import keys_of, read, write
from spap_jax.models import cost, decoder
from spap_jax.models.decoder import check_length
from spap_jax.models.model import Model
from spap_jax.numerics import generation_dtype
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.report.schema import GenerationWorkload


class Speed(NamedTuple):
    """Seconds that one model takes in each timed run; run i of one model is paired with run i of the other.

    Attributes:
        prefill: Seconds for the prompt.
        decode: Seconds for one token of every sequence.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]


def time_generation(models: list[Model], work: GenerationWorkload) -> list[Speed]:
    """Times models in turn, run by run, after one warm-up run of each model, which compiles.

    Inside ``mesh.use_mesh``, weights and sequences are sharded over the mesh. Parameters may be values that are read
    lazily, a layer at a time.

    Raises:
        UserError: prompt and new tokens do not fit a model's positions, or the sequences cannot be divided evenly.
    """
    for model in models:
        check_length(model.config, work.prompt + work.new)
    if work.batch % mesh.data_size():
        raise UserError(
            f"a batch of {work.batch} cannot be divided evenly among {mesh.data_size()} devices or groups of them: "
            f"give a {option('batch')} that they divide, or fewer {option('devices')}."
        )
    runs = [_run(model, work) for model in models]
    for run in runs:
        run()
    timed = [[run() for run in runs] for _ in range(work.repeats)]
    return [Speed(*zip(*own, strict=True)) for own in zip(*timed, strict=True)]


def speed_up(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """Returns how many times faster ``after`` is than ``before``: the median over the paired runs."""
    return median(b / a for b, a in zip(before, after, strict=True))


def _run(model: Model, work: GenerationWorkload) -> Callable[[], tuple[float, float]]:
    random = np.random.default_rng(0)
    tokens = mesh.shard_chunks(random.integers(0, model.config.vocabulary, (work.batch, work.prompt), np.int32))
    valid = mesh.shard_chunks(np.ones((work.batch, work.prompt), bool))
    config, params = decoder.unstacked(model.config, model.params, shard_params)
    keys, dtype = keys_of(jax.random.key(0), np.arange(work.batch)), generation_dtype(model.params)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        state = jax.block_until_ready(read(config, params, tokens, valid, work.prompt + work.new, dtype))
        middle = time.perf_counter()
        jax.block_until_ready(write(config, 0.0, work.new, params, *state, keys, np.int32(0)))
        return middle - start, (time.perf_counter() - middle) / work.new

    return run


def arithmetic(model: Model, work: GenerationWorkload) -> tuple[int, int]:
    """Returns the floating-point operations of the prompt, and the bytes that one decoding step reads."""
    family, config, weight = model.family, model.config, jax.tree.leaves(model.params)[0].dtype.itemsize
    cached = generation_dtype(model.params).itemsize
    read = cost.decode_bytes(family, config, work.batch, work.prompt + work.new, weight, cached)
    return cost.prefill_operations(family, config, work.batch, work.prompt), read
