"""One block's attention: key/value groups are chosen, and the output projection is solved for.

A group is a key/value head with the query heads that read it. The heads' outputs take the role of the MLP's hidden
channels, and the channels of a group are kept or removed together.
"""

import jax
import jax.numpy as jnp

from spap_jax.models import FAMILIES, DecoderConfig, Params
from spap_jax.numerics import full_precision
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.parallel.program import program
from spap_jax.pruning import moments, reduce
from spap_jax.pruning.layer import error_by_moments, in_dtype, refit_weights, stage_errors
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.run import Run
from spap_jax.report.schema import AttentionReport
from spap_jax.solver import methods
from spap_jax.solver.alternating import Tokens, Weights
from spap_jax.solver.groups import channels_of
from spap_jax.solver.problem import equilibrate
from spap_jax.solver.swap import Polished


def prune_heads(run: Run, index: int, layer: Params, tokens: tuple[Tokens, Tokens]) -> tuple[Params, AttentionReport]:
    """Prunes the attention of one dense block of a family with norms before attention -> parameters, and report.

    ``tokens`` are the fitted and the held-out tokens of attention; the latter may be none.
    """
    config = run.config.of_layer(index)
    seen, judged = _moments(run, index, layer, tokens[0]), []
    key, sizes = run.key("heads", index), (config.kv_heads, run.pruned.kv_heads)
    ridge, chosen = _choose(seen, key, *sizes, run.settings.method, run.ridge)
    refits = run.update in ("refit", "alternate")
    stages = [in_dtype(run, each) for each in _update(run.pruned, refits, seen, ridge, layer["attention"], chosen.kept)]
    fitted = _errors(config, seen, chosen.kept, stages)
    jax.block_until_ready(fitted)
    del seen  # makes room for the moments of the held-out tokens
    if tokens[1].residual.size:
        judged = _errors(config, _moments(run, index, layer, tokens[1]), chosen.kept, stages)
    report = AttentionReport(
        kept=tuple(chosen.kept.tolist()),
        calibration=stage_errors(fitted),
        held_out=stage_errors(judged) if judged else None,
        swaps=int(chosen.swaps),
        improving_swaps=int(chosen.improving),
        ridge=float(ridge),
    )
    return layer | {"attention": stages[-1]}, report


@program(static_argnames=("count", "keep", "method"))
@full_precision
def _choose(
    seen: Moments, key: jax.Array, count: int, keep: int, method: str, ridge: float
) -> tuple[jax.Array, Polished]:
    """Returns the ridge used [], and the choice of groups."""
    system = equilibrate(seen.problem, ridge)
    layer = methods.SelectorInputs(seen.problem, system, seen.hidden_mean, seen.variance, key)
    return system.ridge, methods.select_groups(method, layer, count, keep)


@program(static_argnames=("pruned", "refits"))
def _update(
    pruned: DecoderConfig, refits: bool, seen: Moments, ridge: jax.Array, attention: Params, kept: jax.Array
) -> list[Params]:
    """Returns the dense weights of the chosen groups, and those after a refit."""
    taken = reduce.take_groups(FAMILIES[pruned.family], attention, kept)
    stages = [taken]
    if refits:
        channels = channels_of(kept, pruned.heads // pruned.kv_heads * pruned.head_dim)
        stages.append(_with_weights(taken, refit_weights(seen, ridge, channels, _to_weights(taken))))
    return [shard_params(pruned, {"attention": each})["attention"] for each in stages]


@program(static_argnames="config")
def _errors(config: DecoderConfig, seen: Moments, kept: jax.Array, stages: list[Params]) -> list[jax.Array]:
    channels = channels_of(kept, len(seen.hidden_mean) // config.kv_heads)
    return [error_by_moments(seen, config.output_bias, channels, _to_weights(stage)) for stage in stages]


def _moments(run: Run, index: int, layer: Params, tokens: Tokens) -> Moments:
    return mesh.replicate(moments.accumulate_attention(run.config.of_layer(index), layer, tokens))


def _to_weights(attention: Params) -> Weights:
    """Converts the output projection [n h, d] and bias to the solver's ``Weights``, in float32; the rest is omitted."""
    o, bias = attention["o"].astype(jnp.float32), attention.get("o_bias")
    return Weights({}, o.reshape(-1, o.shape[-1]), None if bias is None else bias.astype(jnp.float32))


def _with_weights(attention: Params, weights: Weights) -> Params:
    """Inverts ``_to_weights``, in the dtypes of ``attention``."""
    new = {"o": weights.down} | ({} if weights.bias is None else {"o_bias": weights.bias})
    return attention | {n: a.reshape(attention[n].shape).astype(attention[n].dtype) for n, a in new.items()}
