"""A width for each layer within the total that one width for all would keep: ``--allocation global``.

Errors of different layers do not compare: what one does to the model's predictions, the same error in another does not.
So the dense model is asked before any block is pruned: with one layer alone at one width, how far are its predictions
from what they were? Small divergences add up, nearly, so the widths with the least sum are found exactly.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import devices
from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import full_precision, storage
from spap_jax.placement import placed
from spap_jax.pruning import moments, reduce, streams
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.pipeline import calibration_chunks, pruned_config
from spap_jax.pruning.predictions import advance, at, divergence, put, room, some
from spap_jax.pruning.streams import Streams
from spap_jax.settings import PruneSettings
from spap_jax.solver import allocation
from spap_jax.solver.problem import equilibrate

_STEP = 1 / 16
"""Of a dense layer's channels, between one width and the next."""

_REACH = 3
"""Widths on either side of the uniform one: each different width compiles the programs of a layer anew."""


def allocated_config(
    config: DecoderConfig,
    outer: Params,
    read_layer: Callable[[int], Params],
    tokens: np.ndarray,
    settings: PruneSettings,
) -> DecoderConfig:
    """The decoder to prune to: ``pruned_config``, its widths chosen by layer where the settings say so.

    For that all dense blocks are held, and the tokens pass through them once.

    Args:
        config: The dense decoder.
        outer: Its parameters outside the blocks.
        read_layer: Gives the parameters of a dense block by its number.
        tokens: Calibration token blocks [B, T]; those held out tell the divergences.
        settings: How to prune.

    Raises:
        UserError: there is nothing to remove or to choose, or the layers differ in width already.
    """
    check_allocation(config, settings, devices.sharers())
    uniform = pruned_config(config, settings)
    if settings.allocation == "uniform":
        return uniform
    widths = _candidates(config, settings)
    losses = _losses(config, outer, read_layer, tokens, settings, widths)
    if not np.isfinite(losses).all():
        raise NotFiniteError(
            "the dense model's predictions are not finite: they overflow in float32, so look whether the model "
            "computes what it should (spap eval)."
        )
    # Columns count the steps above the least width.
    spare = config.layers * widths[::-1].index(uniform.intermediate)
    chosen = allocation.allocate(losses[:, ::-1], spare)
    return uniform.with_widths([widths[::-1][column] for column in chosen])


def check_allocation(config: DecoderConfig, settings: PruneSettings, sharers: int) -> None:
    """Refuses widths that cannot be chosen, or not be pruned to, before any work.

    Args:
        config: The dense decoder.
        settings: How to prune.
        sharers: Among how many devices weights are to be divided.

    Raises:
        UserError: layers differ in width, or are to, where all must be as wide; or there is but one width to choose.
    """
    chosen = settings.allocation == "global"
    if chosen or config.widths:
        words = f"{option('allocation', 'global')} gives layers" if chosen else "the layers of this model have"
        if settings.schedule == "parallel":
            raise UserError(
                f"{words} widths of their own, and {option('schedule', 'parallel')} solves layers of one width "
                f"at once: use {option('schedule', 'sequential')}."
            )
        if sharers > 1:
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
    if len(_candidates(config, settings)) == 1:
        raise UserError(
            f"nothing to choose: the widths of layers with {config.intermediate} channels, rounded to a multiple of "
            f"{settings.round_to}, are too few; lower {option('round_to')} or use "
            f"{option('allocation', 'uniform')}."
        )


def _candidates(config: DecoderConfig, settings: PruneSettings) -> tuple[int, ...]:
    """The widths to choose from, descending and evenly spaced, the uniform one among them."""
    uniform = pruned_config(config, settings).intermediate
    step = reduce.kept_width(config.intermediate, 1 - _STEP, settings.round_to)
    around = (uniform + step * number for number in range(_REACH, -_REACH - 1, -1))
    return tuple(width for width in around if 0 < width < config.intermediate)


def _losses(
    config: DecoderConfig,
    outer: Params,
    read_layer: Callable[[int], Params],
    tokens: np.ndarray,
    settings: PruneSettings,
    widths: tuple[int, ...],
) -> np.ndarray:
    """Divergence of the dense model with one layer alone at one width: [L, W] nats per token."""
    fitted, held_out = calibration_chunks(tokens, settings)
    judged = held_out if held_out.size else fitted[:1]
    outer, blocks = placed(config, {name: outer[name] for name in ("embed", "head")}), None
    for index in range(config.layers):
        layer = placed(config, read_layer(index))
        blocks = put(room(layer, config.layers) if blocks is None else blocks, index, layer)
    assert blocks is not None
    dtype = storage(settings.stream_dtype)
    last = streams.embed(config, outer, judged, dtype)
    for index in range(config.layers):
        last = advance(config, blocks, index, last)
    compared = Streams(last, streams.embed(config, outer, judged, dtype))
    both, losses = streams.start(config, outer, fitted, dtype), []
    for index in range(config.layers):
        layer = at(blocks, index)
        both = streams.enter_mlp(config, layer, both)
        seen = devices.everywhere(moments.accumulate(config, layer, streams.fitting_tokens(both)))
        tried, own = _projections(layer["mlp"], seen, settings.ridge, widths), some(blocks["mlp"], index, 1)
        each = (own | some(tried, number, 1) for number in range(len(widths)))
        losses.append(jax.device_get([divergence(config, outer, blocks, index, mlp, compared) for mlp in each]))
        both, _ = streams.leave_mlp(config, layer, both)
        compared = compared._replace(pruned=advance(config, blocks, index, compared.pruned))
    return np.array(losses)


@functools.partial(jax.jit, static_argnames="widths")
@full_precision
def _projections(mlp: Params, seen: Moments, ridge: float, widths: tuple[int, ...]) -> Params:
    """The dense MLP's output projection (and bias) solved for at each width [W, ...], zero for the channels gone."""
    down = allocation.path(equilibrate(seen.problem, ridge), widths)
    bias = seen.target_mean[None] - jnp.einsum("f,wfd->wd", seen.hidden_mean, down)
    return {name: new.astype(mlp[name].dtype) for name, new in (("down", down), ("down_bias", bias)) if name in mlp}
