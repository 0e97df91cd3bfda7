"""The loop of steps: some steps, then a measurement on held-out sequences; the best weights are kept.

They are judged by the divergence from a teacher if there is one, else by the next-token loss. If that is far above what
it was before any step, the steps start again from the best weights, half as large. Each stage is the complete state of
a run, from which another process can go on to the same bits.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import memory
from spap_jax.models import Params
from spap_jax.parallel import mesh
from spap_jax.parallel.program import is_dry, program
from spap_jax.parallel.sequences import Sequences, division
from spap_jax.report.schema import Check
from spap_jax.training.optimizers import rates
from spap_jax.training.step import Frozen, Job, Measurement, State, begin, measure, step

_FAR = 0.5
"""How much the loss may rise above that before any step, relative to it; good steps often raise it in the beginning."""


class StepSchedule(NamedTuple):
    """How many steps are made, on what.

    Attributes:
        sequences: Sequences in a step; devices without one of their own are idle.
        batch_tokens: Tokens that pass through the model at once on each device.
        seed: Seed of the order of the sequences.
    """

    steps: int
    rate: float
    sequences: int
    check_every: int
    batch_tokens: int
    seed: tuple[int, ...]

    @property
    def checks(self) -> int:
        """Number of measurements after steps."""
        return -(-self.steps // self.check_every)


class Stage(NamedTuple):
    """State of a run after a measurement.

    Attributes:
        state: State from which the next steps start; they donate it, so do not use it once they have begun.
        best: The trained weights with the lowest loss so far, in the data types in which they are written.
    """

    state: State
    best: Params
    checks: tuple[Check, ...]

    @property
    def least(self) -> float:
        """The lowest loss so far, that of the best weights."""
        return min(check.held_out for check in self.checks if check.taken)


Restore = Callable[[Any], tuple[Any, tuple[Check, ...]] | None]
"""Returns state, best weights and measurements of an interrupted run, placed like the descriptions; None if none."""


def stages(
    job: Job,
    frozen: Frozen,
    read: Sequences,
    judged: Sequences,
    start: Params,
    schedule: StepSchedule,
    restore: Restore = lambda like: None,
    watch: Callable[[int], None] = lambda done: None,
) -> Iterator[Stage]:
    """Makes all steps.

    Args:
        start: The trained weights, as they are written; placed by ``placement.fully_shard_params``.
        restore: Returns the last stage of an interrupted run with the same arguments.
        watch: Called after every step with the number of steps made.

    Yields:
        The stage at the start, or the one of the interrupted run; then one after every ``check_every`` steps.
    """
    order = _order(read.real, schedule.steps, schedule.sequences, schedule.seed)
    planned = rates(schedule.rate, schedule.steps)
    held_out = rows_of(np.arange(judged.real), judged, schedule.batch_tokens)
    tokens = schedule.sequences * read.tokens.shape[-1]
    dtypes = tuple(array.dtype for array in jax.tree.leaves(start))

    def check(moved: Params, step: int, losses: tuple[float, ...], least: float, clock: float) -> Check:
        found = Measurement(*map(_number, measure(job._replace(recipe=None), frozen, judged, moved, held_out)))
        taken = not step or found.loss < least  # not if nan
        seconds = time.perf_counter() - clock
        return Check(step, step * tokens, losses, found.loss, taken, seconds, found.agreement)

    clock = time.perf_counter()  # the first measurement's time includes the largest compilation
    restored = restore(_described((begin(job, start), start)))
    if restored:
        (state, best), checks = restored
        stage = Stage(state, best, checks)
        del state, best
    else:
        first_check = check(start, 0, (), 0.0, clock)
        stage = Stage(begin(job, start), start, (first_check,))
    del start, restored
    yield stage
    opening = stage.checks[0].held_out
    bearable = opening + _FAR * abs(opening)

    def far(check: Check) -> bool:
        return not check.held_out <= bearable  # as it is for nan

    made, clock = stage.checks[-1].step, time.perf_counter()
    if made < schedule.steps and not is_dry():
        rows = rows_of(order[0], read, schedule.batch_tokens)
        step.lower(job, frozen, read, stage.state, rows, np.float32(0)).compile()
        memory.return_scraps()  # what the compiler left, before the step needs memory of its own
    for first in range(made, schedule.steps, schedule.check_every):
        batches = [rows_of(some, read, schedule.batch_tokens) for some in order[first : first + schedule.check_every]]
        restarts = sum(map(far, stage.checks))
        some = zip(batches, planned[first : first + len(batches)] / 2**restarts, strict=True)
        state, losses = _steps(job, frozen, read, stage.state, enumerate(some, first + 1), watch)
        now, done = _cast(state.moved, dtypes), first + len(batches)
        latest = check(now, done, losses, stage.least, clock)
        best = now if latest.taken else stage.best
        del now
        if done < schedule.steps and far(latest):
            state.delete()
            state = begin(job, best)
        stage = Stage(state, best, (*stage.checks, latest))
        yield stage
        clock = time.perf_counter()


def _described(tree: Any) -> Any:
    """Describes arrays on devices, without holding them."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _number(array: jax.Array | None) -> Any:
    return None if array is None else float(array)


def _steps(
    job: Job,
    frozen: Frozen,
    read: Sequences,
    state: State,
    numbered: Iterable[tuple[int, tuple[np.ndarray, np.float32]]],
    watch: Callable[[int], None],
) -> tuple[State, tuple[float, ...]]:
    """Makes a step with each numbered batch and rate, which donates the state before it -> state, and losses."""
    losses = []
    for number, (rows, rate) in numbered:
        state, loss = step(job, frozen, read, state, rows, rate)
        losses.append(loss)
        losses[-2:][0].block_until_ready()  # the device has the next step to go on with meanwhile
        watch(number)
    return state, tuple(map(float, losses))


@program(static_argnames="dtypes")
def _cast(moved: Params, dtypes: tuple) -> Params:
    """Converts trained weights, which are in float32, to the data types that are measured and written."""
    leaves, tree = jax.tree.flatten(moved)
    # A copy even of the same type, since the steps donate the original.
    return tree.unflatten([jnp.copy(a.astype(dtype)) for a, dtype in zip(leaves, dtypes, strict=True)])


def _order(count: int, steps: int, sequences: int, seed: tuple[int, ...]) -> np.ndarray:
    """Returns the numbers of each step's sequences [steps, B]; all ``count`` are used once before any is reused."""
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(count) for _ in range(-(-steps * sequences // count))]
    return np.concatenate(passes)[: steps * sequences].reshape(steps, sequences)


def rows_of(numbers: np.ndarray, sequences: Sequences, batch_tokens: int) -> np.ndarray:
    """Divides numbers of sequences [B] evenly among the devices, in few passes of at most ``batch_tokens`` on each.

    Returns:
        [A, R] int32, as ``step`` takes them.
    """
    most = max(1, batch_tokens // sequences.tokens.shape[-1])
    shares, size = division(len(numbers), most, mesh.data_size())
    rows = np.full(shares * size, -1, np.int32)
    rows[: len(numbers)] = numbers
    return rows.reshape(-1, mesh.data_size() * size)
