"""Progress messages of a pruning run: a description of each step, and an estimate of the remaining time.

Nothing is printed here; the command line and notebooks display the lines.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from spap_jax.baselines import update_used
from spap_jax.models.config import DecoderConfig
from spap_jax.pace import Pace
from spap_jax.planning.operations import operations, sweep_step_operations
from spap_jax.planning.workload import workload
from spap_jax.pruning.report import AttentionReport, LayerReport, SweepReport
from spap_jax.quantities import duration_text, percent_text
from spap_jax.settings import PruneSettings

_LAYER, _SWEEP, _PERPLEXITY = "layer", "sweep", "perplexity"
"""Kinds of work that the pace is measured for."""

_STAGES = {
    "none": ("chosen",),
    "bias": ("chosen", "with a bias"),
    "refit": ("chosen", "refit"),
    "alternate": ("chosen", "refit", "adjusted"),
}
"""Names of the stages of each update, in the order of the fields of ``report.Errors``."""


class Said(NamedTuple):
    """Progress to display after a part of the work is done.

    Attributes:
        lines: Log lines; empty if there is nothing new to report.
        phase: The current phase, "layer" or "sweep 1"; with several runs "2 of 3, layer".
        done: Number of layers done in this phase.
        total: Number of layers in this phase.
        left: Estimated time for all remaining work, in words; empty while there is no basis for an estimate.
    """

    lines: tuple[str, ...]
    phase: str
    done: int
    total: int
    left: str


class Progress:
    """Tracks one pruning run, or several consecutive ones with different settings, and estimates the remaining time.

    A step made by an earlier process counts with the seconds that it took then, so that an estimate is available from
    the first step after an interruption.
    """

    def __init__(
        self,
        config: DecoderConfig,
        runs: Sequence[PruneSettings],
        shape: tuple[int, int],
        judged: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Counts the work of all runs, and begins the first one.

        Args:
            config: The dense decoder.
            runs: The settings of each run.
            shape: Number of calibration sequences, including those that the dense model wrote, and their length.
            judged: Number of windows on which perplexity is measured at the end of each run.
            clock: Returns the time in seconds.
        """
        self._clock, self._pace = clock, Pace()
        self._runs = [_Run.of(config, settings, shape, judged) for settings in runs]
        self.begin(0)

    def begin(self, number: int) -> Said:
        """Begins the run with this number; remaining work of earlier runs is no longer counted."""
        self._run, self._later = self._runs[number], self._runs[number + 1 :]
        self._made, self._judged, self._fresh = 0, 0, False
        self._last = self._clock()
        self._place = f"{number + 1} of {len(self._runs)}, " if len(self._runs) > 1 else ""
        return self._said((), 0, 0)

    def step(self, report: LayerReport | SweepReport, fresh: bool = True) -> Said:
        """Records that a layer was pruned, or adjusted in a sweep.

        Args:
            report: The report of the step.
            fresh: Whether this process made the step, rather than an earlier one.
        """
        run = self._run
        if isinstance(report, LayerReport):
            lines, sweep, done = run.layer_lines(report), 0, report.layer + 1
        else:
            lines, sweep, done = run.sweep_lines(report), report.sweep + 1, run.group(report.layer).stop
        seconds = sum(report.seconds.values())
        self._reach(run.layers * sweep + done, None if fresh else seconds)
        end = _ended(duration_text(seconds, digits=2), self._left()) if fresh else "kept"
        return self._said((*lines[:-1], *(f"{line}  {end}" for line in lines[-1:])), sweep, done)

    def part(self, done: int, parts: int) -> Said:
        """Records that ``done`` of ``parts`` equal parts of a sweep's steps on several layers were made."""
        run = self._run
        sweep, first = divmod((self._made - run.layers) // parts * parts, run.layers)
        self._reach(run.layers * (sweep + 1) + first + done)
        line = f"{run.swept(sweep, first)}  {_ended(f'part {done + 1} of {parts}', self._left())} ..."
        return self._said((line,), sweep + 1, first + done)

    def measured(self, done: int, total: int) -> None:
        """Records that perplexity was measured on some of the windows, before or after pruning."""
        now = self._clock()
        if done > self._judged:
            self._pace = self._pace.after(_PERPLEXITY, done - self._judged, now - self._last)
        self._judged, self._last = done % total, now

    def _reach(self, made: int, seconds: float | None = None) -> None:
        """Records that ``made`` pieces of the run are done, the new ones in ``seconds`` (by default, since the last).

        The first piece that this process makes includes compilation, regardless of earlier processes.
        """
        if made <= self._made:
            return
        if seconds is None and not self._fresh:
            self._pace, self._fresh = self._pace.cold(), True
        now = self._clock()
        pieces = self._run.pieces[self._made : made]
        took = now - self._last if seconds is None else seconds
        self._pace = self._pace.after(pieces[0][0], sum(units for _, units in pieces), took)
        self._made, self._last = made, now

    def _said(self, lines: tuple[str, ...], sweep: int, done: int) -> Said:
        phase = f"{_SWEEP} {sweep}" if sweep else _LAYER
        return Said(lines, f"{self._place}{phase}", done, self._run.layers, self._left())

    def _left(self) -> str:
        todo = [self._run.pieces[self._made :], *(run.pieces for run in self._later)]
        return self._pace.left(itertools.chain(*todo)).words


def _judged(held_out: bool) -> str:
    """Names the tokens on which a number was measured."""
    return "held-out" if held_out else "calibration"


def _ended(words: str, left: str) -> str:
    return f"{words}, {left}" if left else words


@dataclass(frozen=True)
class _Run:
    """The work of one run.

    Attributes:
        layers: Number of layers of the model.
        together: Number of layers that a sweep adjusts together.
        stages: Names of the error stages.
        held_out: Whether there are held-out tokens.
        pieces: Kind and size of each piece of work: one per layer, then one per layer of every sweep, then the
            perplexity.
    """

    layers: int
    together: int
    stages: tuple[str, ...]
    held_out: bool
    pieces: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, config: DecoderConfig, settings: PruneSettings, shape: tuple[int, int], judged: int) -> Self:
        """Counts the floating-point operations of one device, assuming that all layers have the same width."""
        sequences = shape[0] // (1 + settings.decided.sampled)
        even = dataclasses.replace(config, widths=None), settings.replace(allocation="uniform")
        load = workload(*even, sequences, shape[1])
        layer = sum(count for name, count in operations(load).items() if not name.startswith(("sweep", "sampling")))
        layers, more = config.layers, load.together - 1
        parts = [
            sweep_step_operations(load, layers - 1 - more - index // load.together * load.together, more)
            for index in range(layers)
        ]
        pieces = [(_LAYER, layer)] * layers + [(_SWEEP, part) for part in parts] * load.sweeps
        stages = _STAGES[update_used(settings)]
        return cls(
            layers=layers,
            together=load.together,
            stages=stages if settings.rounds else stages[:2],
            held_out=load.held_out.count > 0,
            pieces=(*pieces, *([(_PERPLEXITY, judged)] if judged else [])),
        )

    def group(self, layer: int) -> range:
        """Returns the layers that a sweep adjusts together with ``layer``."""
        first = layer // self.together * self.together
        return range(first, first + self.together)

    def layer_lines(self, report: LayerReport) -> tuple[str, ...]:
        """Describes the result of pruning a layer; attention gets a separate line."""
        where = f"layer {report.layer + 1}/{self.layers}"
        stages = list(self.stages)
        words = self._errors(report, stages)
        if "adjusted" in stages and not report.rounds:
            words = f"{self._errors(report, stages[:-1])}, no further gain"
        if report.attention is None:
            return (f"{where}  {words}",)
        return f"{where}  attention, {self._errors(report.attention, stages[:2])}", f"{where}  {words}"

    def sweep_lines(self, report: SweepReport) -> tuple[str, ...]:
        """Describes the result of a sweep step; layers that are adjusted together share one line."""
        first = self.group(report.layer).start
        if report.layer > first:
            return ()
        words = f"{_judged(self.held_out)} divergence: {report.before:.4f} to {report.after:.4f}"
        return (f"{self.swept(report.sweep, first)}  {words}{'' if report.taken else ', not taken'}",)

    def swept(self, sweep: int, first: int) -> str:
        """Names the layers that a sweep adjusts together, starting from layer ``first``, for the start of a line."""
        several = f"s {first + 1}-{first + self.together}" if self.together > 1 else f" {first + 1}"
        return f"{_SWEEP} {sweep + 1}, layer{several}/{self.layers}"

    @staticmethod
    def _errors(report: LayerReport | AttentionReport, stages: Sequence[str]) -> str:
        errors = dataclasses.astuple(report.held_out or report.calibration)
        shown = ", ".join(f"{stage} {percent_text(error)}" for stage, error in zip(stages, errors, strict=False))
        return f"{_judged(bool(report.held_out))} error: {shown}"
