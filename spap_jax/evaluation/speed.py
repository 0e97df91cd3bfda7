"""Prefill and decoding speed of models, timed in alternation so that fluctuations of the machine cancel."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.evaluation.generation import decode_step, prefill
from spap_jax.evaluation.perplexity import check_length
from spap_jax.model import Model
from spap_jax.models import cost, decoder


@dataclass(frozen=True)
class Workload:
    """The work to time.

    Attributes:
        batch: Number of sequences at once (B).
        prompt: Number of tokens of each sequence that prefill reads.
        new: Number of tokens that decoding appends to each sequence.
        repeats: Number of timed runs; medians are reported.
    """

    batch: int = 1
    prompt: int = 512
    new: int = 32
    repeats: int = 7


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


def measure(models: list[Model], work: Workload) -> list[Speed]:
    """Times models in turn, run by run, after one warm-up run of each model, which compiles.

    Raises:
        UserError: prompt and new tokens do not fit a model's positions.
    """
    for model in models:
        check_length(model.config, work.prompt + work.new)
    runs = [_run(model, work) for model in models]
    for run in runs:
        run()
    timed = [[run() for run in runs] for _ in range(work.repeats)]
    return [_speed(model, work, [row[i] for row in timed]) for i, model in enumerate(models)]


def speed_up(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """Returns how many times faster ``after`` is than ``before``: the median over the paired runs."""
    return median(b / a for b, a in zip(before, after, strict=True))


def _run(model: Model, work: Workload) -> Callable[[], tuple[float, float]]:
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(0, model.config.vocabulary, (work.batch, work.prompt)), jnp.int32)
    valid = jnp.ones_like(tokens, dtype=bool)
    config, params = decoder.laid_out(model.config, model.params)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        logits, cache = prefill(config, params, tokens, valid, work.prompt + work.new)
        token = logits.argmax(axis=-1).block_until_ready()
        middle = time.perf_counter()
        for _ in range(work.new):
            logits, cache = decode_step(config, params, token, cache)
            token = logits.argmax(axis=-1)
        token.block_until_ready()
        return middle - start, (time.perf_counter() - middle) / work.new

    return run


def _speed(model: Model, work: Workload, timed: list[tuple[float, float]]) -> Speed:
    weight = jax.tree.leaves(model.params)[0].dtype.itemsize
    return Speed(
        prefill=tuple(prefill for prefill, _ in timed),
        decode=tuple(decode for _, decode in timed),
        prefill_operations=cost.prefill_operations(model.family, model.config, work.batch, work.prompt),
        decode_bytes=cost.decode_bytes(model.family, model.config, work.batch, work.prompt + work.new, weight),
    )
