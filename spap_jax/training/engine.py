"""The loop of the engine: some steps, then a measurement on held-out sequences, and the best weights are kept.

If the loss is then far above that before any step, the steps were too large: they start again from the best weights,
half as large.

It minimises what is lost against a dense model, or the next-token loss, over a part of a model's weights. Each stage is
the complete state of a run, from which another process can go on to the same bits.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import memory
from spap_jax.models import Params
from spap_jax.parallel import mesh
from spap_jax.parallel.sequences import division
from spap_jax.report.schema import Check
from spap_jax.training.optimizers import rates
from spap_jax.training.step import Given, Job, Minibatch, State, begin, measure, step

Parts = dict[str, dict[str, Any]]
"""What the devices of a process hold of the arrays of a tree, by their number, on these or on the host; see
``mesh.parts_of``."""


_FAR = 0.5
"""How much the loss may rise above that before any step, relative to it. Steps that are good in the end often raise it
in the beginning, when they are largest."""


class StepSchedule(NamedTuple):
    """How many steps are made, on what.

    Attributes:
        steps: Number of steps.
        rate: Their highest learning rate.
        sequences: Sequences in a step; devices without one of their own are idle.
        check_every: Number of steps between two measurements.
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
        waiting: The moving weights with the lowest loss so far, as they will be written, on the host.
        like: Describes them as arrays on the devices.
        checks: All measurements so far.
    """

    state: State
    waiting: Parts
    like: Params
    checks: tuple[Check, ...]

    @property
    def best(self) -> Params:
        """The moving weights with the lowest loss so far, brought to the devices anew."""
        return from_host(dict(self.waiting), self.like)

    def parts(self) -> dict[str, Parts]:
        """Returns what this process's devices hold of the stage; the state's are on them still, see `state`."""
        return {"state": parts_of(self.state), "best": self.waiting}

    def with_parts(self, parts: dict[str, Parts], checks: tuple[Check, ...]) -> "Stage":
        """Returns a stage of the same run, of which each process gives its own parts; takes the state's out of them."""
        return Stage(from_host(parts["state"], self.state), parts["best"], self.like, checks)

    @property
    def least(self) -> float:
        """The lowest loss so far, that of the best weights."""
        return min(check.held_out for check in self.checks if check.taken)


StoredStage = tuple[Callable[[], dict[str, Parts]], tuple[Check, ...]]
"""The stored state of a run: a function that reads the parts of its last stage, and its checks."""


def stages(
    job: Job,
    given: Given,
    judged: Given,
    start: Params,
    schedule: StepSchedule,
    before: tuple[Check, ...] = (),
    begun: StoredStage | None = None,
    watch: Callable[[int], None] | None = None,
) -> Iterator[Stage]:
    """Makes all steps.

    Args:
        job: What the programs are compiled for.
        given: What the steps read.
        judged: What the measurements read.
        start: The moving weights, as they are written; placed by ``placement.fully_shard_params``.
        schedule: Number and size of the steps.
        before: Measurements of earlier steps on other weights of this model; ``start`` is the best of them.
        begun: The last stage of an interrupted run with the same arguments.
        watch: Called after every step with the number of steps made, those of ``before`` included.

    Yields:
        The stage at the start, unless there were steps before, or the one of the interrupted run; then one after every
        ``check_every`` steps.
    """
    last = before[-1] if before else Check(0, 0, (), float("nan"), True, 0.0)
    order = _order(given.real, schedule.steps, schedule.sequences, schedule.seed)
    planned = rates(schedule.rate, schedule.steps)
    held_out = batch_of(np.arange(judged.real), judged, schedule.batch_tokens)
    tokens = schedule.sequences * given.sequences.tokens.shape[-1]

    reported = before and begun is None
    stage = _resumed(job, start, begun) if begun else _opening(job, judged, start, held_out, before)
    like, dtypes = stage.like, tuple(array.dtype for array in jax.tree.leaves(stage.like))
    del start
    if not reported:
        yield stage
    opening = min(check.held_out for check in stage.checks if check.taken and check.step <= last.step)
    bearable = opening + _FAR * abs(opening)

    def far(check: Check) -> bool:
        return not check.held_out <= bearable  # as it is for nan

    made = stage.checks[-1].step - last.step
    clock = time.perf_counter()  # the first measurement's time includes the largest compilation
    if made < schedule.steps:
        step.lower(job, given, stage.state, batch_of(order[0], given, schedule.batch_tokens), np.float32(0)).compile()
        memory.return_scraps()  # what the compiler left, before the step needs memory of its own
    for start_at in range(made, schedule.steps, schedule.check_every):
        rows = order[start_at : start_at + schedule.check_every]
        batches = (batch_of(some, given, schedule.batch_tokens) for some in rows)
        restarts = sum(far(check) for check in stage.checks if check.step > last.step)
        each = zip(batches, planned[start_at : start_at + len(rows)] / 2**restarts, strict=True)
        state, losses = _steps(job, given, stage.state, enumerate(each, last.step + start_at + 1), watch)
        now = _cast(state.moved, dtypes)
        found = float(measure(job._replace(recipe=None), judged, now, held_out))
        taken = found < stage.least  # not if nan
        done = start_at + len(rows)
        seconds = time.perf_counter() - clock
        check = Check(last.step + done, last.tokens + done * tokens, losses, found, taken, seconds)
        waiting = to_host(now) if taken else stage.waiting  # on the host
        del now
        if done < schedule.steps and far(check):
            state.delete()
            state = begin(job, from_host(dict(waiting), like))
        stage = Stage(state, waiting, like, (*stage.checks, check))
        yield stage
        clock = time.perf_counter()


def _opening(job: Job, judged: Given, start: Params, held_out: Minibatch, before: tuple[Check, ...]) -> Stage:
    """Returns the stage before the first step; its loss is measured unless earlier steps ended with it."""
    if not before:
        clock = time.perf_counter()
        loss = float(measure(job._replace(recipe=None), judged, start, held_out))
        before = (Check(0, 0, (), loss, True, time.perf_counter() - clock),)
    return Stage(begin(job, start), to_host(start), described(start), before)


def _resumed(job: Job, start: Params, begun: StoredStage) -> Stage:
    """Returns the stage that an interrupted run of the same job stored."""
    read, checks = begun
    return Stage(described(begin(job, start)), {}, described(start), ()).with_parts(read(), checks)


def _steps(
    job: Job,
    given: Given,
    state: State,
    numbered: Iterable[tuple[int, tuple[Minibatch, np.float32]]],
    watch: Callable[[int], None] | None,
) -> tuple[State, tuple[float, ...]]:
    """Makes a step with each numbered batch and learning rate, and returns the new state and the losses.

    Each step donates the state before it.
    """
    losses = []
    for number, (batch, rate) in numbered:
        state, loss = step(job, given, state, batch, rate)
        losses.append(loss)
        losses[-2:][0].block_until_ready()  # the device has the next step to go on with meanwhile
        if watch:
            watch(number)
    return state, tuple(map(float, losses))


@functools.partial(jax.jit, static_argnames="dtypes")
def _cast(moved: Params, dtypes: tuple) -> Params:
    """Converts moving weights, which are in float32, to the data types that are measured and written."""
    leaves, tree = jax.tree.flatten(moved)
    # A copy even of the same type, since the steps donate the original.
    return tree.unflatten([jnp.copy(a.astype(dtype)) for a, dtype in zip(leaves, dtypes, strict=True)])


def described(tree: Any) -> Any:
    """Describes arrays on devices, without holding them."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def parts_of(tree: Any) -> Parts:
    """Returns what this process's devices hold of the arrays of a tree."""
    return {str(number): mesh.parts_of(array) for number, array in enumerate(jax.tree.leaves(tree))}


def to_host(tree: Any) -> Parts:
    """Copies what this process's devices hold of the arrays of a tree to the host."""
    return jax.device_get(parts_of(tree))


def from_host(parts: Parts, like: Any) -> Any:
    """Inverts `to_host`, with the shapes and shardings of the arrays of another tree, and takes the parts out."""
    arrays, tree = jax.tree.flatten(like)
    return tree.unflatten([mesh.from_parts(parts.pop(str(number), {}), array) for number, array in enumerate(arrays)])


def _order(count: int, steps: int, sequences: int, seed: tuple[int, ...]) -> np.ndarray:
    """Returns the numbers of each step's sequences [steps, B]; all ``count`` are used once before any is reused."""
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(count) for _ in range(-(-steps * sequences // count))]
    return np.concatenate(passes)[: steps * sequences].reshape(steps, sequences)


def batch_of(rows: np.ndarray, given: Given, batch_tokens: int) -> Minibatch:
    """Divides sequences [B] evenly among the devices, in few passes of at most ``batch_tokens`` tokens on each."""
    most = max(1, batch_tokens // given.sequences.tokens.shape[-1])
    shares, size = division(len(rows), most, mesh.data_size())
    filled = np.arange(shares * size)
    counted = (filled < len(rows)).astype(np.float32)
    rows = rows[np.minimum(filled, len(rows) - 1)].astype(np.int32)
    together = mesh.data_size() * size
    return Minibatch(rows.reshape(-1, together), counted.reshape(-1, together))
