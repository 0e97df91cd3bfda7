"""One block's MLP: its channels chosen, its weights recovered."""

import functools
import time

import jax
import jax.numpy as jnp

from spap_jax.baselines import select_channels
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
        layer: Parameters of one dense block.
        calibration: Tokens to fit.
        held_out: Tokens that only judge; may be empty.
        settings: How.
        clock: Where time is counted; the report takes its phases.

    Returns:
        The block's parameters with fewer channels, and the report.
    """
    keep = reduce.kept_width(config.intermediate, settings.sparsity, settings.round_to)
    narrow = config.narrowed(keep)
    chosen, ridge, selected, refitted = _solve(config, layer, keep, calibration, settings, clock)
    schedule = Schedule(settings.rounds, settings.steps, settings.step_tokens, settings.learning_rate)
    key = jax.random.fold_in(jax.random.key(settings.seed), index)
    recovered = _recover(narrow, schedule, layer, refitted, calibration, held_out, settings.ridge, key)
    clock.lap("alternating", recovered)
    mlp = reduce.to_mlp(recovered.weights, layer["mlp"])
    stages = (selected, refitted, reduce.to_weights(mlp))
    errors = [_errors(narrow, layer, weights, calibration, held_out) for weights in stages]
    clock.lap("errors", errors)
    report = _report(index, float(ridge), chosen, recovered, jax.device_get(errors), bool(held_out.target.size), clock)
    return layer | {"mlp": mlp}, report


def _solve(
    config: DecoderConfig, layer: Params, keep: int, calibration: Tokens, settings: PruneSettings, clock: Clock
) -> tuple[Polished, jax.Array, Weights, Weights]:
    """The choice, the ridge used, and the weights before and after the refit; the second moments end here."""
    seen = moments.accumulate(config, layer, calibration)
    clock.lap("statistics", seen)
    s = settings
    system, chosen = _select(seen, keep, s.method, s.ridge, s.penalty, s.penalty_steps, s.swap_rounds)
    clock.lap("selection", chosen)
    selected = reduce.to_weights(reduce.take_channels(FAMILIES[config.family], layer["mlp"], chosen.kept))
    refitted = _refit(seen, system, chosen.kept, selected)
    clock.lap("refit", refitted)
    return chosen, system.ridge, selected, refitted


@functools.partial(jax.jit, static_argnames=("keep", "method", "steps", "rounds"))
@full_precision
def _select(
    seen: Moments, keep: int, method: str, ridge: float, penalty: float, steps: int, rounds: int
) -> tuple[System, Polished]:
    system = equilibrate(seen.problem, ridge)
    chosen = select_channels(
        method, seen.problem, system, seen.variance, keep, penalty=penalty, steps=steps, rounds=rounds
    )
    return system, chosen


@jax.jit
@full_precision
def _refit(seen: Moments, system: System, kept: jax.Array, selected: Weights) -> Weights:
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
