"""Pruning of one block's MLP: selects its channels and recovers its weights."""

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spap_jax.errors import NotFiniteError, option
from spap_jax.models import FAMILIES, DecoderConfig, Params, decoder
from spap_jax.numerics import full_precision
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.pruning import moments, reduce
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.streams import mlp_hidden
from spap_jax.pruning.target import aim
from spap_jax.report.schema import Errors, LayerReport
from spap_jax.settings import PruneSettings
from spap_jax.solver import alternating, methods
from spap_jax.solver.alternating import Fitted, MlpFunctions, Recovered, RoundSchedule, Tokens, Weights
from spap_jax.solver.problem import equilibrate, refit, scaled
from spap_jax.solver.swap import Polished


class PhaseClock:
    """Time by phase, in seconds. A lap blocks until its result is ready, so that time counts for the right phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, result: object = None) -> None:
        """Adds the time since the last lap to a phase."""
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


class Choice(NamedTuple):
    """The channels of a layer that are kept.

    Attributes:
        channels: [k] their numbers; the swaps made, and the improving swaps left.
        ridge: [] the relative ridge used.
        hidden_mean: [f] mean of every hidden channel, on the stream that they were chosen on.
    """

    channels: Polished
    ridge: jax.Array
    hidden_mean: jax.Array


class Fitting(NamedTuple):
    """What a program that fits a layer is compiled for; hashable.

    Attributes:
        dense: The decoder before its MLPs are pruned.
        narrow: The pruned decoder.
        correction: Share of the errors of earlier blocks that the MLP also corrects.
    """

    dense: DecoderConfig
    narrow: DecoderConfig
    correction: float


def prune_layer(
    index: int,
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    calibration: Tokens,
    held_out: Tokens,
    settings: PruneSettings,
    clock: PhaseClock,
    choice: Choice | None = None,
) -> tuple[Params, LayerReport]:
    """Prunes the MLP of one block.

    Args:
        index: Number of the layer; seeds its randomness together with ``settings.seed``.
        config: The dense decoder.
        narrow: The pruned decoder.
        layer: Parameters of one dense block.
        calibration: Tokens to fit.
        held_out: Held-out tokens; may be empty.
        settings: The pruning settings.
        clock: Records the time by phase.
        choice: The channels to keep. By default they are selected here, on the pruned stream.

    Returns:
        The block's parameters with fewer channels, and the report, to which the caller adds the time.

    Raises:
        NotFiniteError: the activations overflow.
    """
    choice, stages, errors = _solve(index, config, narrow, layer, calibration, settings, clock, choice)
    clock.lap("refit", (stages, errors))
    judged = []
    if held_out.residual.size:
        given = (layer, held_out, settings.fit.correction, choice.channels.kept)
        judged = held_out_errors(config, *given, stages)
    clock.lap("errors", judged)
    block, rounds = Fitting(config, narrow, settings.fit.correction), jnp.int32(0)
    if methods.update_used(settings) == "alternate" and settings.rounds:
        assert settings.steps
        schedule = RoundSchedule(settings.rounds, settings.steps, settings.step_tokens, settings.learning_rate)
        steps = jax.random.fold_in(jax.random.key(settings.seed), index)
        before = errors[-1], judged[-1] if judged else jnp.float32(0)
        weights, rounds, error, on_held_out = _recover(
            block, schedule, layer, stages[-1], before, calibration, held_out, choice.ridge, steps
        )
        stages, errors = [*stages, weights], [*errors, error]
        judged = judged and [*judged, on_held_out]
    clock.lap("alternating", (stages, errors))
    if not all(map(math.isfinite, (errors[-1], *judged[-1:]))):
        raise NotFiniteError(
            f"the activations of layer {index} are not finite: they overflow in float32, and would again with these "
            "settings, so look whether the model computes what it should (spap eval); if it does, rounding left its "
            f"weights unsolvable, so give a larger {option('ridge')}."
        )
    mlp = shard_params(narrow, {"mlp": reduce.to_mlp(stages[-1], layer["mlp"])})["mlp"]
    report = LayerReport(
        layer=index,
        kept=tuple(choice.channels.kept.tolist()),
        calibration=stage_errors(errors),
        held_out=stage_errors(judged) if judged else None,
        swaps=int(choice.channels.swaps),
        improving_swaps=int(choice.channels.improving),
        ridge=float(choice.ridge),
        rounds=int(rounds),
        seconds={},
    )
    return layer | {"mlp": mlp}, report


def choice_key(key: jax.Array, config: DecoderConfig, index: int | jax.Array) -> jax.Array:
    """Derives the key of a layer's selection; the first L keys are reserved for the alternating rounds."""
    return jax.random.fold_in(key, config.layers + index)


def _solve(
    index: int,
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    calibration: Tokens,
    settings: PruneSettings,
    clock: PhaseClock,
    given: Choice | None,
) -> tuple[Choice, list[Weights], list[jax.Array]]:
    """Selects channels unless they are given; returns them, the dense weights and their update if any, and the errors.

    The moments are freed after. A refit of channels that are given needs the moments of these alone.
    """
    update, correction = methods.update_used(settings), settings.fit.correction
    refits = update in ("refit", "alternate")
    if given is not None and refits:
        dense = _dense_weights(config, narrow, layer, given)
        block = Fitting(config, narrow, correction)
        refitted, before, after = _closed_form(block, layer, calibration, given.ridge, dense)
        return given, [dense, refitted], [before, after]
    seen, choice = moments.accumulate(config, layer, calibration, correction), given
    if choice is None:
        clock.lap("statistics", seen)
        key = choice_key(jax.random.key(settings.seed), config, index)
        choice = mesh.replicate(choose_channels(seen, key, narrow.intermediate, **search_of(settings)))
        clock.lap("selection", choice)
    stages = [_dense_weights(config, narrow, layer, choice)]
    if refits:
        stages.append(refit_weights(seen, choice.ridge, choice.channels.kept, stages[0]))
    elif update == "bias":
        stages.append(_make_up_for_means(layer["mlp"]["down"], choice, stages[0]))
    errors = [error_by_moments(seen, config.mlp_bias, choice.channels.kept, weights) for weights in stages]
    return choice, stages, errors


def _dense_weights(config: DecoderConfig, narrow: DecoderConfig, layer: Params, choice: Choice) -> Weights:
    """Returns the dense weights of the chosen channels, with zeros for the biases that an update adds."""
    taken = reduce.take_channels(FAMILIES[config.family], layer["mlp"], choice.channels.kept)
    return reduce.to_weights(shard_params(narrow, {"mlp": reduce.with_biases(narrow, taken)})["mlp"])


def search_of(settings: PruneSettings) -> dict[str, Any]:
    """Returns the arguments of ``choose_channels`` that come from the settings."""
    s = settings
    return {
        "method": s.method,
        "ridge": s.fit.ridge,
        "penalty": s.penalty,
        "steps": s.penalty_stages,
        "rounds": s.swap_rounds,
    }


@functools.partial(jax.jit, static_argnames=("keep", "method", "steps", "rounds"))
@full_precision
def choose_channels(
    seen: Moments, key: jax.Array, keep: int, method: str, ridge: float, penalty: float, steps: int, rounds: int
) -> Choice:
    """Selects the channels of a layer.

    Args:
        seen: The layer's moments, f channels.
        key: Random key for the selection.
        keep: Number of channels to keep, k; static.
        method: Name of the method; static.
        ridge: Minimum relative ridge of the system.
        penalty: Penalty, as in the settings.
        steps: Steps of the penalty method; static.
        rounds: Rounds of swaps; static.
    """
    system = equilibrate(seen.problem, ridge)
    layer = methods.SelectorInputs(seen.problem, system, seen.hidden_mean, seen.variance, key)
    chosen = methods.select_channels(method, layer, keep, methods.Search(penalty, steps, rounds))
    return Choice(chosen, system.ridge, seen.hidden_mean)


@jax.jit
@full_precision
def refit_weights(seen: Moments, ridge: jax.Array, kept: jax.Array, selected: Weights) -> Weights:
    """Solves for the output projection of the kept channels in closed form, and the matching bias.

    Args:
        seen: The layer's moments, f channels.
        ridge: [] the relative ridge of the selection.
        kept: [k] channel numbers.
        selected: The dense weights of these channels.
    """
    down = mesh.divide_along_model(refit(scaled(seen.problem, ridge), kept), axis=0)
    bias = None if selected.bias is None else seen.target_mean - seen.hidden_mean[kept] @ down
    return Weights(selected.inner, down, bias)


@functools.partial(jax.jit, static_argnames="block")
@full_precision
def _closed_form(block: Fitting, layer: Params, calibration: Tokens, ridge: jax.Array, selected: Weights) -> Fitted:
    """Computes the result of ``refit_weights`` from the tokens and the moments of the kept channels alone."""
    return alternating.closed_form(_mlp(block, layer), selected, calibration, ridge)


error_by_moments = jax.jit(full_precision(moments.relative_error), static_argnames="centred")


@functools.partial(jax.jit, static_argnames=("config", "correction"))
@full_precision
def held_out_errors(
    config: DecoderConfig, layer: Params, tokens: Tokens, correction: float, kept: jax.Array, stages: list[Weights]
) -> list[jax.Array]:
    """Computes the relative errors, [] each, of output projections of the same dense channels on held-out tokens.

    For these few tokens, a pass takes less work than their moments would.

    Args:
        config: The dense decoder.
        layer: Parameters of the dense block.
        tokens: The tokens.
        correction: See ``target.aim``.
        kept: [k] channel numbers.
        stages: Weights of these channels.
    """

    def seen(chunk: Tokens) -> tuple[jax.Array, jax.Array]:
        hidden = decoder.block(config, layer, chunk.residual, method=mlp_hidden)
        return hidden, aim(config, layer, correction, chunk, hidden)

    def filled(down: jax.Array) -> jax.Array:
        return jnp.zeros((config.intermediate, config.width)).at[kept].set(down)

    return alternating.relative_errors(seen, [each._replace(down=filled(each.down)) for each in stages], tokens)


@jax.jit
@full_precision
def _make_up_for_means(down: jax.Array, choice: Choice, selected: Weights) -> Weights:
    """Adds the mean of what removed channels contributed to the output bias, as FLAP does (An et al. 2024).

    If the weights are unchanged and the target is the dense output on the same tokens, this bias minimises the error.
    The means are those of the stream that the channels were chosen on: in sequence the one that the previous pruned
    blocks produce; in the parallel schedule the dense one, as in FLAP. As there, the errors of earlier blocks are not
    corrected.
    """
    assert selected.bias is not None
    lost = choice.hidden_mean.at[choice.channels.kept].set(0) @ down.astype(jnp.float32)
    return selected._replace(bias=selected.bias + lost)


@functools.partial(jax.jit, static_argnames=("block", "schedule"))
@full_precision
def _recover(block: Fitting, schedule: RoundSchedule, layer: Params, start: Weights,
             errors: tuple[jax.Array, jax.Array], calibration: Tokens, held_out: Tokens, ridge: jax.Array,
             key: jax.Array) -> Recovered:  # fmt: skip
    return alternating.recover(_mlp(block, layer), start, errors, calibration, held_out, schedule, ridge, key)


def _mlp(block: Fitting, layer: Params) -> MlpFunctions:
    hidden = functools.partial(hidden_channels, block.narrow, layer)
    return MlpFunctions(hidden, functools.partial(aim, block.dense, layer, block.correction))


def hidden_channels(config: DecoderConfig, layer: Params, inner: alternating.Inner, residual: jax.Array) -> jax.Array:
    """Computes a block's hidden MLP channels with the given inner projections. residual: [..., d] -> [..., k]."""
    return decoder.block(config, layer | {"mlp": inner}, residual, method=mlp_hidden)


def stage_errors(stages: list[jax.Array]) -> Errors:
    """Returns the errors of all three stages; those that did not change the weights have the error of the last."""
    return Errors(*map(float, [*stages, *[stages[-1]] * (3 - len(stages))]))
