"""Pruning of a whole model: block by block, each fitted on the stream that the pruned blocks before it produce."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from spap_jax import memory
from spap_jax.models import DecoderConfig, Params
from spap_jax.parallel.placement import layer_to_host, shard_params
from spap_jax.pruning import heads, joint, moments, streams
from spap_jax.pruning import layer as mlp
from spap_jax.pruning.ahead import Ahead
from spap_jax.pruning.run import Dense, Run
from spap_jax.report.schema import AttentionReport, Check, LayerReport, converted

Listener = Callable[[LayerReport | Check, bool], None]
"""Called with each report as soon as it is ready, and whether this run, rather than an interrupted one, made it."""

Json = dict[str, Any]


class Store(Protocol):
    """Keeps what a run has finished: in memory, or where an interrupted run goes on from it.

    In a run of several processes, all of them make all calls.
    """

    def block(self, index: int) -> Any:
        """Returns a finished block of an interrupted run, with `params` and `report`; None if there is none."""
        ...

    def put(self, index: int, layer: Params, report: Json) -> Any:
        """Keeps a finished block, whose parameters are on devices."""
        ...

    def replace(self, index: int, layer: Params) -> None:
        """Keeps a block that joint steps have changed; all of these follow one another, after the last step."""
        ...

    def save_state(self, tree: Any, checks: Sequence[Json]) -> None:
        """May keep the state of the joint steps, arrays on the devices, with their measurements."""
        ...

    def restore_state(self, like: Any) -> tuple[Any, Sequence[Json]] | None:
        """Returns the state of an interrupted run's joint steps, placed like ``like``; None if there is none."""
        ...


class MemoryStore:
    """Keeps the finished blocks in the memory of the host."""

    def __init__(self, config: DecoderConfig) -> None:
        """Prepares for the blocks of a pruned decoder."""
        self.layers: list[Params] = [{}] * config.layers

    def block(self, index: int) -> Any:
        """Returns None: nothing outlives the process."""

    def put(self, index: int, layer: Params, report: Json) -> None:
        """Keeps a finished block."""
        self.replace(index, layer)

    def replace(self, index: int, layer: Params) -> None:
        """Keeps a block that joint steps have changed."""
        self.layers[index] = layer_to_host(layer)

    def save_state(self, tree: Any, checks: Sequence[Json]) -> None:
        """Keeps nothing."""

    def restore_state(self, like: Any) -> tuple[Any, Sequence[Json]] | None:
        """Returns None."""


class PhaseClock:
    """Time by phase, in seconds. A lap blocks until its result is ready, so that time counts for the right phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, result: object = None) -> None:
        """Adds the time since the last lap to a phase."""
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def prune(
    run: Run,
    dense: Dense,
    store: Store,
    report: Listener = lambda *_: None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> list[LayerReport | Check]:
    """Prunes every block in turn, makes joint steps on the last ones, or all of them, and measures the predictions.

    Memory holds one block's weights, its second moments and the streams; it also holds the pruned blocks that joint
    steps change, and the stream before these.

    Args:
        store: Where the blocks go; what it has of an interrupted run is not made again.
        watch: Called after every joint step with the number of steps made and their total.

    Returns:
        The reports of the layers and of the joint steps.

    Raises:
        NotFiniteError: a layer's activations, or the pruned model's predictions, overflow.
    """
    reports: list[LayerReport] = []
    pair = streams.start(run.config, dense.outer, run.fitted), streams.start(run.config, dense.outer, run.held_out)
    entering = tail = None
    ahead, clock = Ahead(run, dense), PhaseClock()
    for index, params in dense.blocks():
        clock.lap("reading", params)
        if index not in run.blocks:
            pair = streams.both(streams.pass_dropped, run.config.of_layer(index), params, pair)
            clock.lap("streams", pair)
            continue
        number = run.blocks.index(index)
        if number == run.first_joint > 0:
            entering = joint.entering(run, pair)
        block = store.block(number)
        if block is None:
            choice = ahead.choice(index, pair[0], clock.lap)
            small, layer_report, pair = prune_block(run, index, params, pair, choice, reports, clock)
            store.put(number, small, dataclasses.asdict(layer_report))
        else:
            small, layer_report = shard_params(run.pruned, block.params), converted(block.report, LayerReport)
            pair = _past_attention(run, index, params, small, pair)
        clock = PhaseClock()
        pair = streams.both(streams.leave_mlp, run.pruned, small, pair)
        clock.lap("streams", pair)
        if number >= run.first_joint:
            tail = joint.with_block(run, tail, number, small)
        reports.append(layer_report)
        report(layer_report, block is None)
        del params, small, block
        memory.return_scraps()
    if run.joint is None or tail is None:
        check = joint.check_without_steps(run, dense.outer, pair)
        report(check, True)
        return [*reports, check]
    steps = joint.make_steps(run, dense.outer, tail, joint.ends(run, pair), entering, store, report, watch)
    del pair, tail  # the steps let go what they need no more
    return [*reports, *steps]


def prune_block(
    run: Run,
    index: int,
    params: Params,
    pair: streams.Pair,
    choice: mlp.Choice | None,
    reports: list[LayerReport],
    clock: PhaseClock,
) -> tuple[Params, LayerReport, streams.Pair]:
    """Prunes one dense block, attention first, and advances the streams to its MLP.

    Args:
        choice: The channels to keep, if they were chosen before.
    """
    params, pair, attention = _prune_attention(run, index, params, pair, clock)
    config = run.fewer_heads.of_layer(index)
    fitted, held_out = (streams.fitting_tokens(part) for part in pair)
    seen = moments.accumulate(config, params, fitted, run.correction)
    clock.lap("statistics", seen)
    if choice is None:
        choice = mlp.choose(run, index, seen)
        clock.lap("selection", choice)
    stages = mlp.update(run, index, params, seen, choice)
    errors = [mlp.error_by_moments(seen, config.mlp_bias, choice.kept, stage) for stage in stages]
    clock.lap("refit", errors)
    del seen
    judged = []
    if held_out.residual.size:
        seen = moments.accumulate(config, params, held_out, run.correction)
        judged = [mlp.error_by_moments(seen, config.mlp_bias, choice.kept, stage) for stage in stages]
        del seen
    clock.lap("errors", judged)
    rounds = 0
    if mlp.rounds_pay(run, reports):
        before = errors[-1], judged[-1] if judged else jax.numpy.float32(0)
        made = mlp.alternate(run, index, params, stages[-1], choice.ridge, before, (fitted, held_out))
        stages, errors, rounds = [*stages, made.weights], [*errors, made.error], int(made.rounds)
        judged = judged and [*judged, made.held_out]
    del fitted, held_out
    clock.lap("alternating", errors)
    mlp.check_finite(index, [errors[-1], *judged[-1:]])
    small = mlp.with_mlp(run, index, params, stages[-1])
    return (
        small,
        LayerReport(
            layer=index,
            kept=tuple(choice.kept.tolist()),
            calibration=mlp.stage_errors(errors),
            held_out=mlp.stage_errors(judged) if judged else None,
            swaps=int(choice.swaps),
            improving_swaps=int(choice.improving),
            ridge=float(choice.ridge),
            rounds=rounds,
            seconds=dict(clock.seconds),
            attention=attention,
        ),
        pair,
    )


def _prune_attention(
    run: Run, index: int, params: Params, pair: streams.Pair, clock: PhaseClock
) -> tuple[Params, streams.Pair, AttentionReport | None]:
    """Prunes the attention of a block, if heads are to be removed, and advances the streams to its MLP."""
    dense, fewer = run.config.of_layer(index), run.fewer_heads.of_layer(index)
    if dense == fewer:
        pair = streams.both(streams.enter_mlp, dense, params, pair)
        clock.lap("streams", pair)
        return params, pair, None
    pair = streams.both(streams.enter_attention, dense, params, pair)
    clock.lap("streams", pair)
    tokens = streams.fitting_tokens(pair[0]), streams.fitting_tokens(pair[1])
    params, report = heads.prune_heads(run, index, params, tokens)
    del tokens
    clock.lap("attention")
    pair = streams.both(streams.leave_attention, fewer, params, pair)
    clock.lap("streams", pair)
    return params, pair, report


def _past_attention(run: Run, index: int, params: Params, small: Params, pair: streams.Pair) -> streams.Pair:
    """Advances the streams to the MLP of an already pruned block, by the same programs and so to the same bits."""
    dense, fewer = run.config.of_layer(index), run.fewer_heads.of_layer(index)
    if dense == fewer:
        return streams.both(streams.enter_mlp, dense, params, pair)
    pair = streams.both(streams.enter_attention, dense, params, pair)
    return streams.both(streams.leave_attention, fewer, params | {"attention": small["attention"]}, pair)
