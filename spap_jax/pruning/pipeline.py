"""Sequential pruning: each block is fitted on the stream that the previous pruned blocks produce.

Its channels are selected on that stream too, or in advance on the dense stream (`waves`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from spap_jax import devices, memory
from spap_jax.baselines import update_used
from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params, with_channels
from spap_jax.models.registry import FAMILIES
from spap_jax.numerics import storage
from spap_jax.placement import placed
from spap_jax.pruning import reduce, streams
from spap_jax.pruning.attention import prune_attention
from spap_jax.pruning.layer import Choice, Clock, layer_report, prune_layer
from spap_jax.pruning.predictions import at, put, room
from spap_jax.pruning.report import LayerReport, SweepReport
from spap_jax.pruning.streams import Streams
from spap_jax.pruning.sweeps import Start, Steps, sweep
from spap_jax.pruning.waves import Choices
from spap_jax.settings import PruneSettings


def pruned_config(config: DecoderConfig, settings: PruneSettings) -> DecoderConfig:
    """Returns the config of the decoder pruned from ``config``: narrower, and with biases if the update adds them.

    Every layer loses the same fraction of its channels, as in the allocation "uniform"; "global" starts from it.

    Raises:
        UserError: rounding leaves nothing to remove, or no stock loader would accept the number of heads.
    """
    keep = [reduce.kept_width(width, settings.sparsity, settings.round_to) for width in config.layer_widths]
    for kept, width in zip(keep, config.layer_widths, strict=True):
        if kept == width:
            raise UserError(
                f"nothing to remove: {option('sparsity', settings.sparsity)} of {width} channels, rounded to a "
                f"multiple of {settings.round_to}, keeps all of them; raise {option('sparsity')} or lower "
                f"{option('round_to')}."
            )
    added = update_used(settings) == "bias"
    narrow = dataclasses.replace(config.with_widths(keep), mlp_bias=config.mlp_bias or added)
    return narrow.with_kv_heads(_kept_kv_heads(config, settings.attention_sparsity))


def _kept_kv_heads(config: DecoderConfig, sparsity: float) -> int:
    if sparsity == 0:
        return config.kv_heads
    keep = reduce.kept_width(config.kv_heads, sparsity, 1)
    FAMILIES[config.family].check_heads(config, keep)
    if keep == config.kv_heads:
        name = option("attention_sparsity")
        advice = f"leave {name} out" if keep == 1 else f"raise {name}"
        raise UserError(
            f"nothing to remove: {option('attention_sparsity', sparsity)} of {keep} key/value "
            f"{'head' if keep == 1 else 'heads'}, rounded, keeps all of them; {advice}."
        )
    return keep


class Step(NamedTuple):
    """A step on one block: it was pruned, or adjusted in a sweep.

    Attributes:
        report: The step's report.
        layer: The block's parameters; for a step of an earlier run, the newest stored ones.
        final: Whether no later step changes them.
        fresh: Whether this run made the step.
    """

    report: LayerReport | SweepReport
    layer: Params
    final: bool
    fresh: bool = True


class Begun(NamedTuple):
    """The steps of an earlier run: the entire state that later steps depend on.

    The streams are not stored. The same programs recompute them from the finished blocks, which takes two forward
    passes; storing them after every block would take longer, and more space than the blocks. No random state is stored
    either: every step folds the seed with its number.

    Attributes:
        reports: Reports of all the steps, in order.
        read_layer: Returns the newest parameters of a block of these steps by its number.
    """

    reports: Sequence[LayerReport | SweepReport]
    read_layer: Callable[[int], Params]


def prune_layers(
    config: DecoderConfig,
    outer: Params,
    read_layer: Callable[[int], Params],
    tokens: np.ndarray,
    settings: PruneSettings,
    begun: Begun | None = None,
    narrow: DecoderConfig | None = None,
    watch: Callable[[int, int], None] | None = None,
    shared: Choices | None = None,
) -> Iterator[Step]:
    """Prunes every block in turn, and then makes the configured number of sweeps over the pruned model.

    A block's attention is pruned before its MLP, or left unchanged.

    Without sweeps, memory holds one block's weights, its second moments and the two streams, and a block is read when
    its turn comes; with sweeps, it also holds all pruned blocks. The parallel schedule also reads each block once
    before.

    Args:
        config: The dense decoder.
        outer: Its parameters outside the blocks; like those of a block, arrays or values that are read lazily.
        read_layer: Returns the parameters of a dense block by its number.
        tokens: Calibration token blocks [B, T].
        settings: The pruning settings.
        begun: Steps of an earlier run with the same arguments, to resume from. The result is the same as without.
        narrow: The pruned decoder. By default that of ``pruned_config``.
        watch: Called between the steps of a sweep on several blocks, with the number of parts done and the total.
        shared: Choices of the parallel schedule, shared with runs that differ only in sparsity. By default this run
            has its own.

    Yields:
        Each step as soon as it is made; steps of the earlier run come first, in order.

    Raises:
        UserError: there is nothing to remove, or a layer's activations are not finite.
    """
    narrow = narrow or pruned_config(config, settings)
    ahead = shared or Choices([narrow.intermediate])
    sweeps = settings.decided.sweeps if update_used(settings) == "alternate" else 0
    made = list(begun.reports) if begun else []
    if begun and len(made) == config.layers * (1 + sweeps):
        for number, report in enumerate(made):
            yield Step(report, begun.read_layer(report.layer), number >= config.layers * sweeps, fresh=False)
        return
    chunks = calibration_chunks(tokens, settings)
    clock = Clock()
    both = Both(*(streams.start(config, outer, part, storage(settings.stream_dtype)) for part in chunks))
    clock.lap("streams", both)
    blocks, choices, wave = None, [], devices.everyone()
    for index in range(config.layers):
        if settings.schedule == "parallel" and index % wave == 0 and index + wave > len(made):
            layers = range(index, min(index + wave, config.layers))
            choices = ahead.of(layers, config, narrow.intermediate, read_layer, both.fitted.dense, settings, clock)
        own = config.of_layer(index)
        dense = resized(placed(config, read_layer(index)), own.intermediate)
        clock.lap("reading", dense)
        if begun and index < len(made):
            layer, report = placed(narrow, begun.read_layer(index)), made[index]
            both = _past(own, narrow, dense, layer, both)
        else:
            choice = choices[index % wave] if choices else None
            layer, report, both = _prune_block(index, own, narrow, dense, both, choice, settings, clock)
        del dense
        if sweeps:
            blocks = put(room(layer, config.layers) if blocks is None else blocks, index, layer)
        yield Step(report, devices.whole(layer), final=not sweeps, fresh=index >= len(made))
        del layer
        memory.return_scraps()
        clock = Clock()
    if blocks is not None:
        final = both.fitted.dense, both.held_out.dense
        del both
        yield from swept(narrow, outer, blocks, chunks, final, settings, made[config.layers :], watch)


class Both(NamedTuple):
    """The streams of the tokens to fit and of the held-out tokens; the latter may be empty."""

    fitted: Streams
    held_out: Streams


def _prune_block(
    index: int,
    config: DecoderConfig,
    narrow: DecoderConfig,
    layer: Params,
    both: Both,
    choice: Choice | None,
    settings: PruneSettings,
    clock: Clock,
) -> tuple[Params, LayerReport, Both]:
    """Prunes one dense block; returns its parameters, its report, and the streams after it."""
    fewer_heads = config.with_kv_heads(narrow.kv_heads)
    attention = None
    if fewer_heads == config:
        both = Both(*(streams.enter_mlp(config, layer, s) for s in both))
    else:
        layer, pair, attention = prune_attention(index, config, fewer_heads, layer, both, settings, clock)
        both = Both(*pair)
    clock.lap("streams", both)
    calibration, held_out = (streams.fitting_tokens(s) for s in both)
    own = narrow.of_layer(index)
    layer, solved = prune_layer(index, fewer_heads, own, layer, calibration, held_out, settings, clock, choice)
    layer = resized(layer, narrow.intermediate)
    del calibration, held_out
    (fitted, error), (judged, held_out_error) = (streams.leave_mlp(narrow, layer, s) for s in both)
    clock.lap("streams", (fitted, judged))
    if not np.isfinite(error):
        raise NotFiniteError(
            f"the activations of layer {index} are not finite: they overflow in float32, and would again with these "
            "settings, so look whether the model computes what it should (spap eval)."
        )
    report = layer_report(index, solved, error, held_out_error if judged.dense.size else None, clock)
    return layer, dataclasses.replace(report, attention=attention), Both(fitted, judged)


def resized(layer: Params, width: int) -> Params:
    """Truncates or zero-pads a block's MLP to ``width`` channels; see ``decoder.with_channels``."""
    return layer | {"mlp": with_channels(layer["mlp"], width)}


def _past(config: DecoderConfig, narrow: DecoderConfig, dense: Params, layer: Params, both: Both) -> Both:
    """Advances the streams past an already pruned block, with the programs of ``_prune_block``: bitwise equal."""
    fewer_heads = config.with_kv_heads(narrow.kv_heads)
    if fewer_heads == config:
        both = Both(*(streams.enter_mlp(config, dense, s) for s in both))
    else:
        small = dense | {"attention": layer["attention"]}
        both = Both(*(streams.enter_attention(config, dense, s) for s in both))
        both = Both(*(streams.leave_attention(fewer_heads, small, s) for s in both))
    return Both(*(streams.leave_mlp(narrow, layer, s)[0] for s in both))


def calibration_chunks(tokens: np.ndarray, settings: PruneSettings) -> tuple[np.ndarray, np.ndarray]:
    """Splits token blocks into calibration and held-out chunks [C, B, T]; sampled sequences are never held out."""
    most, shares = max(1, settings.batch_tokens // tokens.shape[1]), devices.number()
    fitted, chunk = streams.split(len(tokens), held_out_part(settings), most, shares)
    held_out = tokens[fitted:]
    rest = len(held_out) // shares if len(held_out) % shares == 0 else len(held_out)
    return (
        streams.chunked(tokens[:fitted], chunk),
        streams.chunked(held_out, streams.largest_divisor(rest, chunk) if rest else 1),
    )


def together(layers: int, settings: PruneSettings) -> int:
    """Returns how many of ``layers`` blocks a sweep adjusts together."""
    return streams.largest_divisor(layers, settings.decided.sweep_blocks or layers)


def held_out_part(settings: PruneSettings) -> float:
    """Returns the held-out fraction of all sequences, including sampled ones, which come first."""
    return settings.held_out / (1 + settings.decided.sampled)


def swept(
    config: DecoderConfig,
    outer: Params,
    blocks: Params,
    tokens: tuple[np.ndarray, np.ndarray],
    final: tuple[jax.Array, jax.Array],
    settings: PruneSettings,
    made: Sequence[LayerReport | SweepReport] = (),
    watch: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """Makes all sweeps over the blocks, which are stacked [L, ...], updated in place, and include the steps ``made``.

    ``final`` contains the dense model's last streams, of the calibration and held-out tokens; see `prune_layers`.
    """
    sequences = max(1, settings.step_tokens // tokens[0].shape[-1])
    decided, rate = settings.decided, settings.sweep_learning_rate
    steps = Steps(together(config.layers, settings), decided.sweep_steps, sequences, rate)
    # The keys of the sequential pass are folded with the numbers of layers and choices, below 2 L.
    key = jax.random.fold_in(jax.random.key(settings.seed), 2 * config.layers)
    sweeps = decided.sweeps
    before = [report for report in made if isinstance(report, SweepReport)]
    for report in before:
        yield Step(report, devices.whole(at(blocks, report.layer)), report.sweep == sweeps - 1, fresh=False)
    start = Start(len(before), before[-1].reached) if before else None
    clock = Clock()
    outer = placed(config, {name: outer[name] for name in ("embed", "head")})
    for layer, done in sweep(config, outer, blocks, tokens, final, sweeps, steps, key, start, watch):
        clock.lap("sweeps", layer)
        yield Step(SweepReport(**done._asdict(), seconds=clock.seconds), devices.whole(layer), done.sweep == sweeps - 1)
        del layer
        memory.return_scraps()
        clock = Clock()
