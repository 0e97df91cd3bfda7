"""Joint steps on a pruned model, which adjust its last blocks, or all, so that its predictions match the dense model's.

The sequential pass fits every block to the dense stream at its own output; joint steps continue the minimisation on the
final distribution ("The whole model" in ``docs/method.md``). Weights are kept only if the divergence from the dense
model falls on held-out tokens, whatever the text's loss does.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.errors import NotFiniteError
from spap_jax.models import Params
from spap_jax.numerics import step_dtype
from spap_jax.parallel.placement import fully_shard_params, fully_sharded_spec, zeros_for_blocks
from spap_jax.parallel.program import program
from spap_jax.pruning import streams
from spap_jax.pruning.predictions import set_layer, take_layer
from spap_jax.pruning.run import Run
from spap_jax.report.schema import Check, converted
from spap_jax.training.loop import rows_of, stages
from spap_jax.training.optimizers import relative
from spap_jax.training.step import Frozen, Job, Recipe, measure

if TYPE_CHECKING:
    from spap_jax.pruning.prune import Listener, Store


def entering(run: Run, pair: streams.Pair) -> tuple[jax.Array, jax.Array]:
    """Returns the pruned streams before the blocks of joint steps, of the fitted and the measured sequences."""
    return streams.rounded(pair[0].pruned), _copied(_judged(run, pair).pruned)


def ends(run: Run, pair: streams.Pair) -> tuple[jax.Array, jax.Array]:
    """Returns the dense streams after the last block, of the fitted and the measured sequences, for the target."""
    return streams.rounded(pair[0].dense), _judged(run, pair).dense


@program
def _copied(stream: jax.Array) -> jax.Array:
    return jnp.copy(stream)


def _judged(run: Run, pair: streams.Pair) -> streams.Streams:
    return pair[1] if run.held_out.real else pair[0]


def with_block(run: Run, tail: Params | None, number: int, params: Params) -> Params:
    """Adds a pruned block to the stack [g, ...] of those that joint steps change, which is updated in place."""
    if tail is None:
        tail = zeros_for_blocks(run.tail, params, fully_sharded_spec)
    return set_layer(tail, number - run.first_joint, params)


def check_without_steps(run: Run, outer: Params, pair: streams.Pair) -> Check:
    """Measures the pruned model where no joint steps follow.

    Args:
        outer: The dense decoder's parameters outside the blocks.
        pair: The streams after the last block.

    Raises:
        NotFiniteError: the predictions overflow.
    """
    start, config = time.perf_counter(), run.pruned.last(0)
    frozen = Frozen(fully_shard_params(config, {name: outer[name] for name in ("embed", "head")}))
    ends = _judged(run, pair)
    judged = run.judged.sharded()._replace(target=ends.dense, entering=ends.pruned)
    rows = rows_of(np.arange(judged.real), judged, run.settings.batch_tokens)
    found = measure(Job(config, None, step_dtype()), frozen, judged, {}, rows)
    seconds = time.perf_counter() - start
    return _checked(Check(0, 0, (), float(found.loss), True, seconds, float(found.agreement)))


def _checked(opening: Check) -> Check:
    """Raises an error if the pruned model's predictions are not finite: no weights could then be better."""
    if not math.isfinite(opening.held_out):
        raise NotFiniteError(
            "the pruned model's predictions are not finite before any joint step: they overflow in float32, so look "
            "whether the dense model computes what it should (its perplexity)."
        )
    return opening


def make_steps(
    run: Run,
    outer: Params,
    tail: Params,
    ends: tuple[jax.Array, jax.Array],
    before: tuple[jax.Array, jax.Array] | None,
    store: "Store",
    report: "Listener",
    watch: Callable[[int, int], None],
) -> Iterator[Check]:
    """Adjusts the last blocks, and gives the store the best of them.

    Args:
        outer: The dense decoder's parameters outside the blocks.
        tail: The blocks, pruned, stacked; they are donated.
        ends: The dense streams after the last block, as `ends` returns them.
        before: The pruned streams before these blocks, as `entering` returns them; None if they are all blocks.
        watch: Called after every step with the number of steps made and their total.

    Yields:
        The measurements, the first of them before any step.

    Raises:
        NotFiniteError: the predictions overflow.
    """
    assert run.joint
    frozen = fully_shard_params(run.tail, {name: outer[name] for name in ("embed", "head")})
    read, judged = (
        part.sharded()._replace(target=end, entering=start)
        for part, end, start in zip((run.fitted, run.judged), ends, before or (None, None), strict=True)
    )
    total = run.joint.steps
    checks: tuple[Check, ...] = ()
    stage = None
    each = stages(
        job_of(run), Frozen(frozen), read, judged, {"layers": tail}, run.joint,
        restore=functools.partial(_restored, store), watch=lambda done: watch(done, total),
    )  # fmt: skip
    del tail  # which goes when better weights are there
    for stage in each:
        _checked(stage.checks[0])
        resumed = not checks and len(stage.checks) > 1
        for check in stage.checks[len(checks) :]:
            report(check, not resumed)
            yield check
        checks = stage.checks
        if not resumed:
            store.save_state((stage.state, stage.best), [*map(dataclasses.asdict, checks)])
    assert stage
    for number in range(run.tail.layers):
        store.replace(run.first_joint + number, take_layer(stage.best["layers"], number))


def _restored(store: "Store", like: Any) -> tuple[Any, tuple[Check, ...]] | None:
    found = store.restore_state(like)
    return found and (found[0], tuple(converted(check, Check) for check in found[1]))


def job_of(run: Run) -> Job:
    """Returns what joint steps are compiled for."""
    recipe = Recipe(relative, ("bfloat16", run.tail.norm_shift))
    return Job(run.tail, recipe, step_dtype(), text_weight=run.settings.joint_text_weight)
