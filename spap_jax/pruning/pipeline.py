"""Sequential pruning: block after block, each fitted on the stream that the pruned blocks before it produce."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import devices, memory
from spap_jax.baselines import update_used
from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.registry import FAMILIES
from spap_jax.pruning import reduce, streams
from spap_jax.pruning.attention import prune_attention
from spap_jax.pruning.layer import Clock, prune_layer
from spap_jax.pruning.report import LayerReport, SweepReport
from spap_jax.pruning.sweeps import Steps, put, room, sweep
from spap_jax.settings import PruneSettings


def pruned_config(config: DecoderConfig, settings: PruneSettings) -> DecoderConfig:
    """The decoder that ``prune_layers`` makes of ``config``: narrower, and with biases where the update adds one.

    Raises:
        UserError: rounding leaves nothing to remove, or no stock loader would take the number of heads.
    """
    keep = reduce.kept_width(config.intermediate, settings.sparsity, settings.round_to)
    if keep == config.intermediate:
        raise UserError(
            f"nothing to remove: sparsity {settings.sparsity} of {config.intermediate} channels, rounded to a multiple "
            f"of {settings.round_to}, keeps all of them; raise --sparsity or lower --round-to."
        )
    added = update_used(settings) == "bias"
    narrow = dataclasses.replace(config.narrowed(keep), mlp_bias=config.mlp_bias or added)
    return narrow.with_kv_heads(_kept_kv_heads(config, settings.attention_sparsity))


def _kept_kv_heads(config: DecoderConfig, sparsity: float) -> int:
    if sparsity == 0:
        return config.kv_heads
    keep = reduce.kept_width(config.kv_heads, sparsity, 1)
    FAMILIES[config.family].check_heads(config, keep)
    if keep == config.kv_heads:
        advice = "leave --attention-sparsity out" if keep == 1 else "raise --attention-sparsity"
        raise UserError(
            f"nothing to remove: attention sparsity {sparsity} of {keep} key/value "
            f"{'head' if keep == 1 else 'heads'}, rounded, keeps all of them; {advice}."
        )
    return keep


def prune_layers(
    config: DecoderConfig,
    outer: Params,
    read_layer: Callable[[int], Params],
    tokens: np.ndarray,
    settings: PruneSettings,
    watch: Callable[[LayerReport | SweepReport], None],
) -> Iterator[tuple[int, Params]]:
    """Prunes every block in turn, and sweeps over the pruned model as often as the settings say.

    A block's attention is pruned before its MLP, or left as it is.

    Without sweeps, one block's weights, its second moments and the two streams are held, and a block is read when its
    turn comes; with sweeps, all pruned blocks are held as well.

    Args:
        config: The dense decoder.
        outer: Its parameters outside the blocks.
        read_layer: Gives the parameters of a dense block by its number.
        tokens: Calibration token blocks [B, T].
        settings: How.
        watch: Gets the report of every step: of each block, and of each block in each sweep.

    Yields:
        The number of each block and its parameters with fewer channels, as soon as they are final.

    Raises:
        UserError: there is nothing to remove, or a layer's numbers are not finite.
    """
    narrow = pruned_config(config, settings)
    fewer_heads = config.with_kv_heads(narrow.kv_heads)
    chunks = _split(tokens, settings)
    sweeps = settings.sweep_count if update_used(settings) == "alternate" else 0
    clock = Clock()
    calibration, held_out = (streams.start(config, outer, part) for part in chunks)
    clock.lap("streams", calibration)
    blocks = None
    for index in range(config.layers):
        layer = jax.tree.map(jnp.asarray, read_layer(index))
        clock.lap("reading", layer)
        attention = None
        if fewer_heads == config:
            calibration, held_out = (streams.enter_mlp(config, layer, s) for s in (calibration, held_out))
        else:
            layer, (calibration, held_out), attention = prune_attention(
                index, config, fewer_heads, layer, (calibration, held_out), settings, clock
            )
        clock.lap("streams", calibration)
        seen = (streams.fitting_tokens(s) for s in (calibration, held_out))
        layer, report = prune_layer(index, fewer_heads, narrow, layer, *seen, settings, clock)
        if not np.isfinite(report.calibration.alternating):
            raise UserError(f"the activations of layer {index} are not finite: the checkpoint overflows in float32.")
        calibration, held_out = (streams.leave_mlp(narrow, layer, s) for s in (calibration, held_out))
        clock.lap("streams", calibration)
        watch(dataclasses.replace(report, seconds=dict(clock.seconds), attention=attention))
        if sweeps:
            blocks = put(room(layer, config.layers) if blocks is None else blocks, index, layer)
        else:
            yield index, layer
        del layer
        memory.return_scraps()
        clock = Clock()
    if blocks is not None:
        final = calibration.dense, held_out.dense
        del calibration, held_out
        yield from _swept(narrow, outer, blocks, chunks, final, settings, watch)


def _split(tokens: np.ndarray, settings: PruneSettings) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and held-out token blocks, each in chunks [C, B, T]."""
    most, shares = max(1, settings.batch_tokens // tokens.shape[1]), devices.number()
    fitted, chunk = streams.split(len(tokens), settings.held_out, most, shares)
    held_out = tokens[fitted:]
    rest = len(held_out) // shares if len(held_out) % shares == 0 else len(held_out)
    return (
        streams.chunked(tokens[:fitted], chunk),
        streams.chunked(held_out, streams.largest_divisor(rest, chunk) if rest else 1),
    )


def _swept(
    config: DecoderConfig,
    outer: Params,
    blocks: Params,
    tokens: tuple[np.ndarray, np.ndarray],
    final: tuple[jax.Array, jax.Array],
    settings: PruneSettings,
    watch: Callable[[LayerReport | SweepReport], None],
) -> Iterator[tuple[int, Params]]:
    """All sweeps; the last one yields its blocks, which are stacked [L, ...] and updated in place."""
    sequences = max(1, settings.step_tokens // tokens[0].shape[-1])
    steps = Steps(settings.sweep_steps, sequences, settings.sweep_learning_rate)
    # The keys of the first pass are folded with the numbers of layers and choices.
    key = jax.random.fold_in(jax.random.key(settings.seed), 2 * config.layers)
    clock = Clock()
    for layer, done in sweep(config, outer, blocks, tokens, final, settings.sweep_count, steps, key):
        clock.lap("sweeps", layer)
        watch(SweepReport(**done._asdict(), seconds=clock.seconds))
        if done.sweep == settings.sweep_count - 1:
            yield done.layer, layer
        del layer
        memory.return_scraps()
        clock = Clock()
