"""Pruning of one block's attention: selects key/value groups and solves for the output projection.

A group is a key/value head with the query heads that read it. The heads' outputs take the role of the MLP's hidden
channels: the same moments, the same system, the same closed form, with the channels of a group kept or removed
together.
"""

import functools

import jax
import jax.numpy as jnp

from spap_jax.models import FAMILIES, DecoderConfig, Params
from spap_jax.numerics import full_precision
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.pruning import moments, reduce, streams
from spap_jax.pruning.layer import PhaseClock, error_by_moments, refit_weights, stage_errors
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.streams import Streams
from spap_jax.report.schema import AttentionReport
from spap_jax.settings import PruneSettings
from spap_jax.solver import methods
from spap_jax.solver.alternating import Tokens, Weights
from spap_jax.solver.groups import channels_of
from spap_jax.solver.problem import equilibrate
from spap_jax.solver.swap import Polished


def prune_attention(
    index: int,
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    both: list[Streams],
    settings: PruneSettings,
    clock: PhaseClock,
) -> tuple[Params, list[Streams], AttentionReport]:
    """Prunes the attention of one block, and advances the streams to its MLP.

    Args:
        index: Number of the layer; seeds its randomness together with ``settings.seed``.
        config: The dense decoder, of a family with norms before attention.
        narrow: The same config with fewer heads.
        layer: Parameters of one dense block.
        both: Streams that enter the block, of the calibration and the held-out tokens; the latter may have no chunks.
        settings: The pruning settings.
        clock: Records the time by phase.

    Returns:
        The block's parameters with fewer heads, the streams after its attention, and the report.
    """
    both = [streams.enter_attention(config, layer, part) for part in both]
    clock.lap("streams", both)
    calibration, held_out = (streams.fitting_tokens(s) for s in both)
    seen = _moments(config, layer, calibration)
    clock.lap("statistics", seen)
    # The first 2 L keys are used for channel selection and alternating rounds; the next one is free.
    key = jax.random.fold_in(jax.random.key(settings.seed), 2 * config.layers + 1 + index)
    s = settings
    ridge, chosen = _select(seen, key, config.kv_heads, narrow.kv_heads, s.method, s.fit.ridge, s.swap_rounds)
    clock.lap("selection", chosen)
    taken = reduce.take_groups(FAMILIES[config.family], layer["attention"], chosen.kept)
    stages, channels = [taken], channels_of(chosen.kept, len(seen.hidden_mean) // config.kv_heads)
    if methods.update_used(settings) in ("refit", "alternate"):
        stages.append(_with_weights(taken, refit_weights(seen, ridge, channels, _to_weights(taken))))
    stages = [shard_params(narrow, {"attention": attention})["attention"] for attention in stages]
    fitted, judged = _errors(config, seen, channels, stages), []
    clock.lap("refit", fitted)
    del seen  # makes room for the moments of the held-out tokens
    small = layer | {"attention": stages[-1]}
    if held_out.residual.size:
        judged = _errors(config, _moments(config, layer, held_out), channels, stages)
    clock.lap("errors", judged)
    both = [streams.leave_attention(narrow, small, part) for part in both]
    clock.lap("streams", both)
    report = AttentionReport(
        kept=tuple(chosen.kept.tolist()),
        calibration=stage_errors(fitted),
        held_out=stage_errors(judged) if judged else None,
        swaps=int(chosen.swaps),
        improving_swaps=int(chosen.improving),
        ridge=float(ridge),
    )
    return small, both, report


@functools.partial(jax.jit, static_argnames=("count", "keep", "method", "rounds"))
@full_precision
def _select(
    seen: Moments, key: jax.Array, count: int, keep: int, method: str, ridge: float, rounds: int
) -> tuple[jax.Array, Polished]:
    """Returns the ridge used [], and the choice of groups."""
    system = equilibrate(seen.problem, ridge)
    layer = methods.SelectorInputs(seen.problem, system, seen.hidden_mean, seen.variance, key)
    return system.ridge, methods.select_groups(method, layer, count, keep, rounds)


def _moments(config: DecoderConfig, layer: Params, tokens: Tokens) -> Moments:
    return mesh.replicate(moments.accumulate_attention(config, layer, tokens))


def _errors(config: DecoderConfig, seen: Moments, channels: jax.Array, stages: list[Params]) -> list[jax.Array]:
    return [error_by_moments(seen, config.output_bias, channels, _to_weights(stage)) for stage in stages]


def _to_weights(attention: Params) -> Weights:
    """Converts the output projection [n h, d] and bias to the solver's ``Weights``, in float32; the rest is omitted."""
    o, bias = attention["o"].astype(jnp.float32), attention.get("o_bias")
    return Weights({}, o.reshape(-1, o.shape[-1]), None if bias is None else bias.astype(jnp.float32))


def _with_weights(attention: Params, weights: Weights) -> Params:
    """Inverts ``_to_weights``, in the dtypes of ``attention``."""
    new = {"o": weights.down} | ({} if weights.bias is None else {"o_bias": weights.bias})
    return attention | {n: a.reshape(attention[n].shape).astype(attention[n].dtype) for n, a in new.items()}
