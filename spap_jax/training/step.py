"""One optimizer step, and the measurement on held-out sequences: the programs of the engine.

Sequences are spread over the devices by a leading axis D that is mapped over, so that each device runs the program of a
single one. The compiler partitions the products with weights, which are sharded over all devices
(``placement.fully_shard_params``).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spap_jax.models import DecoderConfig, Params
from spap_jax.numerics import full_precision, in_float32
from spap_jax.parallel import collectives, mesh
from spap_jax.parallel.placement import fully_shard_params, gather_params
from spap_jax.settings import Remat
from spap_jax.training.forward import Student, last_stream, outer
from spap_jax.training.objective import Predictor, Wanted, loss_sum, next_tokens
from spap_jax.training.shortlist import shortened


class Recipe(NamedTuple):
    """An optimizer as a hashable value: the function that makes it, and its arguments."""

    make: Callable[..., optax.GradientTransformation]
    arguments: tuple


class Job(NamedTuple):
    """What a program is compiled for; hashable.

    Attributes:
        config: The decoder whose weights move.
        recipe: The optimizer; None for a measurement, whose program is then that of any steps.
        dtype: Data type of matrices and activations in the steps.
        first: First block of those whose weights move.
        scale: Factor of low-rank updates.
        teacher: The decoder whose predictions are computed as the target; None if they are kept, or if the next token
            is the target.
        remat: What a block keeps for its backward pass; see ``forward.REMAT``.
        text_weight: Weight of the next token beside the predictions that are the target; see ``objective.Wanted``.
        measured_every: Distance of the tokens at which a measurement makes predictions, from a sequence's first on.
    """

    config: DecoderConfig
    recipe: Recipe | None
    dtype: str
    first: int = 0
    scale: float = 1.0
    teacher: DecoderConfig | None = None
    remat: Remat = "full"
    text_weight: float = 0.0
    measured_every: int = 1

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        assert self.recipe
        return self.recipe.make(*self.recipe.arguments)


class Sequences(NamedTuple):
    """Sequences in chunks, sharded along ``data`` if the chunks can be divided evenly.

    Attributes:
        tokens: [C, B, T] token ids.
        kept: [C, B, T, d] the dense model's last stream, whose predictions are the target; None if it is not kept.
        mask: [C, B, T] 1 on the tokens whose predictions count, else 0; None if all count.
        entering: [C, B, T, d] the stream before the first block; None if that is of the embedded tokens.
        places: [C, B, T] places of the tokens on the shortlist (``shortlist``); the mask leaves out tokens that are not
            among its frequent ones. None if the logits are those of the whole vocabulary.
    """

    tokens: jax.Array
    kept: jax.Array | None = None
    mask: jax.Array | None = None
    entering: jax.Array | None = None
    places: jax.Array | None = None


class Given(NamedTuple):
    """Arrays that the steps read.

    Attributes:
        frozen: The parameter tree; see ``forward.Student``.
        guide: The teacher's parameter tree; None without a teacher.
        sequences: The sequences to draw from.
        real: Number of those that are no padding, which comes last.
        short: What makes the logits of the shortlist, see ``shortlist.shortened_head``, and under "others" what is
            added to them. None if the logits are those of the whole vocabulary.
    """

    frozen: Params
    guide: Params | None
    sequences: Sequences
    real: int
    short: Params | None = None


class Minibatch(NamedTuple):
    """The sequences of a step or a measurement, in passes that are computed one after the other.

    Attributes:
        rows: [A, R] numbers of sequences; each device has R / D of every pass.
        counted: [A, R] 1, or 0 for what only fills up a pass.
    """

    rows: Any
    counted: Any


class State(NamedTuple):
    """State between two steps.

    Attributes:
        moved: The moving weights in float32.
        optimizer: The optimizer state.
    """

    moved: Params
    optimizer: Any

    def delete(self) -> None:
        """Frees the memory of the arrays, which nothing may use any more."""
        for array in jax.tree.leaves(self):
            array.delete()


def begin(job: Job, moved: Params) -> State:
    """Returns the state before the first step; that of the optimizer is sharded as the weights it belongs to."""
    moved = _in_float32(moved)
    return State(moved, jax.tree.map(lambda a: a if a.ndim else mesh.replicate(a), job.optimizer().init(moved)))


@jax.jit
def _in_float32(tree: Params) -> Params:
    return jax.tree.map(lambda a: jnp.copy(a.astype(jnp.float32)), tree)  # a copy, since the steps donate it


@functools.partial(jax.jit, static_argnames="job", donate_argnames="state")
def step(job: Job, given: Given, state: State, batch: Minibatch, rate: jax.Array) -> tuple[State, jax.Array]:
    """Makes one step of a learning rate [], and returns the new state and the mean loss [] before it.

    The loss is in nats per prediction. Matrix products have the device's default precision.
    """

    def sums(now: Minibatch) -> tuple[jax.Array, Params]:
        return jax.value_and_grad(lambda moved: _loss_sum(job, given, moved, now, job.dtype))(state.moved)

    def add(total: Any, now: Minibatch) -> tuple[Any, None]:
        return _spread(job, jax.tree.map(jnp.add, total, sums(now))), None

    if len(batch.rows) == 1:  # nothing to add, for which zeros would be written and read
        total = _spread(job, sums(jax.tree.map(lambda a: a[0], batch)))
    else:
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.moved))
        total = jax.lax.scan(add, _spread(job, zeros), batch)[0]
    value, gradient = jax.tree.map(lambda a: a / _predictions(given, batch), total)
    updates, optimized = job.optimizer().update(gradient, state.optimizer, state.moved)
    moved = jax.tree.map(lambda weights, update: weights - rate * update, state.moved, updates)
    return State(fully_shard_params(job.config, moved), optimized), value


@functools.partial(jax.jit, static_argnames="job")
@full_precision
def measure(job: Job, given: Given, moved: Params, batch: Minibatch) -> jax.Array:
    """Computes the mean loss [] in nats per prediction, in float32 at full precision."""

    every = job.measured_every

    def add(total: jax.Array, now: Minibatch) -> tuple[jax.Array, None]:
        return total + _loss_sum(job, given, moved, now, jnp.float32, every, merged=True), None

    return jax.lax.scan(add, jnp.float32(0), batch)[0] / _predictions(given, batch, every)


def text_loss(student: Student, text: Sequences) -> jax.Array:
    """Computes the mean next-token loss [] of sequences [B, T], in nats per prediction."""
    outside = outer(student, jnp.float32)
    last = last_stream(student, outside, text.tokens, jnp.float32)
    counts = counted_predictions(text)
    return loss_sum(Predictor(student.config, outside), last, next_tokens(text.tokens), counts) / counts.sum()


def counted_predictions(sequences: Sequences) -> jax.Array:
    """Returns which predictions of sequences [B, T] count: those of the mask's tokens, or of all but the first."""
    tokens, mask = sequences.tokens, sequences.mask
    after = jnp.ones_like(tokens[:, 1:], bool) if mask is None else mask[:, 1:] > 0
    return jnp.pad(after, [(0, 0), (0, 1)])


def _spread(job: Job, sums: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
    return sums[0], fully_shard_params(job.config, sums[1])


def _predictions(given: Given, batch: Minibatch, every: int = 1) -> jax.Array:
    """Number of predictions of a batch that count, of those at every ``every``-th token; 1 if none does."""
    tokens, mask = given.sequences.tokens, given.sequences.mask
    if mask is None:
        return jnp.maximum(1, batch.counted.sum() * len(range(0, tokens.shape[-1] - 1, every)))
    each = (mask[..., 1::every] > 0).sum(axis=-1).reshape(-1)
    return jnp.maximum(1, (batch.counted * each[batch.rows]).sum())


def _loss_sum(
    job: Job, given: Given, moved: Params, now: Minibatch, dtype: Any, every: int = 1, merged: bool = False
) -> jax.Array:
    """Sums the losses of one pass [R], those of the predictions at every ``every``-th token."""
    student = Student(job.config, given.frozen, moved, job.first, job.scale, job.remat)
    outside = outer(student, dtype, predicts=given.short is None)
    own = Predictor(job.config, outside) if given.short is None else _among_few(job.config, given.short, dtype)
    teacher = None if job.teacher is None or given.guide is None else Student(job.teacher, given.guide, {})
    taught = None if teacher is None else outer(teacher, dtype)

    def one(drawn: Sequences, counted: jax.Array) -> jax.Array:
        last = last_stream(student, outside, drawn.tokens, dtype, merged, drawn.entering)
        following = next_tokens(drawn.tokens if drawn.places is None else drawn.places)
        wanted = None
        if drawn.kept is not None:
            wanted = Wanted(own, drawn.kept, job.text_weight)
        elif teacher is not None and taught is not None:
            stream = last_stream(teacher, taught, drawn.tokens, dtype)
            wanted = Wanted(Predictor(teacher.config, taught), stream, job.text_weight)
        counts = counted_predictions(drawn) * counted[:, None]
        last, following, counts = (a[:, ::every] for a in (last, following, counts))
        wanted = wanted and wanted._replace(stream=wanted.stream[:, ::every])
        return loss_sum(own, last, following, counts, wanted)

    places = jnp.unravel_index(now.rows, given.sequences.tokens.shape[:2])
    drawn = collectives.take_large_from_chunks(given.sequences, places)
    drawn = drawn._replace(kept=in_float32(drawn.kept), entering=in_float32(drawn.entering))
    return collectives.vmap_over_data(one, *jax.tree.map(_by_device, (drawn, now.counted))).sum()


def _among_few(config: DecoderConfig, short: Params, dtype: Any) -> Predictor:
    """Gathers what makes the logits of the shortlist."""
    others, weights = short["others"], {name: part for name, part in short.items() if name != "others"}
    return Predictor(shortened(config, len(others)), gather_params(config, weights, dtype) | {"others": others})


def _by_device(rows: jax.Array) -> jax.Array:
    """Reshapes sequences [R, ...] to [D, R / D, ...]."""
    return rows.reshape(mesh.data_size(), -1, *rows.shape[1:])
