"""One block's MLP: its channels are chosen, and the weights that stay are recovered."""

import functools
import math

import jax
import jax.numpy as jnp

from spap_jax.errors import NotFiniteError
from spap_jax.models import FAMILIES, DecoderConfig, Params, decoder, with_channels
from spap_jax.numerics import full_precision
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.parallel.program import program
from spap_jax.pruning import moments, reduce
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.run import Run
from spap_jax.pruning.streams import mlp_hidden
from spap_jax.pruning.target import aim
from spap_jax.report.schema import Errors, LayerReport
from spap_jax.settings import EFFORTS
from spap_jax.solver import alternating, methods
from spap_jax.solver.alternating import MlpFunctions, Recovered, RoundSchedule, Tokens, Weights
from spap_jax.solver.methods import Choice
from spap_jax.solver.problem import equilibrate, refit, scaled


def choose(run: Run, index: int, seen: Moments) -> Choice:
    """Chooses the channels of a layer that are kept."""
    keep, key = run.narrow(index).intermediate, run.key("choice", index)
    return mesh.replicate(choose_channels(seen, key, keep, run.settings.method, run.ridge))


@program(static_argnames=("keep", "method"))
@full_precision
def choose_channels(seen: Moments, key: jax.Array, keep: int, method: str, ridge: float) -> Choice:
    """Chooses the channels of a layer, with at least the relative ridge; every method counts the improving swaps."""
    system = equilibrate(seen.problem, ridge)
    inputs = methods.SelectorInputs(seen.problem, system, seen.hidden_mean, seen.variance, key)
    return Choice(*methods.select_channels(method, inputs, keep), system.ridge, seen.hidden_mean)


def update(run: Run, index: int, layer: Params, seen: Moments, choice: Choice) -> list[Weights]:
    """Returns the dense weights of the chosen channels, and, unless the update is "none", those after it."""
    stages = [_dense_weights(run.narrow(index), layer["mlp"], choice.kept)]
    if run.update in ("refit", "alternate"):
        stages.append(refit_weights(seen, choice.ridge, choice.kept, stages[0]))
    elif run.update == "bias":
        stages.append(_make_up_for_means(layer["mlp"]["down"], choice, stages[0]))
    return stages


@program(static_argnames="pruned")
def _dense_weights(pruned: DecoderConfig, mlp: Params, kept: jax.Array) -> Weights:
    """Returns the dense weights of the chosen channels, with zeros for the biases that an update adds."""
    taken = reduce.take_channels(FAMILIES[pruned.family], mlp, kept)
    return reduce.to_weights(shard_params(pruned, {"mlp": reduce.with_biases(pruned, taken)})["mlp"])


@program
@full_precision
def refit_weights(seen: Moments, ridge: jax.Array, kept: jax.Array, selected: Weights) -> Weights:
    """Solves for the output projection of the kept channels [k] in closed form, and the matching bias.

    ``selected`` are the dense weights of these channels, ``ridge`` [] the relative ridge of the choice.
    """
    down = mesh.divide_along_model(refit(scaled(seen.problem, ridge), kept), axis=0)
    bias = None if selected.bias is None else seen.target_mean - seen.hidden_mean[kept] @ down
    return Weights(selected.inner, down, bias)


@program
@full_precision
def _make_up_for_means(down: jax.Array, choice: Choice, selected: Weights) -> Weights:
    """Adds what removed channels contributed on average to the output bias, as FLAP does (An et al. 2024)."""
    assert selected.bias is not None
    lost = choice.hidden_mean.at[choice.kept].set(0) @ down.astype(jnp.float32)
    return selected._replace(bias=selected.bias + lost)


error_by_moments = program(static_argnames="centred")(full_precision(moments.relative_error))


def rounds_pay(run: Run, reports: list[LayerReport]) -> bool:
    """Whether alternating rounds are worth their time: not after layers in a row whose errors they hardly lowered.

    Rounds take longer than all else in a layer, and gain much in small models, often little in larger ones.
    """
    effort = EFFORTS[run.settings.effort]
    last = [report.held_out or report.calibration for report in reports[-effort.trials :]]
    pay = len(last) < effort.trials or any(e.alternating < (1 - effort.worth) * e.refit for e in last)
    return run.rounds is not None and pay


def alternate(
    run: Run,
    index: int,
    layer: Params,
    start: Weights,
    ridge: jax.Array,
    errors: tuple[jax.Array, jax.Array],
    tokens: tuple[Tokens, Tokens],
) -> Recovered:
    """Makes alternating rounds from a refit.

    Args:
        ridge: [] the relative ridge of the choice.
        errors: [] each, the relative errors of these on the fitted and on the held-out tokens.
        tokens: The fitted and the held-out tokens; the latter may be none.
    """
    assert run.rounds
    configs = run.fewer_heads.of_layer(index), run.narrow(index)
    return _recover(configs, run.correction, run.rounds, layer, start, errors, tokens, ridge, run.key("rounds", index))


@program(static_argnames=("configs", "correction", "schedule"))
@full_precision
def _recover(
    configs: tuple[DecoderConfig, DecoderConfig],
    correction: float,
    schedule: RoundSchedule,
    layer: Params,
    start: Weights,
    errors: tuple[jax.Array, jax.Array],
    tokens: tuple[Tokens, Tokens],
    ridge: jax.Array,
    key: jax.Array,
) -> Recovered:
    dense, pruned = configs
    target = functools.partial(aim, dense, layer, correction)
    mlp = MlpFunctions(functools.partial(hidden_channels, pruned, layer), target)
    return alternating.recover(mlp, start, errors, *tokens, schedule, ridge, key)


def hidden_channels(config: DecoderConfig, layer: Params, inner: alternating.Inner, residual: jax.Array) -> jax.Array:
    """Computes a block's hidden MLP channels with the given inner projections. residual: [..., d] -> [..., k]."""
    return decoder.block(config, layer | {"mlp": inner}, residual, method=mlp_hidden)


def with_mlp(run: Run, index: int, layer: Params, weights: Weights) -> Params:
    """Returns a block's parameters with the recovered MLP, as wide as the widest of the pruned model."""
    mlp = _to_mlp(run.narrow(index), run.pruned.intermediate, weights, layer["mlp"])
    return in_dtype(run, layer | {"mlp": mlp})


@program(static_argnames=("pruned", "width"))
def _to_mlp(pruned: DecoderConfig, width: int, weights: Weights, like: Params) -> Params:
    return with_channels(shard_params(pruned, {"mlp": reduce.to_mlp(weights, like)})["mlp"], width)


def in_dtype(run: Run, params: Params) -> Params:
    """Returns weights in the data type of the pruned blocks."""
    return params if run.dtype is None else _cast(params, run.dtype)


@program(static_argnames="dtype")
def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda array: array.astype(dtype), params)


def check_finite(index: int, errors: list[jax.Array]) -> None:
    """Raises NotFiniteError if a layer's errors are not finite."""
    if not all(map(math.isfinite, errors)):
        raise NotFiniteError(
            f"the activations of layer {index} are not finite: they overflow in float32, and would again with these "
            "settings, so look whether the model computes what it should (its perplexity); if it does, rounding left "
            "its weights unsolvable, and more calibration text may help."
        )


def stage_errors(stages: list[jax.Array]) -> Errors:
    """Returns the errors of all three stages; those that did not change the weights have the error of the last."""
    return Errors(*map(float, [*stages, *[stages[-1]] * (3 - len(stages))]))
