"""Sequential pruning: each block is fitted on the stream that the previous pruned blocks produce.

Its channels are selected on that stream too, or in advance on the dense stream (`waves`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from spap_jax.placement import placed, room_for_all, spread
from spap_jax.pruning import joint, reduce, streams
from spap_jax.pruning.attention import prune_attention
from spap_jax.pruning.layer import Choice, Clock, layer_report, prune_layer
from spap_jax.pruning.predictions import put
from spap_jax.pruning.report import LayerReport
from spap_jax.pruning.streams import Padded, Streams
from spap_jax.pruning.waves import Choices
from spap_jax.settings import PruneSettings
from spap_jax.training.checks import Check


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
    if added and "output" in config.norms:
        raise UserError(
            "the update 'bias' adds a constant to the MLP's output, and the norm that follows it in this model divides "
            f"by another number for every token: use {option('update', 'none')} or {option('update', 'refit')}."
        )
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
    """A step: a block was pruned, or joint steps were made and measured.

    Attributes:
        report: The step's report.
        kept: Returns what a later process continues from, on the host: the block's parameters, or the state of the
            joint steps. All processes have to call it, before the next step.
        final: Blocks that no later step changes, by number; every process has to run through them, once.
        fresh: Whether this run made the step.
    """

    report: LayerReport | Check
    kept: Callable[[], Params]
    final: Iterable[tuple[int, Params]] = ()
    fresh: bool = True


class Begun(NamedTuple):
    """The steps of an earlier run: the entire state that later steps depend on.

    The streams are not stored. The same programs recompute them from the finished blocks, which takes two forward
    passes; storing them after every block would take longer, and more space than the blocks. No random state is stored
    either: every step folds the seed with its number.

    Attributes:
        reports: Reports of all the steps, in order.
        read: Returns what the step with a number kept: of the pruned blocks, and of the last joint step.
    """

    reports: Sequence[LayerReport | Check]
    read: Callable[[int], Params]


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
    mask: np.ndarray | None = None,
) -> Iterator[Step]:
    """Prunes every block in turn, and then makes joint steps on the pruned model.

    A block's attention is pruned before its MLP, or left unchanged.

    Without joint steps, memory holds one block's weights, its second moments and the two streams, and a block is read
    when its turn comes; with them, it also holds all pruned blocks. The parallel schedule also reads each block once
    before.

    Args:
        config: The dense decoder.
        outer: Its parameters outside the blocks; like those of a block, arrays or values that are read lazily.
        read_layer: Returns the parameters of a dense block by its number.
        tokens: Calibration token blocks [B, T].
        settings: The pruning settings.
        begun: Steps of an earlier run with the same arguments, to resume from. The result is the same as without.
        narrow: The pruned decoder. By default that of ``pruned_config``.
        watch: Called after every joint step, with the number of steps made and their total.
        shared: Choices of the parallel schedule, shared with runs that differ only in sparsity. By default this run
            has its own.
        mask: bool [B, T], True on the tokens whose predictions count in the joint steps; by default all count.

    Yields:
        Each step as soon as it is made; steps of the earlier run come first, in order.

    Raises:
        UserError: there is nothing to remove, or a layer's activations are not finite.
    """
    settings = settings.resolved(config.layers, config.width, tokens.size)
    narrow = narrow or pruned_config(config, settings)
    ahead = shared or Choices([narrow.intermediate])
    jointly = update_used(settings) == "alternate" and settings.decided.joint_passes > 0
    made = list(begun.reports) if begun else []
    if begun and len(made) == config.layers and not jointly:
        for number, report in enumerate(made):
            yield Step(report, dict, [(number, begun.read(number))], fresh=False)
        return
    chunks = calibration_chunks(tokens, settings, mask)
    clock = Clock()
    dtype, share = storage(settings.stream_dtype), settings.fit.correction
    both = Both(*(streams.start(config, outer, part, dtype, share) for part in chunks))
    clock.lap("streams", both)
    blocks, choices, wave = None, [], devices.everyone()
    for index in range(config.layers):
        if settings.schedule == "parallel" and index % wave == 0 and index + wave > len(made):
            layers = range(index, min(index + wave, config.layers))
            choices = ahead.of(layers, config, narrow.intermediate, read_layer, both.fitted, settings, clock)
        own = config.of_layer(index)
        dense = resized(placed(config, read_layer(index)), own.intermediate)
        clock.lap("reading", dense)
        if begun and index < len(made):
            layer, report = placed(narrow, begun.read(index)), made[index]
            both = _past(own, narrow, dense, layer, both, settings.fit.correction)
        else:
            choice = choices[index % wave] if choices else None
            layer, report, both = _prune_block(index, own, narrow, dense, both, choice, settings, clock)
        del dense
        if jointly:
            blocks = put(room_for_all(narrow, layer) if blocks is None else blocks, index, layer)
        kept = devices.whole(layer)
        yield Step(report, lambda kept=kept: kept, [] if jointly else [(index, kept)], fresh=index >= len(made))
        del layer, kept
        memory.return_scraps()
        clock = Clock()
    if blocks is not None:
        final = both.fitted.dense, both.held_out.dense
        del both
        yield from adjusted(narrow, outer, blocks, chunks, final, settings, begun, watch)


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
        both = Both(*(streams.enter_mlp(config, layer, s, settings.fit.correction) for s in both))
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


def _past(
    config: DecoderConfig, narrow: DecoderConfig, dense: Params, layer: Params, both: Both, correction: float
) -> Both:
    """Advances the streams past an already pruned block, with the programs of ``_prune_block``: bitwise equal."""
    fewer_heads = config.with_kv_heads(narrow.kv_heads)
    if fewer_heads == config:
        both = Both(*(streams.enter_mlp(config, dense, s, correction) for s in both))
    else:
        small = dense | {"attention": layer["attention"]}
        both = Both(*(streams.enter_attention(config, dense, s) for s in both))
        both = Both(*(streams.leave_attention(fewer_heads, small, s, correction) for s in both))
    return Both(*(streams.leave_mlp(narrow, layer, s)[0] for s in both))


def calibration_chunks(
    tokens: np.ndarray, settings: PruneSettings, mask: np.ndarray | None = None
) -> tuple[Padded, Padded]:
    """Splits token blocks into calibration and held-out chunks; sampled sequences are never held out."""
    most = max(1, settings.batch_tokens // tokens.shape[1])
    fitted = streams.fitted_of(len(tokens), held_out_part(settings))
    first, second = (
        streams.chunked(tokens[part], most, None if mask is None else mask[part])
        for part in (slice(fitted), slice(fitted, None))
    )
    return first, second


def checks_of(tokens: np.ndarray, layers: int, settings: PruneSettings) -> int:
    """Returns the number of measurements in the joint steps on a model with ``layers`` blocks."""
    fitted = streams.fitted_of(len(tokens), held_out_part(settings))
    return joint.number_of_checks(joint.groups(layers, fitted, tokens.shape[1], settings, devices.number()))


def held_out_part(settings: PruneSettings) -> float:
    """Returns the held-out fraction of all sequences, including sampled ones, which come first."""
    return settings.held_out / (1 + settings.decided.sampled)


def adjusted(
    config: DecoderConfig,
    outer: Params,
    blocks: Params,
    tokens: tuple[Padded, Padded],
    final: tuple[jax.Array, jax.Array],
    settings: PruneSettings,
    begun: Begun | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """Makes the joint steps on the blocks, which are stacked [L, ...]; those of an earlier run come first.

    What moves is taken out of ``blocks``, to save memory.

    ``final`` contains the dense model's last streams, of the calibration and held-out tokens; see `prune_layers`.
    """
    checks = tuple(report for report in begun.reports if isinstance(report, Check)) if begun else ()
    resumed = joint.Resumed(checks, begun.read(len(begun.reports) - 1)) if begun and checks else None
    yield from (Step(check, dict, fresh=False) for check in checks[:-1])
    params = spread(config, {name: outer[name] for name in ("embed", "head")}) | {"layers": blocks}
    for now in joint.adjusted(config, params, tokens, final, settings, resumed, watch):
        last = () if now.blocks is None else joint.last_of(config, now.blocks)
        yield Step(now.check, now.state, last, now.fresh)
