"""Joint steps on a pruned model, which adjust its blocks so that its predictions match the dense model's.

The sequential pass fits every block to the dense stream at its own output. The final distribution is what matters, so
joint steps continue the alternating minimisation on it: optimizer steps on what the pruned model's predictions lose
against the dense model's ("The whole model" in ``docs/method.md``), on all blocks or the last ones, together or, to
save memory, several at a time. Weights are kept only if the loss falls on held-out tokens.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax import lax

from spap_jax.errors import NotFiniteError
from spap_jax.models import DecoderConfig, Params
from spap_jax.numerics import step_dtype
from spap_jax.parallel import mesh, sequences
from spap_jax.parallel.placement import fully_shard_params
from spap_jax.pruning.predictions import get_layer
from spap_jax.pruning.run import Run, Step
from spap_jax.pruning.streams import largest_divisor
from spap_jax.report.schema import Check
from spap_jax.settings import EFFORTS, PruneSettings
from spap_jax.training.engine import Stage, StepSchedule, described, from_host, parts_of, stages
from spap_jax.training.optimizers import relative
from spap_jax.training.shortlist import Shortlist, shortened_head, shortlist_of
from spap_jax.training.step import Given, Job, Recipe, Sequences

_CHECKS = 8
"""Largest number of measurements on held-out tokens in a run, but there is one for each group of blocks."""

_MEASURED_EVERY = 4
"""Distance of the tokens at which a measurement makes predictions where the steps have a shortlist: those are of the
whole vocabulary, and at all tokens would take most of its time. A mask may leave few tokens or none at that distance:
those that it counts are measured all."""


class Group(NamedTuple):
    """Consecutive blocks that are adjusted together, and their steps."""

    first: int
    blocks: int
    schedule: StepSchedule


def groups(
    layers: int, sequences: int, judged: int, length: int, settings: PruneSettings, data_size: int
) -> list[Group]:
    """Returns the groups of blocks in order; each has an equal share of the sequences.

    However many devices there are, there are as many steps as on one, since fewer would lead less far: steps that have
    more sequences for the devices to share read all of them again, as often as it takes.

    Args:
        layers: Number of blocks that move.
        sequences: Number of sequences that steps on one device read, repetitions included; without any, there are no
            groups.
        judged: Number of sequences that a measurement reads.
        length: Tokens in each.
        settings: The pruning settings, resolved.
        data_size: Number of devices along ``data``; a step has a sequence for each, if there are as many.
    """
    if not sequences:
        return []
    assert settings.joint_tokens
    assert settings.joint_learning_rate
    count = together(layers, settings)
    alone = min(sequences, max(1, settings.joint_tokens // length))
    share = count / layers
    steps = max(1, round(sequences * share / alone))
    batch = min(sequences, max(data_size, alone))
    checks = min(_CHECKS, EFFORTS[settings.effort].measured * sequences / judged)
    every = -(-steps // max(1, round(checks * share)))
    schedule = StepSchedule(steps, settings.joint_learning_rate, batch, every, settings.batch_tokens, ())
    return [
        Group(first, count, schedule._replace(seed=(settings.seed, number)))
        for number, first in enumerate(range(0, layers, count))
    ]


def together(layers: int, settings: PruneSettings) -> int:
    """Returns how many of ``layers`` blocks are adjusted together: a divisor of their number."""
    return largest_divisor(layers, settings.joint_blocks or layers)


def number_of_checks(plan: list[Group]) -> int:
    """Returns the number of measurements of a run, with the one before any step."""
    return 1 + sum(group.schedule.checks for group in plan)


def groups_of(run: Run) -> list[Group]:
    """Returns the groups of blocks of a run in order."""
    length = run.fitted.tokens.shape[-1]
    judged = run.held_out.real or run.fitted.real
    return groups(run.tail.layers, run.joint_sequences, judged, length, run.settings, mesh.data_size())


def adjusted(
    run: Run,
    blocks: Params,
    ends: tuple[jax.Array, jax.Array],
    entering: tuple[jax.Array | None, jax.Array | None],
    watch: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """Adjusts the blocks of ``run.tail``.

    Args:
        run: The run. If it holds out no tokens, measurements are on the fitted ones.
        blocks: These blocks, pruned, stacked as in ``placement.zeros_for_blocks``; what moves is taken out of them, to
            save memory.
        ends: The dense model's streams after its last block, of the tokens of steps and of measurements, [C, B, T, d]
            each.
        entering: The pruned model's streams before these blocks, likewise; None if they are all blocks.
        watch: Called after every step with the number of steps made and their total.

    Yields:
        A step for each measurement, the first of them before any step; those of an earlier run come first. The last has
        the final blocks.

    Raises:
        NotFiniteError: the predictions overflow.
    """
    config, settings = run.tail, run.settings
    checks = tuple(report for report in run.begun.reports if isinstance(report, Check))
    stored = functools.partial(run.begun.read, len(run.begun.reports) - 1)
    for check in checks[:-1]:
        yield Step(check, dict, fresh=False)
    outside = fully_shard_params(config, {name: run.outer[name] for name in ("embed", "head")})
    params = outside | {"layers": blocks}
    texts = run.fitted, run.held_out if run.held_out.real else run.fitted
    few = shortlist_of(run.fitted.rows, config.vocabulary, settings.seed)
    short = None if few is None else _short(run, outside, few)
    read, measured = (
        (_sequences(*each), each[0].real) for each in zip(texts, ends, entering, (few, None), strict=True)
    )
    plan = groups_of(run)
    total, last = sum(group.schedule.steps for group in plan), number_of_checks(plan)
    parts = {name: params["layers"].pop(name) for name in moving(settings, params["layers"])}
    resumed, apart = bool(checks), plan[0].blocks < config.layers
    if resumed and apart:
        like, parts = described(parts), {}  # let go before the stored ones come
        parts = from_host(stored()["settled"], like)
    marks = itertools.accumulate((group.schedule.checks for group in plan), initial=1)
    for group, (reached, done) in zip(plan, itertools.pairwise(marks), strict=True):
        if len(checks) > done:
            continue  # its result is in the state of a later group
        best = _of_blocks(parts, group.first, group.blocks) if apart else parts
        frozen = params | {"layers": params["layers"] | parts} if apart else params
        job = job_of(config, settings, group.first, few is not None and texts[1].mask is None)
        given, judged = Given(frozen, None, *read, short), Given(frozen, None, *measured)
        before = checks[:reached] if group.first else ()
        begun = (lambda: stored()["stage"], checks) if resumed and len(checks) > len(before) else None
        kept = len(checks) if begun else 0
        each = watch and (lambda made: watch(made, total))
        start = {"layers": best}
        steps = stages(job, given, judged, start, group.schedule, before, begun, each)
        # The steps have these, and let them go when they have better ones.
        resumed, best, start, parts = False, {}, None, parts if apart else {}
        stage = None
        for stage in steps:
            checks = stage.checks
            if not math.isfinite(checks[0].held_out):  # no weights could have a lower loss
                raise NotFiniteError(
                    "the pruned model's predictions are not finite before any joint step: they overflow in float32, so "
                    "look whether the dense model computes what it should (spap eval)."
                )
            final = _numbered(run, params["layers"], parts, stage, group.first) if len(checks) == last else ()
            state = functools.partial(_state, stage, parts if apart else None)
            yield Step(checks[-1], state, final, len(checks) > kept)
        if stage and len(checks) < last:
            stage.state.delete()  # makes room for the best
            parts = _with_blocks(parts, group.first, stage.best["layers"])


def _short(run: Run, outside: Params, few: Shortlist) -> Params:
    ids, others = mesh.replicate(tuple(few))
    return shortened_head(run.tail, outside, ids, step_dtype(run.settings.compute_dtype)) | {"others": others}


def _sequences(
    part: sequences.Sequences, end: jax.Array, entering: jax.Array | None, few: Shortlist | None
) -> Sequences:
    """Returns sequences as steps read them.

    Args:
        part: Their tokens.
        end: The dense stream after the last block.
        entering: The pruned stream before the first block; None for the embedded tokens.
        few: The shortlist; None if the logits are those of the whole vocabulary.
    """
    places, mask = None, part.mask
    if few is not None:
        places, there = few.places(part.tokens)
        mask = there if mask is None else mask & there
    spread = [None if array is None else mesh.shard_chunks(array) for array in (mask, places)]
    return Sequences(mesh.shard_chunks(part.tokens), end, spread[0], entering, spread[1])


def job_of(config: DecoderConfig, settings: PruneSettings, first: int = 0, thinned: bool = False) -> Job:
    """Returns what joint steps are compiled for.

    Args:
        config: The pruned decoder.
        settings: The settings of the run, resolved.
        first: First block that moves.
        thinned: Whether measurements make predictions at some tokens only.
    """
    recipe = Recipe(relative, (settings.moment_dtype, config.norm_shift))
    dtype, weight = step_dtype(settings.compute_dtype), settings.text_weight
    every = _MEASURED_EVERY if thinned else 1
    assert settings.remat
    return Job(config, recipe, dtype, first, remat=settings.remat, text_weight=weight, measured_every=every)


def moving(settings: PruneSettings, layers: Params) -> tuple[str, ...]:
    """Returns the names of the parts of a block that joint steps change."""
    return ("mlp",) if settings.joint_weights == "mlp" else tuple(layers)


def _state(stage: Stage, settled: Params | None) -> Params:
    """What a later run goes on from: the stage of the steps, and the stack of all blocks if they move in groups."""
    return {"stage": stage.parts()} | ({} if settled is None else {"settled": parts_of(settled)})


@functools.partial(jax.jit, static_argnames=("first", "count"))
def _of_blocks(stack: Params, first: int, count: int) -> Params:
    return jax.tree.map(lambda a: a[first : first + count], stack)


@functools.partial(jax.jit, donate_argnames="stack")
def _with_blocks(stack: Params, first: int, some: Params) -> Params:
    """Stores blocks from ``first`` on in a stack [L, ...], which is updated in place."""
    return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, first, 0), stack, some)


def _numbered(run: Run, layers: Params, parts: Params, stage: Stage, first: int) -> Iterator[tuple[int, Params]]:
    """Yields each block with its number, one at a time; all processes have to run through.

    Args:
        run: The run.
        layers: The parts of all blocks that no step changed, stacked [L, ...].
        parts: The parts that steps on other blocks changed, which are used up; none if all blocks were adjusted
            together.
        stage: The last stage of the steps.
        first: Index of the first block that these adjusted.
    """
    best = stage.best["layers"]
    final = layers | (_with_blocks(parts, first, best) if parts else best)
    for index in range(run.tail.layers):
        yield run.tail_start + index, _block(final, index)


_block = jax.jit(get_layer)
