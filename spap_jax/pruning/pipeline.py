"""Sequential pruning: each block is fitted on the stream that the previous pruned blocks produce.

Its channels are selected on that stream too, or in advance on the dense stream (`waves`).
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence

import jax.numpy as jnp

from spap_jax import memory
from spap_jax.checkpoint.ahead import blocks_in_order
from spap_jax.models import Params, with_channels
from spap_jax.numerics import storage
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import fully_sharded_spec, shard_params, zeros_for_blocks
from spap_jax.pruning import joint, streams
from spap_jax.pruning.heads import prune_attention
from spap_jax.pruning.layer import Choice, PhaseClock, prune_layer
from spap_jax.pruning.predictions import set_layer
from spap_jax.pruning.run import Run, Step
from spap_jax.pruning.streams import Streams
from spap_jax.report.schema import LayerReport
from spap_jax.settings import EFFORTS, EffortName, PruneSettings


def prune_layers(run: Run, watch: Callable[[int, int], None] | None = None) -> Generator[Step, None, None]:
    """Prunes every block in turn, and then makes joint steps on the pruned model.

    A block's attention is pruned before its MLP, or left unchanged.

    Memory holds one block's weights, its second moments and the two streams, and a block is read while the one before
    it is pruned; it also holds the pruned blocks that joint steps change, and the stream before these.
    The parallel schedule also reads each block once before.

    Args:
        run: The run.
        watch: Called after every joint step, with the number of steps made and their total.

    Yields:
        Each step as soon as it is made; steps of the earlier run come first, in order.

    Raises:
        NotFiniteError: a layer's activations, or the pruned model's predictions, overflow.
    """
    config, narrow, made = run.config, run.narrow, run.begun.reports
    if len(made) == config.layers and not run.jointly:
        for number, report in enumerate(made):
            yield Step(report, dict, [(number, run.begun.read(number))], fresh=False)
        return
    clock = PhaseClock()
    dtype = storage(run.settings.stream_dtype)
    both = [streams.start(config, run.outer, part, dtype) for part in (run.fitted, run.held_out)]
    clock.lap("streams", both)
    blocks, entering, reports = None, (None, None), []
    for wave in _waves(run):
        ahead = run.settings.schedule == "parallel" and wave.stop > len(made)
        choices = run.choices.of(wave, run, both[0], clock) if ahead else []
        for index, dense in blocks_in_order(config, run.read_layer, wave):
            dense = resized(dense, config.of_layer(index).intermediate)
            clock.lap("reading", dense)
            if index == run.tail_start > 0:
                entering = streams.rounded(both[0].pruned), jnp.copy(_judged(run, both).pruned)
            if index < len(made):
                layer, report = shard_params(narrow, run.begun.read(index)), made[index]
                both = _past(run, index, dense, layer, both)
            else:
                choice = choices[index - wave.start] if choices else None
                settings = run.settings if rounds_pay(reports, run.settings.effort) else run.settings.replace(rounds=0)
                layer, report, both = _prune_block(run, settings, index, dense, both, choice, clock)
            reports.append(report)
            del dense
            in_tail = index >= run.tail_start
            if in_tail:
                blocks = zeros_for_blocks(run.tail, layer, fully_sharded_spec) if blocks is None else blocks
                blocks = set_layer(blocks, index - run.tail_start, layer)
            final = [] if in_tail else [(index, layer)]
            yield Step(report, lambda layer=layer: mesh.to_host(layer), final, fresh=index >= len(made))
            del layer, final
            memory.return_scraps()
            clock = PhaseClock()
    if blocks is not None:
        fitted, judged = both[0].dense, _judged(run, both).dense
        del both  # the pruned streams are of no more use, and make room for the rounded one
        ends = streams.rounded(fitted), judged
        del fitted
        for step in joint.adjusted(run, blocks, ends, entering, watch):
            yield step
            del step
            memory.return_scraps()


def _judged(run: Run, both: list[Streams]) -> Streams:
    """Returns the streams of the tokens on which joint steps are measured: the held-out ones, if there are any."""
    return both[run.held_out.real > 0]


def _waves(run: Run) -> list[range]:
    """Returns the layers whose channels are selected together; in the sequential schedule, all are in one wave."""
    layers = run.config.layers
    size = mesh.data_size() if run.settings.schedule == "parallel" else layers
    return [range(start, min(start + size, layers)) for start in range(0, layers, size)]


def rounds_pay(reports: Sequence[LayerReport], effort: EffortName) -> bool:
    """Whether alternating rounds are worth their time: not after layers in a row whose errors they hardly lowered.

    Rounds take longer than all else in a layer. In models of some million parameters they take off a fifth of its error
    and more, in larger ones often a hundredth.

    Args:
        reports: Reports of the layers that are done; a layer without rounds gained nothing.
        effort: The effort of the run.
    """
    meant = EFFORTS[effort]
    last = [report.held_out or report.calibration for report in reports[-meant.trials :]]
    return len(last) < meant.trials or any(each.alternating < (1 - meant.worth) * each.refit for each in last)


def _prune_block(
    run: Run,
    settings: PruneSettings,
    index: int,
    layer: Params,
    both: list[Streams],
    choice: Choice | None,
    clock: PhaseClock,
) -> tuple[Params, LayerReport, list[Streams]]:
    """Prunes one dense block; returns its parameters, its report, and the streams after it.

    ``both`` are the streams of the tokens to fit and of the held-out tokens; the latter may be empty.
    """
    config = run.config.of_layer(index)
    fewer_heads = config.with_kv_heads(run.narrow.kv_heads)
    attention = None
    if fewer_heads == config:
        both = [streams.enter_mlp(config, layer, s) for s in both]
    else:
        layer, both, attention = prune_attention(index, config, fewer_heads, layer, both, settings, clock)
    clock.lap("streams", both)
    calibration, held_out = (streams.fitting_tokens(s) for s in both)
    own = run.narrow.of_layer(index)
    layer, report = prune_layer(index, fewer_heads, own, layer, calibration, held_out, settings, clock, choice)
    layer = resized(layer, run.narrow.intermediate)
    del calibration, held_out
    both = [streams.leave_mlp(run.narrow, layer, s) for s in both]
    clock.lap("streams", both)
    return layer, dataclasses.replace(report, attention=attention, seconds=dict(clock.seconds)), both


def resized(layer: Params, width: int) -> Params:
    """Truncates or zero-pads a block's MLP to ``width`` channels; see ``decoder.with_channels``."""
    return layer | {"mlp": with_channels(layer["mlp"], width)}


def _past(run: Run, index: int, dense: Params, layer: Params, both: list[Streams]) -> list[Streams]:
    """Advances the streams past an already pruned block, with the programs of ``_prune_block``: bitwise equal."""
    config = run.config.of_layer(index)
    fewer_heads = config.with_kv_heads(run.narrow.kv_heads)
    if fewer_heads == config:
        both = [streams.enter_mlp(config, dense, s) for s in both]
    else:
        small = dense | {"attention": layer["attention"]}
        both = [streams.enter_attention(config, dense, s) for s in both]
        both = [streams.leave_attention(fewer_heads, small, s) for s in both]
    return [streams.leave_mlp(run.narrow, layer, s) for s in both]
