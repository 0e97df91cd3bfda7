"""Sequential pruning: each block is fitted on the stream that the previous pruned blocks produce.

Its channels are selected on that stream too, or in advance on the dense stream (`waves`).
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from spap_jax import devices, memory
from spap_jax.errors import NotFiniteError
from spap_jax.models.decoder import Params, with_channels
from spap_jax.numerics import storage
from spap_jax.placement import shard_params, zeros_for_blocks
from spap_jax.pruning import joint, streams
from spap_jax.pruning.heads import prune_attention
from spap_jax.pruning.layer import Choice, PhaseClock, layer_report, prune_layer
from spap_jax.pruning.predictions import set_layer
from spap_jax.pruning.prune_report import LayerReport
from spap_jax.pruning.run import Run, Step
from spap_jax.pruning.streams import Streams


def prune_layers(run: Run, watch: Callable[[int, int], None] | None = None) -> Iterator[Step]:
    """Prunes every block in turn, and then makes joint steps on the pruned model.

    A block's attention is pruned before its MLP, or left unchanged.

    Without joint steps, memory holds one block's weights, its second moments and the two streams, and a block is read
    when its turn comes; with them, it also holds all pruned blocks. The parallel schedule also reads each block once
    before.

    Args:
        run: The run.
        watch: Called after every joint step, with the number of steps made and their total.

    Yields:
        Each step as soon as it is made; steps of the earlier run come first, in order.

    Raises:
        UserError: a layer's activations are not finite.
    """
    config, narrow, made = run.config, run.narrow, run.begun.reports
    if len(made) == config.layers and not run.jointly:
        for number, report in enumerate(made):
            yield Step(report, dict, [(number, run.begun.read(number))], fresh=False)
        return
    clock = PhaseClock()
    dtype, correction = storage(run.settings.stream_dtype), run.settings.fit.correction
    both = [streams.start(config, run.outer, part, dtype, correction) for part in (run.fitted, run.held_out)]
    clock.lap("streams", both)
    blocks, choices, wave = None, [], devices.mesh_size()
    for index in range(config.layers):
        if run.settings.schedule == "parallel" and index % wave == 0 and index + wave > len(made):
            choices = run.choices.of(range(index, min(index + wave, config.layers)), run, both[0], clock)
        dense = resized(shard_params(config, run.read_layer(index)), config.of_layer(index).intermediate)
        clock.lap("reading", dense)
        if index < len(made):
            layer, report = shard_params(narrow, run.begun.read(index)), made[index]
            both = _past(run, index, dense, layer, both)
        else:
            choice = choices[index % wave] if choices else None
            layer, report, both = _prune_block(run, index, dense, both, choice, clock)
        del dense
        if run.jointly:
            blocks = set_layer(zeros_for_blocks(narrow, layer) if blocks is None else blocks, index, layer)
        kept = devices.to_host(layer)
        final = [] if run.jointly else [(index, kept)]
        yield Step(report, lambda kept=kept: kept, final, fresh=index >= len(made))
        del layer, kept, final
        memory.return_scraps()
        clock = PhaseClock()
    if blocks is not None:
        ends = both[0].dense, both[1].dense
        del both
        yield from joint.adjusted(run, blocks, ends, watch)


def _prune_block(
    run: Run, index: int, layer: Params, both: list[Streams], choice: Choice | None, clock: PhaseClock
) -> tuple[Params, LayerReport, list[Streams]]:
    """Prunes one dense block; returns its parameters, its report, and the streams after it.

    ``both`` are the streams of the tokens to fit and of the held-out tokens; the latter may be empty.
    """
    config, settings = run.config.of_layer(index), run.settings
    fewer_heads = config.with_kv_heads(run.narrow.kv_heads)
    attention = None
    if fewer_heads == config:
        both = [streams.enter_mlp(config, layer, s, settings.fit.correction) for s in both]
    else:
        layer, both, attention = prune_attention(index, config, fewer_heads, layer, both, settings, clock)
    clock.lap("streams", both)
    calibration, held_out = (streams.fitting_tokens(s) for s in both)
    own = run.narrow.of_layer(index)
    layer, solved = prune_layer(index, fewer_heads, own, layer, calibration, held_out, settings, clock, choice)
    layer = resized(layer, run.narrow.intermediate)
    del calibration, held_out
    (fitted, error), (judged, held_out_error) = (streams.leave_mlp(run.narrow, layer, s) for s in both)
    clock.lap("streams", (fitted, judged))
    if not np.isfinite(error):
        raise NotFiniteError(
            f"the activations of layer {index} are not finite: they overflow in float32, and would again with these "
            "settings, so look whether the model computes what it should (spap eval)."
        )
    report = layer_report(index, solved, error, held_out_error if judged.dense.size else None, clock)
    return layer, dataclasses.replace(report, attention=attention), [fitted, judged]


def resized(layer: Params, width: int) -> Params:
    """Truncates or zero-pads a block's MLP to ``width`` channels; see ``decoder.with_channels``."""
    return layer | {"mlp": with_channels(layer["mlp"], width)}


def _past(run: Run, index: int, dense: Params, layer: Params, both: list[Streams]) -> list[Streams]:
    """Advances the streams past an already pruned block, with the programs of ``_prune_block``: bitwise equal."""
    config, correction = run.config.of_layer(index), run.settings.fit.correction
    fewer_heads = config.with_kv_heads(run.narrow.kv_heads)
    if fewer_heads == config:
        both = [streams.enter_mlp(config, dense, s, correction) for s in both]
    else:
        small = dense | {"attention": layer["attention"]}
        both = [streams.enter_attention(config, dense, s) for s in both]
        both = [streams.leave_attention(fewer_heads, small, s, correction) for s in both]
    return [streams.leave_mlp(run.narrow, layer, s)[0] for s in both]
