"""What pruning says of itself while it runs: each step in words, and how long the rest of it will take.

Nothing is printed here: the command line and notebooks show the lines where they want them.
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
"""Kinds of work."""

_STAGES = {
    "none": ("chosen",),
    "bias": ("chosen", "with a bias"),
    "refit": ("chosen", "refit"),
    "alternate": ("chosen", "refit", "adjusted"),
}
"""What the stages of an update are called, in the order of the fields of ``report.Errors``."""


class Said(NamedTuple):
    """What there is to show when a part of the work is done.

    Attributes:
        lines: For a log; none if there is nothing new to tell.
        phase: What is being done, "layer" or "sweep 1"; of several runs "2 of 3, layer".
        done: How many layers of the phase are done.
        total: How many layers it has.
        left: How long the rest of all the work takes, in words; empty while there is no basis for it.
    """

    lines: tuple[str, ...]
    phase: str
    done: int
    total: int
    left: str


class Progress:
    """Follows one run of pruning, or several in a row that differ in their settings, and tells how long the rest takes.

    A step that an earlier process made counts with the seconds that it took then, so that there is an estimate from the
    first step after an interruption on.
    """

    def __init__(
        self,
        config: DecoderConfig,
        runs: Sequence[PruneSettings],
        shape: tuple[int, int],
        judged: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Counts the work of all the runs; the first one begins.

        Args:
            config: The dense decoder.
            runs: The settings of each run.
            shape: Calibration sequences, with those that the dense model wrote, and their tokens.
            judged: Windows on which perplexity is measured at the end of each run.
            clock: Gives the time in seconds.
        """
        self._clock, self._pace = clock, Pace()
        self._runs = [_Run.of(config, settings, shape, judged) for settings in runs]
        self.begin(0)

    def begin(self, number: int) -> Said:
        """The run with this number begins; what is left of those before it will not be done."""
        self._run, self._later = self._runs[number], self._runs[number + 1 :]
        self._made, self._judged, self._fresh = 0, 0, False
        self._last = self._clock()
        self._place = f"{number + 1} of {len(self._runs)}, " if len(self._runs) > 1 else ""
        return self._said((), 0, 0)

    def step(self, report: LayerReport | SweepReport, fresh: bool = True) -> Said:
        """A layer was pruned, or adjusted in a sweep.

        Args:
            report: What was done.
            fresh: Whether it was done just now, and not by an earlier process.
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
        """So many of the equal parts of the steps that a sweep makes on several layers together were done."""
        run = self._run
        sweep, first = divmod((self._made - run.layers) // parts * parts, run.layers)
        self._reach(run.layers * (sweep + 1) + first + done)
        line = f"{run.swept(sweep, first)}  {_ended(f'part {done + 1} of {parts}', self._left())} ..."
        return self._said((line,), sweep + 1, first + done)

    def measured(self, done: int, total: int) -> None:
        """Perplexity was measured on some of the windows, before or after pruning."""
        now = self._clock()
        if done > self._judged:
            self._pace = self._pace.after(_PERPLEXITY, done - self._judged, now - self._last)
        self._judged, self._last = done % total, now

    def _reach(self, made: int, seconds: float | None = None) -> None:
        """So many pieces of the run are made, the last of them in the time since the one before, or in so many seconds.

        The first that this process makes compiles, whatever an earlier one did.
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
    """On which tokens a number was measured."""
    return "held-out" if held_out else "calibration"


def _ended(words: str, left: str) -> str:
    return f"{words}, {left}" if left else words


@dataclass(frozen=True)
class _Run:
    """One run.

    Attributes:
        layers: Of the model.
        together: How many of them a sweep adjusts together.
        stages: What the stages of the errors are called.
        held_out: Whether there are tokens that only judge.
        pieces: The kind of each piece of the work and its size: the layers, then in every sweep as many parts, then the
            perplexity.
    """

    layers: int
    together: int
    stages: tuple[str, ...]
    held_out: bool
    pieces: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, config: DecoderConfig, settings: PruneSettings, shape: tuple[int, int], judged: int) -> Self:
        """Counts the floating-point operations of one device, as if all layers were of one width."""
        sequences = shape[0] // (1 + settings.decided.sampled)
        even = dataclasses.replace(config, widths=()), settings.replace(allocation="uniform")
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
        """The layers that a sweep adjusts together with one."""
        first = layer // self.together * self.together
        return range(first, first + self.together)

    def layer_lines(self, report: LayerReport) -> tuple[str, ...]:
        """What became of a layer; of its attention in a line of its own."""
        where = f"layer {report.layer + 1}/{self.layers}"
        stages = list(self.stages)
        words = self._errors(report, stages)
        if "adjusted" in stages and not report.rounds:
            words = f"{self._errors(report, stages[:-1])}, no further gain"
        if report.attention is None:
            return (f"{where}  {words}",)
        return f"{where}  attention, {self._errors(report.attention, stages[:2])}", f"{where}  {words}"

    def sweep_lines(self, report: SweepReport) -> tuple[str, ...]:
        """What became of layers in a sweep; those that are adjusted together have one line."""
        first = self.group(report.layer).start
        if report.layer > first:
            return ()
        words = f"{_judged(self.held_out)} divergence: {report.before:.4f} to {report.after:.4f}"
        return (f"{self.swept(report.sweep, first)}  {words}{'' if report.taken else ', not taken'}",)

    def swept(self, sweep: int, first: int) -> str:
        """The layers that a sweep adjusts together from this one on, for the beginning of a line."""
        several = f"s {first + 1}-{first + self.together}" if self.together > 1 else f" {first + 1}"
        return f"{_SWEEP} {sweep + 1}, layer{several}/{self.layers}"

    @staticmethod
    def _errors(report: LayerReport | AttentionReport, stages: Sequence[str]) -> str:
        errors = dataclasses.astuple(report.held_out or report.calibration)
        shown = ", ".join(f"{stage} {percent_text(error)}" for stage, error in zip(stages, errors, strict=False))
        return f"{_judged(bool(report.held_out))} error: {shown}"
