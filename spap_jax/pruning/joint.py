"""Joint steps on a pruned model, which adjust the MLPs of its blocks so that its predictions match the dense model's.

The sequential pass fits every block to the dense stream at its own output. The final distribution is what matters, so
joint steps continue the alternating minimisation on it: optimizer steps on the Kullback-Leibler divergence of the
pruned model's predictions from the dense model's ("Looking past the block" in ``docs/method.md``), on all blocks
together or, to save memory, on several at a time. No labels are used. Weights are kept only if the divergence falls on
held-out tokens.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from spap_jax import devices
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import step_dtype
from spap_jax.pruning.predictions import at
from spap_jax.pruning.streams import Padded, largest_divisor
from spap_jax.settings import PruneSettings
from spap_jax.training.checks import Check
from spap_jax.training.engine import Schedule, stages
from spap_jax.training.optimizers import relative
from spap_jax.training.step import Given, Job, Recipe, Sequences
from spap_jax.training.written import as_stored

_CHECKS = 8
"""Number of measurements on held-out tokens in a run, if there are as many steps."""


class Group(NamedTuple):
    """Consecutive blocks that are adjusted together, and their steps."""

    first: int
    blocks: int
    schedule: Schedule


class Adjusted(NamedTuple):
    """State after a measurement.

    Attributes:
        check: The measurement.
        fresh: Whether this process made it.
        state: Returns what a later process continues from, on the host; all processes have to call it.
        blocks: The best blocks so far, stacked [L, ...], after the last step; None before.
    """

    check: Check
    fresh: bool
    state: Callable[[], Params]
    blocks: Params | None


class Resumed(NamedTuple):
    """Where an earlier process stopped: all its measurements, and the state of the last."""

    checks: tuple[Check, ...]
    state: Params


def groups(layers: int, sequences: int, length: int, settings: PruneSettings, spread: int) -> list[Group]:
    """Returns the groups of blocks in order; each has an equal share of the passes over the fitted sequences.

    Args:
        layers: Number of blocks, L.
        sequences: Number of fitted sequences.
        length: Tokens in each.
        settings: The pruning settings; without joint steps there are no groups.
        spread: Number of devices along ``data``; a step has a sequence for each.
    """
    if not settings.decided.joint_passes:
        return []
    count = together(layers, settings)
    batch = min(sequences, max(spread, settings.joint_tokens // length))
    share = count / layers
    steps = max(1, round(settings.decided.joint_passes * sequences * share / batch))
    every = -(-steps // max(1, round(_CHECKS * share)))
    return [
        Group(first, count, Schedule(steps, batch, every, settings.batch_tokens, (settings.seed, number)))
        for number, first in enumerate(range(0, layers, count))
    ]


def together(layers: int, settings: PruneSettings) -> int:
    """Returns how many of ``layers`` blocks are adjusted together: a divisor of their number."""
    return largest_divisor(layers, settings.joint_blocks or layers)


def number_of_checks(plan: list[Group]) -> int:
    """Returns the number of measurements of a run, with the one before any step."""
    return 1 + sum(group.schedule.checks for group in plan)


def adjusted(
    config: DecoderConfig,
    params: Params,
    tokens: tuple[Padded, Padded],
    final: tuple[jax.Array, jax.Array],
    settings: PruneSettings,
    resumed: Resumed | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Iterator[Adjusted]:
    """Adjusts the MLPs of all blocks.

    Args:
        config: The pruned decoder.
        params: Its parameter tree, placed by ``placement.spread``; what moves is taken out of it, to save memory.
        tokens: Calibration and held-out token blocks, each in chunks; if none are held out, the calibration tokens are
            used for measurements too.
        final: The dense model's stream after its last block for the same tokens, each [C, B, T, d].
        settings: The pruning settings.
        resumed: Where an earlier process with the same arguments stopped.
        watch: Called after every step with the number of steps made and their total.

    Yields:
        The state after each measurement, the first of them before any step; of those of an earlier process the last.
    """
    sets = [(_sequences(part, last), part.real) for part, last in zip(tokens, final, strict=True)]
    fitted, held_out = sets[0], sets[1] if tokens[1].real else sets[0]
    plan = groups(config.layers, tokens[0].real, tokens[0].tokens.shape[2], settings, devices.number())
    total, last = sum(group.schedule.steps for group in plan), number_of_checks(plan)
    parts = {name: params["layers"].pop(name) for name in moving(settings, params["layers"])}
    checks = resumed.checks if resumed else ()
    if resumed and "settled" in resumed.state:
        parts = jax.tree.map(devices.like, resumed.state["settled"], parts)
    done = 1
    for group in plan:
        reached, done = done, done + group.schedule.checks
        if len(checks) > done:
            continue  # its result is in the state of a later group
        alone = group.blocks == config.layers
        best = parts if alone else _of_blocks(parts, group.first, group.blocks)
        frozen = params if alone else params | {"layers": params["layers"] | parts}
        job = Job(config, recipe(settings, group.schedule.steps), step_dtype(settings.compute_dtype), group.first)
        given, judged = (Given(frozen, None, *part) for part in (fitted, held_out))
        before = checks[:reached] if group.first else ()
        begun = (resumed.state["stage"], checks) if resumed and len(checks) > len(before) else None
        kept = len(checks) if begun else 0
        each = watch and (lambda made: watch(made, total))
        start = {"layers": best}
        steps = stages(job, given, judged, start, as_stored(start), group.schedule, before, begun, each)
        # The steps have these, and let them go when they have better ones.
        resumed, best, start, parts = None, {}, None, {} if alone else parts
        for stage in steps:
            best, checks = stage.best["layers"], stage.checks
            ended = None
            if len(checks) == last:
                ended = params["layers"] | (best if alone else _with_blocks(parts, group.first, best))
            settled = {} if alone else {"settled": parts}
            yield Adjusted(checks[-1], len(checks) > kept, lambda s=stage, more=settled: _state(s, more), ended)
        parts = best if alone else _with_blocks(parts, group.first, best)


def _sequences(part: Padded, last: jax.Array) -> Sequences:
    """Returns the sequences of the steps, with the dense model's stream after its last block."""
    mask = None if part.mask is None else devices.spread(part.mask)
    return Sequences(devices.spread(part.tokens), last, mask)


def recipe(settings: PruneSettings, steps: int) -> Recipe:
    """Returns the optimizer of the joint steps."""
    return Recipe(relative, (settings.joint_learning_rate, steps, step_dtype(settings.moment_dtype)))


def moving(settings: PruneSettings, layers: Params) -> tuple[str, ...]:
    """Returns the names of the parts of a block that joint steps change."""
    return ("mlp",) if settings.joint_weights == "mlp" else tuple(layers)


def _state(stage: Any, more: Params) -> Params:
    return {"stage": stage.leaves(), **jax.tree.map(devices.whole, more)}


@functools.partial(jax.jit, static_argnames=("first", "count"))
def _of_blocks(stack: Params, first: int, count: int) -> Params:
    return jax.tree.map(lambda a: a[first : first + count], stack)


@functools.partial(jax.jit, static_argnames="first")
def _with_blocks(stack: Params, first: int, some: Params) -> Params:
    return jax.tree.map(lambda a, b: a.at[first : first + len(b)].set(b), stack, some)


def last_of(config: DecoderConfig, layers: Params) -> Iterator[tuple[int, Params]]:
    """Yields each block of a stack with its number, on the host, one at a time; all processes have to run through."""
    for index in range(config.layers):
        yield index, devices.whole(_block(layers, index))


_block = jax.jit(at)
