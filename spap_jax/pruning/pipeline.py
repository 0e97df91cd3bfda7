"""Sequential pruning: block after block, each fitted on the stream that the pruned blocks before it produce."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.baselines import update_used
from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.pruning import reduce, streams
from spap_jax.pruning.layer import Clock, prune_layer
from spap_jax.pruning.report import LayerReport
from spap_jax.settings import PruneSettings


def pruned_config(config: DecoderConfig, settings: PruneSettings) -> DecoderConfig:
    """The decoder that ``prune_layers`` makes of ``config``: narrower, and with biases where the update adds one.

    Raises:
        UserError: rounding leaves nothing to remove.
    """
    keep = reduce.kept_width(config.intermediate, settings.sparsity, settings.round_to)
    if keep == config.intermediate:
        raise UserError(
            f"nothing to remove: sparsity {settings.sparsity} of {config.intermediate} channels, rounded to a multiple "
            f"of {settings.round_to}, keeps all of them; raise --sparsity or lower --round-to."
        )
    added = update_used(settings) == "bias"
    return dataclasses.replace(config.narrowed(keep), mlp_bias=config.mlp_bias or added)


def prune_layers(
    config: DecoderConfig,
    outer: Params,
    read_layer: Callable[[int], Params],
    tokens: np.ndarray,
    settings: PruneSettings,
) -> Iterator[tuple[Params, LayerReport]]:
    """Prunes the MLP of every block in turn.

    One block's weights, its second moments and the two streams are held; a block is read when its turn comes.

    Args:
        config: The dense decoder.
        outer: Its parameters outside the blocks.
        read_layer: Gives the parameters of a dense block by its number.
        tokens: Calibration token blocks [B, T].
        settings: How.

    Yields:
        The parameters of each block with fewer channels, and its report.

    Raises:
        UserError: there is nothing to remove, or a layer's numbers are not finite.
    """
    narrow = pruned_config(config, settings)
    clock = Clock()
    fitted, chunk = streams.split(len(tokens), settings.held_out, max(1, settings.batch_tokens // tokens.shape[1]))
    rest = len(tokens) - fitted
    calibration = streams.start(config, outer, tokens[:fitted], chunk)
    held_out = streams.start(config, outer, tokens[fitted:], streams.largest_divisor(rest, chunk) if rest else 1)
    clock.lap("streams", calibration)
    for index in range(config.layers):
        layer = jax.tree.map(jnp.asarray, read_layer(index))
        clock.lap("reading", layer)
        calibration, held_out = (streams.enter_mlp(config, layer, s) for s in (calibration, held_out))
        clock.lap("streams", calibration)
        tokens_seen = (streams.fitting_tokens(s) for s in (calibration, held_out))
        layer, report = prune_layer(index, config, narrow, layer, *tokens_seen, settings, clock)
        if not np.isfinite(report.calibration.alternating):
            raise UserError(f"the activations of layer {index} are not finite: the checkpoint overflows in float32.")
        calibration, held_out = (streams.leave_mlp(narrow, layer, s) for s in (calibration, held_out))
        clock.lap("streams", calibration)
        yield layer, report
        clock = Clock()
