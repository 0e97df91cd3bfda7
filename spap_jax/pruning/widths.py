"""Per-layer widths with the same total as one width for all layers: the allocation "global".

Errors of different layers are not comparable. So before any block is pruned, the divergence of the dense model's
predictions is measured with a single layer at each candidate width. Small divergences are nearly additive, so the
widths with the least sum are found exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.models import DecoderConfig, Params
from spap_jax.numerics import full_precision
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.parallel.program import program
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import moments, reduce, streams
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.predictions import advance, divergence, stacked_blocks, start, take_layer
from spap_jax.pruning.run import Dense, Run, multiple_of, pruned_config
from spap_jax.settings import PruneSettings
from spap_jax.solver import allocation
from spap_jax.solver.problem import equilibrate

Widths = tuple[int, ...]

_STEP = 1 / 16
"""Spacing of the candidate widths, as a fraction of a dense layer's channels."""

_REACH = 3
"""Candidate widths on either side of the uniform one; few, since each width recompiles the programs of a layer."""


def choose_widths(run: Run, dense: Dense) -> Widths:
    """Chooses a width for each layer by divergences on the held-out tokens; all dense blocks are in memory.

    Raises:
        NotFiniteError: the dense model's predictions are not finite.
    """
    widths = _candidates(run.config, run.pruned.intermediate, run.settings)
    losses = _losses(run, dense, widths)
    if not np.isfinite(losses).all():
        raise NotFiniteError(
            "the dense model's predictions are not finite: they overflow in float32, so look whether the model "
            "computes what it should (its perplexity)."
        )
    # Columns count the steps above the smallest width.
    spare = run.config.layers * widths[::-1].index(run.pruned.intermediate)
    chosen = allocation.allocate(losses[:, ::-1], spare)
    return tuple(widths[::-1][column] for column in chosen)


def check_allocation(config: DecoderConfig, settings: PruneSettings, model_size: int) -> None:
    """Checks, before any work, that the widths can be chosen and pruned to.

    ``model_size`` is the number of devices over which weights are to be sharded.

    Raises:
        UserError: layers differ in width where they may not, or no layer could be wider and another one narrower.
    """
    chosen = settings.allocation == "global"
    if chosen or config.widths:
        words = f"{option('allocation', 'global')} gives layers" if chosen else "the layers of this model have"
        if settings.schedule == "parallel":
            raise UserError(
                f"{words} widths of their own, and {option('schedule', 'parallel')} solves layers of one width "
                f"at once: use {option('schedule', 'sequential')}."
            )
        if model_size > 1:
            raise UserError(
                f"{words} widths of their own, and {option('model_devices')} divides layers of one width: leave it out."
            )
    if not chosen:
        return
    if config.widths:
        raise UserError(
            f"the layers of this model differ in width already, and {option('allocation', 'global')} starts from one "
            f"width: use {option('allocation', 'uniform')}, which removes the same fraction of each layer's channels."
        )
    if config.layers == 1:
        raise UserError(f"nothing to choose for a single layer: use {option('allocation', 'uniform')}.")
    pruned = pruned_config(config, settings)
    widths, widths_apart = _candidates(config, pruned.intermediate, settings), _apart(config, settings)
    if not widths[-1] < pruned.intermediate < widths[0]:
        raise UserError(
            f"nothing to choose: of {config.intermediate} channels, layers that keep {pruned.intermediate} could not "
            f"be both wider and narrower in steps of {widths_apart}; lower {option('round_to')} or use "
            f"{option('allocation', 'uniform')}."
        )


def _candidates(config: DecoderConfig, uniform: int, settings: PruneSettings) -> Widths:
    """Returns the candidate widths, descending and evenly spaced, including the uniform one."""
    around = (uniform + _apart(config, settings) * number for number in range(_REACH, -_REACH - 1, -1))
    return tuple(width for width in around if 0 < width < config.intermediate)


def _apart(config: DecoderConfig, settings: PruneSettings) -> int:
    """Returns the distance between candidate widths."""
    return reduce.kept_width(config.intermediate, 1 - _STEP, multiple_of(settings, config.intermediate))


def _losses(run: Run, dense: Dense, widths: Widths) -> np.ndarray:
    """Measures the divergence of the dense model with a single layer at each width: [L, W] nats per token."""
    config, settings = run.config, run.settings
    outer, blocks = shard_params(config, dense.outer), stacked_blocks(dense)
    most = max(1, settings.batch_tokens // run.fitted.tokens.shape[-1])
    judged = run.held_out if run.held_out.real else chunked(run.fitted.rows[:most], most)
    compared = start(config, outer, blocks, judged)
    both, losses = streams.start(config, outer, run.fitted), []
    for index in range(config.layers):
        layer = take_layer(blocks, index)
        alike = config.attending_like(index)
        both = streams.enter_mlp(alike, layer, both)
        seen = mesh.replicate(moments.accumulate(alike, layer, streams.fitting_tokens(both)))
        tried, own = _projections(layer["mlp"], seen, run.ridge, widths), layer["mlp"]
        each = (own | take_layer(tried, number) for number in range(len(widths)))
        losses.append(jax.device_get([divergence(config, outer, blocks, index, mlp, compared) for mlp in each]))
        both = streams.leave_mlp(config, layer, both)
        compared = compared._replace(pruned=advance(config, blocks, index, compared.pruned))
    return np.array(losses)


@program(static_argnames="widths")
@full_precision
def _projections(mlp: Params, seen: Moments, ridge: float, widths: tuple[int, ...]) -> Params:
    """Solves for the dense MLP's output projection (and bias) at each width [W, ...], zero for removed channels."""
    down = allocation.path(equilibrate(seen.problem, ridge), widths)
    bias = seen.target_mean[None] - jnp.einsum("f,wfd->wd", seen.hidden_mean, down)
    return {name: new.astype(mlp[name].dtype) for name, new in (("down", down), ("down_bias", bias)) if name in mlp}
