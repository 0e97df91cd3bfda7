"""Progress messages of a pruning run: a description of each step, and an estimate of the remaining time.

Nothing is printed here; the command line and notebooks display the lines.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from spap_jax.models import DecoderConfig
from spap_jax.pace import Pace
from spap_jax.planning.workload import workload
from spap_jax.quantities import duration_text, percent_text
from spap_jax.report.schema import AttentionReport, Check, LayerReport
from spap_jax.settings import PruneSettings
from spap_jax.solver.methods import update_used

_LAYER, _STEP, _PERPLEXITY = "layer", "step", "perplexity"
"""Kinds of work that the pace is measured for."""

_STAGES = {
    "none": ("chosen",),
    "bias": ("chosen", "with a bias"),
    "refit": ("chosen", "refit"),
    "alternate": ("chosen", "refit", "adjusted"),
}
"""Names of the stages of each update, in the order of the fields of ``schema.Errors``."""


class Said(NamedTuple):
    """Progress to display after a part of the work is done.

    Attributes:
        lines: Log lines; empty if there is nothing new to report.
        phase: The current phase, "layer" or "step"; with several runs "2 of 3, layer".
        done: Number of layers or steps done in this phase.
        total: Number of layers or steps in this phase.
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
        self._runs = [_Work(config, settings, shape, judged) for settings in runs]
        self.begin(0)

    def begin(self, number: int) -> Said:
        """Begins the run with this number; remaining work of earlier runs is no longer counted."""
        self._run, self._later = self._runs[number], self._runs[number + 1 :]
        self._made, self._judged, self._fresh = {_LAYER: 0, _STEP: 0}, 0, False
        self._last = self._clock()
        self._place = f"{number + 1} of {len(self._runs)}, " if len(self._runs) > 1 else ""
        return self._said((), _LAYER)

    def step(self, report: LayerReport | Check, fresh: bool = True) -> Said:
        """Records that a layer was pruned, or that joint steps were made and measured.

        Args:
            report: The report of the step.
            fresh: Whether this process made the step, rather than an earlier one.
        """
        run = self._run
        if isinstance(report, LayerReport):
            lines, kind, done, seconds = run.layer_lines(report), _LAYER, report.layer + 1, sum(report.seconds.values())
        else:
            lines, kind, done, seconds = run.check_lines(report), _STEP, report.step, report.seconds
        self._reach(kind, done, None if fresh else seconds)
        end = _ended(duration_text(seconds, digits=2), self._left()) if fresh else "kept"
        return self._said((*lines[:-1], f"{lines[-1]}  {end}"), kind)

    def part(self, done: int, steps: int) -> Said:
        """Records that ``done`` of all joint steps were made."""
        self._reach(_STEP, done)
        return self._said((f"{_ended(f'{_STEP} {done}/{steps}', self._left())} ...",), _STEP)

    def measured(self, done: int, total: int) -> None:
        """Records that perplexity was measured on some of the windows, before or after pruning."""
        now = self._clock()
        if done > self._judged:
            self._pace = self._pace.after(_PERPLEXITY, done - self._judged, now - self._last)
        self._judged, self._last = done % total, now

    def _reach(self, kind: str, made: int, seconds: float | None = None) -> None:
        """Records that ``made`` pieces of a kind are done, the new ones in ``seconds`` (by default, since the last).

        The first piece that this process makes includes compilation, regardless of earlier processes.
        """
        new = made - self._made[kind]
        if new <= 0:
            return
        if seconds is None and not self._fresh:
            self._pace, self._fresh = self._pace.cold(), True
        now = self._clock()
        took = now - self._last if seconds is None else seconds
        self._pace = self._pace.after(kind, new, took)
        self._made[kind], self._last = made, now

    def _said(self, lines: tuple[str, ...], kind: str) -> Said:
        return Said(lines, f"{self._place}{kind}", self._made[kind], self._run.pieces[kind], self._left())

    def _left(self) -> str:
        mine = [(kind, count - self._made.get(kind, 0)) for kind, count in self._run.pieces.items()]
        todo = [mine, *(run.pieces.items() for run in self._later)]
        return self._pace.left(itertools.chain(*todo))


def _judged(held_out: bool) -> str:
    """Names the tokens on which a number was measured."""
    return "held-out" if held_out else "calibration"


def _ended(words: str, left: str) -> str:
    return f"{words}, {left}" if left else words


class _Work:
    """The work of one run.

    Attributes:
        layers: Number of layers of the model.
        stages: Names of the error stages.
        held_out: Whether there are held-out tokens.
        pieces: Number of pieces of each kind of work, in order.
    """

    def __init__(self, config: DecoderConfig, settings: PruneSettings, shape: tuple[int, int], judged: int) -> None:
        sequences = shape[0] // (1 + settings.sampled)
        even = dataclasses.replace(config, widths=None), settings.replace(allocation="uniform")
        load = workload(*even, sequences, shape[1])
        stages = _STAGES[update_used(settings)]
        self.layers = config.layers
        self.stages = stages if settings.rounds else stages[:2]
        self.held_out = load.held_out.count > 0
        self.pieces = {_LAYER: config.layers, _STEP: load.joint_steps, _PERPLEXITY: judged}

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

    def check_lines(self, check: Check) -> tuple[str, ...]:
        """Describes a measurement after joint steps."""
        words = f"{_judged(self.held_out)} loss {check.held_out:.4f}{'' if check.taken else ', not kept'}"
        return (f"{_STEP} {check.step}/{self.pieces[_STEP]}  {words}",)

    @staticmethod
    def _errors(report: LayerReport | AttentionReport, stages: Sequence[str]) -> str:
        errors = dataclasses.astuple(report.held_out or report.calibration)
        shown = ", ".join(f"{stage} {percent_text(error)}" for stage, error in zip(stages, errors, strict=False))
        return f"{_judged(bool(report.held_out))} error: {shown}"
