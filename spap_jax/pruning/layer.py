"""One block's MLP: its channels chosen, its weights recovered."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spap_jax import baselines, devices
from spap_jax.baselines.compensation import lost_mean
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.registry import FAMILIES
from spap_jax.numerics import full_precision
from spap_jax.placement import placed
from spap_jax.pruning import moments, reduce
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.report import Errors, LayerReport
from spap_jax.pruning.streams import mlp_hidden
from spap_jax.settings import PruneSettings
from spap_jax.solver import alternating
from spap_jax.solver.alternating import Recovered, Schedule, Tokens, Weights
from spap_jax.solver.problem import System, equilibrate, refit
from spap_jax.solver.swap import Polished


class Clock:
    """Seconds since the last lap, by phase. A lap waits for what it is given, so that time lands where it was spent."""

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
    """The channels of a layer that stay.

    Attributes:
        channels: [k] their numbers; the swaps made, and those left that would improve.
        ridge: [] the relative ridge used.
        hidden_mean: [f] mean of every hidden channel.
    """

    channels: Polished
    ridge: jax.Array
    hidden_mean: jax.Array


def prune_layer(
    index: int,
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    calibration: Tokens,
    held_out: Tokens,
    settings: PruneSettings,
    clock: Clock,
    choice: Choice | None = None,
) -> tuple[Params, LayerReport]:
    """Prunes the MLP of one block.

    Args:
        index: Number of the layer; seeds its randomness together with ``settings.seed``.
        config: The dense decoder.
        narrow: The pruned one.
        layer: Parameters of one dense block.
        calibration: Tokens to fit.
        held_out: Tokens that only judge; may be empty.
        settings: How.
        clock: Where time is counted; the report takes its phases.
        choice: The channels to keep; chosen here, on what the tokens are in the pruned stream, where absent.

    Returns:
        The block's parameters with fewer channels, and the report.
    """
    key = jax.random.key(settings.seed)
    solved = _solve(config, narrow, layer, calibration, settings, choice, choice_key(key, config, index), clock)
    choice, selected, refitted = solved
    recovered = Recovered(refitted, jnp.int32(0))
    if baselines.update_used(settings) == "alternate":
        schedule = Schedule(settings.rounds, settings.steps, settings.step_tokens, settings.learning_rate)
        steps = jax.random.fold_in(key, index)
        recovered = _recover(narrow, schedule, layer, refitted, calibration, held_out, settings.ridge, steps)
    clock.lap("alternating", recovered)
    mlp = placed(narrow, {"mlp": reduce.to_mlp(recovered.weights, layer["mlp"])})["mlp"]
    stages = (selected, refitted, reduce.to_weights(mlp))
    errors = [_errors(narrow, layer, weights, calibration, held_out) for weights in stages]
    clock.lap("errors", errors)
    report = _report(index, choice, recovered, jax.device_get(errors), bool(held_out.total.size), clock)
    return layer | {"mlp": mlp}, report


def choice_key(key: jax.Array, config: DecoderConfig, index: int | jax.Array) -> jax.Array:
    """Randomness of a layer's choice; the first keys, one a layer, are for the steps of the alternating rounds."""
    return jax.random.fold_in(key, config.layers + index)


def _solve(
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    calibration: Tokens,
    settings: PruneSettings,
    choice: Choice | None,
    key: jax.Array,
    clock: Clock,
) -> tuple[Choice, Weights, Weights]:
    """The choice, the dense weights of the channels chosen and their update; the second moments end here."""
    if choice is None:
        seen = moments.accumulate(config, layer, calibration)
        clock.lap("statistics", seen)
        seen = devices.everywhere(seen)  # factorisations are not divided
        system, chosen = select(seen, key, narrow.intermediate, **search_of(settings))
        clock.lap("selection", chosen)
        solve = functools.partial(refit_weights, seen, system, chosen.channels.kept)
    else:
        chosen = choice
        solve = functools.partial(_closed_form, narrow, layer, calibration, choice.ridge)
    taken = reduce.take_channels(FAMILIES[config.family], layer["mlp"], chosen.channels.kept)
    taken = placed(narrow, {"mlp": reduce.with_biases(narrow, taken)})["mlp"]
    selected = updated = reduce.to_weights(taken)
    update = baselines.update_used(settings)
    if update in ("refit", "alternate"):
        updated = solve(selected)
    elif update == "bias":
        updated = _make_up_for_means(layer["mlp"]["down"], chosen, selected)
    clock.lap("refit", updated)
    return chosen, selected, updated


def search_of(settings: PruneSettings) -> dict[str, Any]:
    """What ``select`` takes of the settings."""
    s = settings
    return {
        "method": s.method,
        "ridge": s.ridge,
        "penalty": s.penalty,
        "steps": s.penalty_stages,
        "rounds": s.swap_rounds,
    }


@functools.partial(jax.jit, static_argnames=("keep", "method", "steps", "rounds"))
@full_precision
def select(
    seen: Moments, key: jax.Array, keep: int, method: str, ridge: float, penalty: float, steps: int, rounds: int
) -> tuple[System, Choice]:
    """Chooses the channels of a layer.

    Args:
        seen: Its moments, f channels.
        key: Randomness of the choice.
        keep: How many channels to keep, k; static.
        method: How; static.
        ridge: Least relative ridge of the system.
        penalty: As in the settings.
        steps: Steps of the penalty method; static.
        rounds: Rounds of swaps; static.
    """
    system = equilibrate(seen.problem, ridge)
    layer = baselines.Layer(seen.problem, system, seen.hidden_mean, seen.variance, key)
    chosen = baselines.select_channels(method, layer, keep, baselines.Search(penalty, steps, rounds))
    return system, Choice(chosen, system.ridge, seen.hidden_mean)


@jax.jit
@full_precision
def refit_weights(seen: Moments, system: System, kept: jax.Array, selected: Weights) -> Weights:
    """The output projection of the channels kept in closed form, and the bias that belongs to it.

    Args:
        seen: The layer's moments, f channels.
        system: Their system.
        kept: [k] channel numbers.
        selected: The dense weights of these channels.
    """
    down = refit(system, kept)
    bias = None if selected.bias is None else seen.target_mean - seen.hidden_mean[kept] @ down
    return Weights(selected.inner, down, bias)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def _closed_form(
    config: DecoderConfig, layer: Params, calibration: Tokens, ridge: jax.Array, selected: Weights
) -> Weights:
    """What ``refit_weights`` makes of moments of all channels, from the tokens and those of the channels kept."""
    return alternating.closed_form(functools.partial(hidden_channels, config, layer), selected, calibration, ridge)


@jax.jit
def _make_up_for_means(down: jax.Array, choice: Choice, selected: Weights) -> Weights:
    assert selected.bias is not None
    lost = lost_mean(down.astype(jnp.float32), choice.hidden_mean, choice.channels.kept)
    return selected._replace(bias=selected.bias + lost)


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
@full_precision
def _recover(config: DecoderConfig, schedule: Schedule, layer: Params, weights: Weights, calibration: Tokens,
             held_out: Tokens, ridge: float, key: jax.Array) -> Recovered:  # fmt: skip
    hidden = functools.partial(hidden_channels, config, layer)
    return alternating.recover(hidden, weights, calibration, held_out, schedule, ridge, key)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def _errors(config: DecoderConfig, layer: Params, weights: Weights, calibration: Tokens, held_out: Tokens):
    hidden = functools.partial(hidden_channels, config, layer)
    return [alternating.relative_error(hidden, weights, tokens) for tokens in (calibration, held_out)]


def hidden_channels(config: DecoderConfig, layer: Params, inner: alternating.Inner, residual: jax.Array) -> jax.Array:
    """What the hidden channels of a block's MLP are with other inner projections. residual: [..., d] -> [..., k]."""
    # The module declares its output projection too; nothing reads it here, and the compiler drops it.
    unused = {"down": jnp.zeros((config.intermediate, config.width))}
    unused |= {"down_bias": jnp.zeros(config.width)} if config.mlp_bias else {}
    return decoder.block(config, layer | {"mlp": inner | unused}, residual, method=mlp_hidden)


def _report(
    index: int, choice: Choice, recovered: Recovered, errors: list, has_held_out: bool, clock: Clock
) -> LayerReport:
    calibration, held_out = (Errors(*(float(stage[which]) for stage in errors)) for which in (0, 1))
    return LayerReport(
        layer=index,
        kept=tuple(choice.channels.kept.tolist()),
        calibration=calibration,
        held_out=held_out if has_held_out else None,
        swaps=int(choice.channels.swaps),
        improving_swaps=int(choice.channels.improving),
        ridge=float(choice.ridge),
        rounds=int(recovered.rounds),
        seconds=dict(clock.seconds),
    )
