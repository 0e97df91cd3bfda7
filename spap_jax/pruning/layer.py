"""One block's MLP: its channels chosen, its weights recovered."""

import functools
import time

import jax
import jax.numpy as jnp

from spap_jax import baselines
from spap_jax.baselines.compensation import lost_mean
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.registry import FAMILIES
from spap_jax.numerics import full_precision
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


def prune_layer(
    index: int,
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    calibration: Tokens,
    held_out: Tokens,
    settings: PruneSettings,
    clock: Clock,
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

    Returns:
        The block's parameters with fewer channels, and the report.
    """
    update = baselines.update_used(settings)
    # The layers' first keys are for the steps of the alternating rounds, the next ones for the choices.
    steps_key, choice_key = (
        jax.random.fold_in(jax.random.key(settings.seed), number) for number in (index, config.layers + index)
    )
    chosen, ridge, selected, refitted = _solve(config, narrow, layer, calibration, settings, choice_key, clock)
    recovered = Recovered(refitted, jnp.int32(0))
    if update == "alternate":
        schedule = Schedule(settings.rounds, settings.steps, settings.step_tokens, settings.learning_rate)
        recovered = _recover(narrow, schedule, layer, refitted, calibration, held_out, settings.ridge, steps_key)
    clock.lap("alternating", recovered)
    mlp = reduce.to_mlp(recovered.weights, layer["mlp"])
    stages = (selected, refitted, reduce.to_weights(mlp))
    errors = [_errors(narrow, layer, weights, calibration, held_out) for weights in stages]
    clock.lap("errors", errors)
    report = _report(index, float(ridge), chosen, recovered, jax.device_get(errors), bool(held_out.target.size), clock)
    return layer | {"mlp": mlp}, report


def _solve(
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    calibration: Tokens,
    settings: PruneSettings,
    key: jax.Array,
    clock: Clock,
) -> tuple[Polished, jax.Array, Weights, Weights]:
    """The choice, the ridge used, the dense weights of the choice and their update; the second moments end here."""
    seen = moments.accumulate(config, layer, calibration)
    clock.lap("statistics", seen)
    s = settings
    system, chosen = _select(
        seen, key, narrow.intermediate, s.method, s.ridge, s.penalty, s.penalty_steps, s.swap_rounds
    )
    clock.lap("selection", chosen)
    taken = reduce.take_channels(FAMILIES[config.family], layer["mlp"], chosen.kept)
    selected = reduce.to_weights(reduce.with_biases(narrow, taken))
    updated = update_weights(baselines.update_used(settings), seen, system, chosen.kept, selected)
    clock.lap("refit", updated)
    return chosen, system.ridge, selected, updated


@functools.partial(jax.jit, static_argnames=("keep", "method", "steps", "rounds"))
@full_precision
def _select(
    seen: Moments, key: jax.Array, keep: int, method: str, ridge: float, penalty: float, steps: int, rounds: int
) -> tuple[System, Polished]:
    system = equilibrate(seen.problem, ridge)
    layer = baselines.Layer(seen.problem, system, seen.hidden_mean, seen.variance, key)
    return system, baselines.select_channels(method, layer, keep, baselines.Search(penalty, steps, rounds))


@functools.partial(jax.jit, static_argnames="update")
@full_precision
def update_weights(update: str, seen: Moments, system: System, kept: jax.Array, selected: Weights) -> Weights:
    """The update of the weights of the channels kept, but for the alternating rounds.

    Args:
        update: "none", "bias", "refit" or "alternate".
        seen: The layer's moments, f channels.
        system: Their system.
        kept: [k] channel numbers.
        selected: The dense weights of these channels.
    """
    if update == "none":
        return selected
    if update == "bias":
        assert selected.bias is not None
        return selected._replace(bias=selected.bias + lost_mean(seen.problem.weight, seen.hidden_mean, kept))
    down = refit(system, kept)
    bias = None if selected.bias is None else seen.target_mean - seen.hidden_mean[kept] @ down
    return Weights(selected.inner, down, bias)


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
@full_precision
def _recover(config: DecoderConfig, schedule: Schedule, layer: Params, weights: Weights, calibration: Tokens,
             held_out: Tokens, ridge: float, key: jax.Array) -> Recovered:  # fmt: skip
    hidden = functools.partial(_hidden, config, layer)
    return alternating.recover(hidden, weights, calibration, held_out, schedule, ridge, key)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def _errors(config: DecoderConfig, layer: Params, weights: Weights, calibration: Tokens, held_out: Tokens):
    hidden = functools.partial(_hidden, config, layer)
    return [alternating.relative_error(hidden, weights, tokens) for tokens in (calibration, held_out)]


def _hidden(config: DecoderConfig, layer: Params, inner: alternating.Inner, residual: jax.Array) -> jax.Array:
    # The module declares its output projection too; nothing reads it here, and the compiler drops it.
    unused = {"down": jnp.zeros((config.intermediate, config.width))}
    unused |= {"down_bias": jnp.zeros(config.width)} if config.mlp_bias else {}
    return decoder.block(config, layer | {"mlp": inner | unused}, residual, method=mlp_hidden)


def _report(
    index: int, ridge: float, chosen: Polished, recovered: Recovered, errors: list, has_held_out: bool, clock: Clock
) -> LayerReport:
    calibration, held_out = (Errors(*(float(stage[which]) for stage in errors)) for which in (0, 1))
    return LayerReport(
        layer=index,
        kept=tuple(chosen.kept.tolist()),
        calibration=calibration,
        held_out=held_out if has_held_out else None,
        swaps=int(chosen.swaps),
        improving_swaps=int(chosen.improving),
        ridge=ridge,
        rounds=int(recovered.rounds),
        seconds=dict(clock.seconds),
    )
