"""Joint steps on a pruned model, which adjust its last blocks, or all, so that its predictions match the dense model's.

The sequential pass fits every block to the dense stream at its own output. The final distribution is what matters, so
joint steps continue the alternating minimisation on it: optimizer steps on what the pruned model's predictions lose
against the dense model's ("The whole model" in ``docs/method.md``). Weights are kept only if the loss falls on held-out
tokens.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from spap_jax.errors import NotFiniteError
from spap_jax.models import DecoderConfig, Params
from spap_jax.models.blocks import get_layer
from spap_jax.numerics import step_dtype
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import fully_shard_params
from spap_jax.parallel.sequences import Sequences
from spap_jax.pruning.run import Run, Step
from spap_jax.report.schema import Check
from spap_jax.settings import EFFORTS, PruneSettings
from spap_jax.training.loop import Stage, StepSchedule, stages
from spap_jax.training.optimizers import relative
from spap_jax.training.step import Frozen, Job, Recipe

_CHECKS = 8
"""Largest number of measurements on held-out tokens in a run."""


def number_of_checks(run: Run) -> int:
    """Returns the number of measurements of a run, with the one before any step; 1 without joint steps."""
    return 1 + schedule_of(run).checks if run.jointly else 1


def schedule_of(run: Run) -> StepSchedule:
    """Returns the joint steps of a run; see `schedule`."""
    length, judged = run.fitted.tokens.shape[-1], run.held_out.real or run.fitted.real
    return schedule(run.joint_sequences, judged, length, run.settings, mesh.data_size())


def schedule(sequences: int, judged: int, length: int, settings: PruneSettings, data_size: int) -> StepSchedule:
    """Returns the joint steps.

    However many devices there are, there are as many steps as on one, since fewer would lead less far: steps that have
    more sequences for the devices to share read all of them again, as often as it takes.

    Args:
        sequences: Number of sequences that steps on one device read, repetitions included.
        judged: Number of sequences that a measurement reads.
        length: Tokens in each.
        settings: The pruning settings, resolved.
        data_size: Number of devices along ``data``; a step has a sequence for each, if there are as many.
    """
    assert settings.joint_tokens
    assert settings.joint_learning_rate
    alone = min(sequences, max(1, settings.joint_tokens // length))
    steps = max(1, round(sequences / alone))
    batch = min(sequences, max(data_size, alone))
    checks = max(1, round(min(_CHECKS, EFFORTS[settings.effort].measured * sequences / judged)))
    rate, every = settings.joint_learning_rate, -(-steps // checks)
    return StepSchedule(steps, rate, batch, every, settings.batch_tokens, (settings.seed, 0))


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
        blocks: These blocks, pruned, stacked as in ``placement.zeros_for_blocks``; they are used up.
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
    begun = tuple(report for report in run.begun.reports if isinstance(report, Check))
    for check in begun[:-1]:
        yield Step(check, dict, fresh=False)
    frozen = Frozen(fully_shard_params(run.tail, {name: run.outer[name] for name in ("embed", "head")}))
    texts = run.fitted, run.held_out if run.held_out.real else run.fitted
    read, judged = (_sequences(*each) for each in zip(texts, ends, entering, strict=True))
    plan = schedule_of(run)

    def restore(like: Any) -> tuple[Any, tuple[Check, ...]] | None:
        return (_restored(run.begun.read(len(run.begun.reports) - 1), like), begun) if begun else None

    each = (lambda done: watch(done, plan.steps)) if watch else (lambda done: None)
    for stage in stages(job_of(run), frozen, read, judged, {"layers": blocks}, plan, restore, each):
        if not math.isfinite(stage.checks[0].held_out):  # no weights could have a lower loss
            raise NotFiniteError(
                "the pruned model's predictions are not finite before any joint step: they overflow in float32, so "
                "look whether the dense model computes what it should (spap eval)."
            )
        last = stage.checks[-1].step == plan.steps
        final = _numbered(run, stage.best["layers"]) if last else ()
        yield Step(stage.checks[-1], functools.partial(_state, stage), final, len(stage.checks) > len(begun))


def _sequences(part: Sequences, target: jax.Array, entering: jax.Array | None) -> Sequences:
    return part.sharded()._replace(target=target, entering=entering)


def job_of(run: Run) -> Job:
    """Returns what joint steps are compiled for."""
    return job(run.tail, run.settings, all_blocks=run.tail.layers == run.config.layers)


def job(config: DecoderConfig, settings: PruneSettings, all_blocks: bool) -> Job:
    """Returns what joint steps are compiled for, on all blocks or the last ones."""
    recipe, remat = Recipe(relative, ("bfloat16", config.norm_shift)), "full" if all_blocks else "dots"
    return Job(config, recipe, step_dtype(), remat=remat, text_weight=settings.text_weight)


def _state(stage: Stage) -> Params:
    """Returns what a later run goes on from, as this process's devices hold it."""
    leaves = jax.tree.leaves((stage.state, stage.best))
    return {str(number): mesh.parts_of(array) for number, array in enumerate(leaves)}


def _restored(parts: Params, like: Any) -> Any:
    arrays, tree = jax.tree.flatten(like)
    return tree.unflatten([mesh.from_parts(parts.pop(str(n), {}), a) for n, a in enumerate(arrays)])


def _numbered(run: Run, layers: Params) -> Iterator[tuple[int, Params]]:
    """Yields each block with its number, one at a time; all processes have to run through."""
    for index in range(run.tail.layers):
        yield run.tail_start + index, _block(layers, index)


_block = jax.jit(get_layer)
