"""Experimental ideas that are not built in: each changes one thing in the block-by-block pruning.

A method with an idea is requested like any other: ``--method "spap, low effort with idea=mixed_target"``. Without an
idea the procedure here is that of ``spap prune``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spap_jax as spap
from spap_jax.methods import update_used
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.registry import FAMILIES
from spap_jax.numerics import full_precision
from spap_jax.pruning import joint, moments, reduce, streams
from spap_jax.pruning.layer import (
    Fitting,
    PhaseClock,
    Solved,
    choice_key,
    choose_channels,
    error_by_moments,
    hidden_channels,
    layer_report,
    prune_layer,
    refit_weights,
    search_of,
)
from spap_jax.pruning.pipeline import rounds_pay
from spap_jax.pruning.predictions import get_layer
from spap_jax.pruning.run import resolve
from spap_jax.pruning.streams import Streams
from spap_jax.pruning.target import aim
from spap_jax.solver import alternating
from spap_jax.solver.alternating import MlpFunctions, RoundSchedule, Tokens, Weights
from spap_jax.solver.problem import equilibrate

IDEAS = {
    "dense_target": "an MLP is fitted to what the dense MLP adds to the dense stream, and does not repair what broke "
    "before it",
    "mixed_target": "an MLP is fitted to the mean of that target and the built-in one",
    "attention_refit": "the output projection of attention, with its bias, is solved for in closed form towards the "
    "dense stream, before the MLP that follows is pruned",
    "weighted": "the directions of a block's output are weighted by the second moments of the loss's gradient there, "
    "in the choice of channels and in the optimizer steps",
}
"""Description of each idea, by name."""

GRADIENT_SEQUENCES = 256
"""Calibration sequences from which the weight of each output direction is computed."""

EVERY_DIRECTION = 0.1
"""Weight added to every direction, relative to a mean of one, so that none is weighted with zero."""


class Metric(NamedTuple):
    """Square root of the weight of each output direction, and its inverse: [d, d], or stacked [L, d, d]."""

    root: jax.Array
    inverse: jax.Array


def check(settings: spap.PruneSettings) -> None:
    """Refuses settings that an idea would ignore.

    Raises:
        UserError: they request sampled text, an update other than steps, or options that are not the built-in defaults.
    """
    if settings.sampled:
        raise spap.UserError("ideas are tried without sampled text: leave it out.")
    if update_used(settings) != "alternate":
        raise spap.UserError("ideas are tried with steps on the weights: take a method that has them.")
    usual = spap.PruneSettings()
    for name in ("schedule", "allocation", "attention_sparsity"):
        if getattr(settings, name) != getattr(usual, name):
            raise spap.UserError(f"ideas are tried with {name}={getattr(usual, name)} alone.")


def prune(model: spap.Model, tokens: np.ndarray, settings: spap.PruneSettings, idea: str) -> spap.Model:
    """Prunes a model as ``spap.prune`` does, with one idea.

    Args:
        model: The dense model.
        tokens: Calibration token blocks [B, T].
        settings: Pruning settings; `check` defines which are accepted.
        idea: A key of `IDEAS`, or an empty string for none of them.

    Raises:
        UserError: as in `check`.
    """
    check(settings)
    config, outer = model.config, model.params
    run = resolve(config, outer, lambda index: get_layer(outer["layers"], index), tokens, settings)
    narrow, settings = run.narrow, run.settings
    metrics = output_metrics(config, outer, tokens[:GRADIENT_SEQUENCES]) if idea == "weighted" else None
    parts = run.fitted, run.held_out
    both = [streams.start(config, outer, part) for part in parts]
    layers, reports, entering = [], [], (None, None)
    for index in range(config.layers):
        if index == run.tail_start > 0:
            entering = both[0].pruned, both[1].pruned
        layer, metric = run.read_layer(index), metrics and Metric(*(a[index] for a in metrics))
        own = settings if rounds_pay(reports) else settings.replace(rounds=0)
        layer, solved, both = prune_block(index, config, narrow, layer, both, own, idea, metric)
        layers.append(layer)
        reports += [layer_report(index, solved, PhaseClock())] if solved else []
    if run.jointly:
        blocks = _stacked(layers[run.tail_start :])
        *_, last = joint.adjusted(run, blocks, (both[0].dense, both[1].dense), entering)
        layers[run.tail_start :] = (layer for _, layer in last.final)
    return spap.Model(narrow, outer | {"layers": _stacked(layers)}, model.source)


def _stacked(layers: list[Params]) -> Params:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def prune_block(
    index: int,
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    both: list[Streams],
    settings: spap.PruneSettings,
    idea: str,
    metric: Metric | None,
) -> tuple[Params, Solved | None, list[Streams]]:
    """Prunes one block and returns it with its record, unless it is weighted, and the streams after it."""
    both = [streams.enter_attention(config, layer, part) for part in both]
    if idea == "attention_refit":
        layer = with_attention_refitted(config, layer, streams.fitting_tokens(both[0]), settings.fit.ridge)
    fitted, judged, both = enter_mlp(config, layer, both, idea)
    if metric is None:
        layer, solved = prune_layer(index, config, narrow, layer, fitted, judged, settings, PhaseClock())
    else:
        solved = None
        layer = prune_weighted(index, config, narrow, layer, fitted, judged, settings, metric)
    del fitted, judged
    return layer, solved, [streams.leave_mlp(narrow, layer, part) for part in both]


def enter_mlp(
    config: DecoderConfig, layer: Params, both: list[Streams], idea: str
) -> tuple[Tokens, Tokens, list[Streams]]:
    """Advances from attention to the MLP; returns its fitting and its held-out tokens, and the streams there."""
    attended = [jnp.copy(part.dense) for part in both]
    both = [streams.leave_attention(config, layer, part) for part in both]
    found = []
    for before, part in zip(attended, both, strict=True):
        repairing, own = part.dense, part.pruned + (part.dense - before)
        total = {"dense_target": own, "mixed_target": (own + repairing) / 2}.get(idea)
        usual = streams.fitting_tokens(part)
        found.append(usual if total is None else Tokens(part.pruned, total, total - part.pruned, part.weights))
    return *found, both


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def with_attention_refitted(config: DecoderConfig, layer: Params, tokens: Tokens, ridge: float) -> Params:
    """Refits a block's attention output projection, and its bias if any, to map the pruned stream to the dense one."""
    attention = layer["attention"]
    seen = moments.accumulate_attention(config, layer, tokens)
    every = jnp.arange(len(seen.hidden_mean))
    start = Weights({}, seen.problem.weight, attention.get("o_bias"))
    weights = refit_weights(seen, equilibrate(seen.problem, ridge).ridge, every, start)
    bias = {} if weights.bias is None else {"o_bias": weights.bias}
    return layer | {"attention": attention | {"o": weights.down.reshape(attention["o"].shape)} | bias}


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def output_metrics(config: DecoderConfig, params: Params, tokens: jax.Array) -> Metric:
    """Computes for every block [L, d, d] the second moments of the loss gradient at its output. tokens: [B, T]."""
    positions, valid = streams.causal(tokens[:1])

    def loss(shifts: jax.Array, sequence: jax.Array) -> jax.Array:
        x = decoder.embed(config, params, sequence, positions, jnp.float32)

        def through(x: jax.Array, block: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
            return decoder.block(config, block[0], x, positions, valid) + block[1], None

        x, _ = jax.lax.scan(through, x, (params["layers"], shifts))
        logits = decoder.head(config, params, x)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, sequence[:, 1:]).sum()

    def add(total: jax.Array, sequence: jax.Array) -> tuple[jax.Array, None]:
        shifts = jnp.zeros((config.layers, *tokens[:1].shape, config.width))
        gradient = jax.grad(loss)(shifts, sequence[None])
        return total + jnp.einsum("lbti,lbtj->lij", gradient, gradient), None

    total, _ = jax.lax.scan(add, jnp.zeros((config.layers, config.width, config.width)), tokens)
    mean = jnp.trace(total, axis1=1, axis2=2)[:, None, None] / config.width
    values, vectors = jnp.linalg.eigh(total / mean)
    root = jnp.sqrt(jnp.maximum(values, 0) + EVERY_DIRECTION)[:, None, :]
    turned = jnp.swapaxes(vectors, 1, 2)
    return Metric((vectors * root) @ turned, (vectors / root) @ turned)


def prune_weighted(
    index: int,
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    fitted: Tokens,
    judged: Tokens,
    settings: spap.PruneSettings,
    metric: Metric,
) -> Params:
    """Prunes like ``prune_layer``, in output coordinates in which all directions have equal weight."""
    key = jax.random.key(settings.seed)
    seen = moments.accumulate(config, layer, fitted, settings.fit.correction)
    problem = seen.problem
    turned = problem._replace(cross=problem.cross @ metric.root, weight=problem.weight @ metric.root)
    seen = seen._replace(problem=turned, target_mean=seen.target_mean @ metric.root)
    choice = choose_channels(seen, choice_key(key, config, index), narrow.intermediate, **search_of(settings))
    kept = choice.channels.kept
    taken = reduce.to_weights(reduce.take_channels(FAMILIES[config.family], layer["mlp"], kept))
    weights = refit_weights(seen, choice.ridge, kept, taken)
    schedule = RoundSchedule(settings.rounds, settings.round_steps, settings.step_tokens, settings.learning_rate)
    steps = jax.random.fold_in(key, index)
    error = error_by_moments(seen, config.mlp_bias, kept, weights)
    block = Fitting(config, narrow, settings.fit.correction)
    weights = recover_weighted(block, schedule, layer, weights, error, fitted, judged, choice.ridge, steps, metric)
    return layer | {"mlp": reduce.to_mlp(weights, layer["mlp"])}


@functools.partial(jax.jit, static_argnames=("block", "schedule"))
@full_precision
def recover_weighted(
    block: Fitting,
    schedule: RoundSchedule,
    layer: Params,
    weights: Weights,
    error: jax.Array,
    fitted: Tokens,
    judged: Tokens,
    ridge: jax.Array,
    key: jax.Array,
    metric: Metric,
) -> Weights:
    """Runs the alternating rounds from weights [k, d] in those coordinates; returns weights in the model's own."""

    def target(tokens: Tokens) -> jax.Array:
        return aim(block.dense, layer, block.correction, tokens) @ metric.root

    mlp = MlpFunctions(functools.partial(hidden_channels, block.narrow, layer), target)
    found = alternating.recover(mlp, weights, error, fitted, judged, schedule, ridge, key).weights
    bias = None if found.bias is None else found.bias @ metric.inverse
    return Weights(found.inner, found.down @ metric.inverse, bias)
