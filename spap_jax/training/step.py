"""One optimizer step, and the measurement on held-out sequences: the programs of the loop.

Sequences are mapped over a leading axis D of devices. The compiler partitions the products with weights, which are
sharded over all devices (``placement.fully_shard_params``); those of one block are gathered when its turn comes, and
again in the backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spap_jax.models import DecoderConfig, Params, decoder, loss
from spap_jax.models.blocks import attention_kind, over_blocks
from spap_jax.models.loss import Predictor, Target, counted_predictions, loss_sum, next_tokens
from spap_jax.numerics import forward_precision, in_float32
from spap_jax.parallel import collectives, mesh
from spap_jax.parallel.placement import fully_shard_params, gather_params
from spap_jax.parallel.program import program
from spap_jax.parallel.sequences import Sequences
from spap_jax.training import lora


class Recipe(NamedTuple):
    """An optimizer as a hashable value: the function that makes it, and its arguments."""

    make: Callable[..., optax.GradientTransformation]
    arguments: tuple


class Job(NamedTuple):
    """What a program is compiled for; hashable.

    Attributes:
        recipe: The optimizer; None for a measurement, whose program is then that of any steps.
        dtype: Data type of matrices and activations in the steps; norms and softmax are float32.
        scale: Factor of low-rank updates.
        teacher: The decoder whose predictions are computed as the target; None if they are those of
            ``Sequences.target``, or if the next token is the target.
        text_weight: Weight of the next token beside the predictions that are the target; see ``loss.Target``.
    """

    config: DecoderConfig
    recipe: Recipe | None
    dtype: str
    scale: float = 1.0
    teacher: DecoderConfig | None = None
    text_weight: float = 0.0

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        assert self.recipe
        return self.recipe.make(*self.recipe.arguments)


class Frozen(NamedTuple):
    """Weights that are not trained.

    Attributes:
        params: The parameter tree; parts that are trained in all blocks may be absent.
        teacher: The teacher's parameter tree; None without a teacher.
    """

    params: Params
    teacher: Params | None = None


class State(NamedTuple):
    """State between two steps.

    Attributes:
        moved: The trained weights in float32: parts of the parameter tree, or low-rank updates (`lora`) under
            "updates".
    """

    moved: Params
    optimizer: Any

    def delete(self) -> None:
        """Frees the memory of the arrays, which nothing may use any more."""
        for array in jax.tree.leaves(self):
            array.delete()


class Measurement(NamedTuple):
    """Means over the predictions that count, [] each, on the devices or as numbers.

    Attributes:
        loss: KL(teacher || model) in nats; without a teacher or target, the loss of the next token.
        agreement: Fraction of the predictions whose most likely token is the teacher's; None without a teacher.
    """

    loss: Any
    agreement: Any = None


@program(static_argnames="job")
def begin(job: Job, moved: Params) -> State:
    """Returns the state before the first step; that of the optimizer is sharded as the weights it belongs to."""
    weights = jax.tree.map(lambda a: jnp.copy(a.astype(jnp.float32)), moved)  # a copy, since the steps donate it
    moments = jax.tree.map(
        lambda part: fully_shard_params(job.config, part) if isinstance(part, dict) else part,
        job.optimizer().init(weights),
        is_leaf=lambda part: isinstance(part, dict),
    )
    return State(fully_shard_params(job.config, weights), moments)


@program(static_argnames="job", donate_argnames="state")
def step(
    job: Job, frozen: Frozen, sequences: Sequences, state: State, rows: jax.Array, rate: jax.Array
) -> tuple[State, jax.Array]:
    """Makes one step, and returns the new state and the mean loss [] before it, in nats per prediction.

    Matrix products have the device's default precision. The state before is donated.

    Args:
        rows: [A, R] numbers of sequences in passes that are computed one after the other; each device has R / D of
            every pass. -1 fills up a pass.
    """

    def sums(rows: jax.Array) -> tuple[jax.Array, Params]:
        def total(moved: Params) -> jax.Array:
            return _sum(job, frozen, sequences, moved, rows, job.dtype)

        return spread(jax.value_and_grad(total)(state.moved))

    def spread(sums: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        return sums[0], fully_shard_params(job.config, sums[1])

    def add(total: Any, rows: jax.Array) -> tuple[Any, None]:
        return spread(jax.tree.map(jnp.add, total, sums(rows))), None

    if len(rows) == 1:  # nothing to add, for which zeros would be written and read
        total = sums(rows[0])
    else:
        total = jax.lax.scan(add, spread((jnp.float32(0), jax.tree.map(jnp.zeros_like, state.moved))), rows)[0]
    value, gradient = jax.tree.map(lambda a: a / _predictions(sequences, rows), total)
    updates, optimized = job.optimizer().update(gradient, state.optimizer, state.moved)
    moved = jax.tree.map(lambda weights, update: weights - rate * update, state.moved, updates)
    return State(fully_shard_params(job.config, moved), optimized), value


@program(static_argnames="job")
@forward_precision
def measure(job: Job, frozen: Frozen, sequences: Sequences, moved: Params, rows: jax.Array) -> Measurement:
    """Measures weights in the data type in which they are written, with activations in float32; see `step`."""
    targeted = job.teacher is not None or sequences.target is not None

    def add(total: Any, rows: jax.Array) -> tuple[Any, None]:
        found = _sum(job, frozen, sequences, moved, rows, jnp.float32, measured=True)
        return jax.tree.map(jnp.add, total, found), None

    zeros = loss.Comparison(*jnp.zeros(4)) if targeted else jnp.float32(0)
    total = jax.lax.scan(add, zeros, rows)[0]
    mean = jax.tree.map(lambda a: a / _predictions(sequences, rows), total)
    return Measurement(mean.divergence, mean.agreement) if targeted else Measurement(mean)


def _predictions(sequences: Sequences, rows: jax.Array) -> jax.Array:
    """Returns the number of predictions of the sequences with numbers ``rows`` that count; 1 if none does."""
    tokens, mask = sequences.tokens, sequences.mask
    if mask is None:
        return jnp.maximum(1, (rows >= 0).sum() * (tokens.shape[-1] - 1))
    each = (mask[..., 1:] > 0).sum(axis=-1).reshape(-1)
    return jnp.maximum(1, jnp.where(rows >= 0, each[rows], 0).sum())


def _sum(
    job: Job, frozen: Frozen, sequences: Sequences, moved: Params, rows: jax.Array, dtype: Any, measured: bool = False
) -> Any:
    """Sums the losses of one pass [R], or all that is measured of them (``loss.Comparison``, if there is a target)."""
    outside = _outside(job.config, frozen.params, moved, dtype)
    taught = None
    if job.teacher is not None and frozen.teacher is not None:
        taught = Predictor(job.teacher, _outside(job.teacher, frozen.teacher, {}, dtype))

    def one(drawn: Sequences, counted: jax.Array) -> Any:
        last = _last_stream(job, frozen.params, moved, outside, drawn, dtype, merged=measured)
        own, target = Predictor(job.config, outside), None
        if drawn.target is not None:
            target = Target(own, drawn.target, job.text_weight)
        elif taught is not None and frozen.teacher is not None:
            teaching = Job(taught.config, None, job.dtype)
            plain = drawn._replace(entering=None)
            target = Target(taught, _last_stream(teaching, frozen.teacher, {}, taught.params, plain, dtype))
            target = target._replace(text_weight=job.text_weight)
        following = next_tokens(drawn.tokens)
        counts = counted_predictions(drawn.tokens, drawn.mask) * counted[:, None]
        if measured and target is not None:
            return loss.compare(own, last, following, counts, target)
        return loss_sum(own, last, following, counts, target)

    places = jnp.unravel_index(jnp.maximum(rows, 0), sequences.tokens.shape[:2])
    arrays: Any = collectives.take_from_chunks(sequences._replace(real=None), places)  # type: ignore[arg-type]
    drawn = arrays._replace(entering=in_float32(arrays.entering), target=in_float32(arrays.target))
    by_device = jax.tree.map(lambda a: a.reshape(mesh.data_size(), -1, *a.shape[1:]), (drawn, rows >= 0))
    return jax.tree.map(lambda a: a.sum(), collectives.vmap_over_data(one, *by_device))


def _outside(config: DecoderConfig, frozen: Params, moved: Params, dtype: Any) -> Params:
    """Gathers the weights outside the blocks, matrices in ``dtype``, and the embedding separately if it is no head."""
    parts = {name: (moved if name in moved else frozen)[name] for name in ("embed", "head")}
    whole = gather_params(config, parts, dtype)
    if "embed" in moved:  # gradients are summed over groups of tokens and over devices: in float32
        whole = jax.tree.map(lambda a: a.astype(jnp.float32), whole)
    apart = {} if config.tied else {"tokens": parts["embed"]["tokens"]}
    return whole | {"embed": whole["embed"] | apart}


def _last_stream(
    job: Job, frozen: Params, moved: Params, outside: Params, drawn: Sequences, dtype: Any, merged: bool = False
) -> jax.Array:
    """Computes the stream after the last block, [B, T, d], of sequences [B, T]; ``merged`` updates have no gradient."""
    positions = decoder.positions_in(drawn.tokens.shape)

    def step(config: DecoderConfig, x: jax.Array, layer: Params, number: Any) -> jax.Array:
        x = mesh.constrain_replicated(x)
        updates = layer.pop("updates", {})
        if merged and updates:
            layer, updates = lora.merged(layer, gather_params(config, updates, jnp.float32), job.scale), {}
        layer = gather_params(config, layer, dtype)
        updates = lora.scaled(gather_params(config, updates, dtype), job.scale)
        kind = attention_kind(config, number)
        return mesh.constrain_replicated(decoder.block(config, layer, x, positions, None, kind, updates=updates))

    x = drawn.entering
    x = decoder.embed(job.config, outside, drawn.tokens, positions, dtype) if x is None else x.astype(dtype)
    layers = frozen.get("layers", {})
    moving = moved.get("layers", {}) | {name: moved[name] for name in ("updates",) if name in moved}
    return over_blocks(
        job.config,
        step,
        mesh.constrain_replicated(x),
        {**layers, **moving} if merged else layers,
        {} if merged else moving,
        checkpoint=jax.checkpoint,
        # What is kept for the backward pass is the stream between blocks, which is divided.
        held=functools.partial(mesh.divide_along_model, axis=1),
    )
