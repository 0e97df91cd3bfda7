"""Runs that prune a model with one method after another, and evaluate the results."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

import spap_jax as spap
from benchmarks.quality.cases import LENGTH, Case
from benchmarks.quality.methods import settings_hash, settings_of
from benchmarks.quality.results import Key, Row
from benchmarks.quality.scope import Cell
from spap_jax.data.tokens import TokenBlocks
from spap_jax.evaluation.perplexity import compare
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.plan import Request
from spap_jax.planning.plan import plan as planned

SEQUENCES = 1024
"""Number of calibration sequences by default: as many tokens as the 128 sequences of 2048 of ``spap prune``."""


@dataclass(frozen=True)
class Amount:
    """Amount of text in a run: calibration sequences, and evaluation windows (None for all)."""

    sequences: int
    windows: int | None

    @property
    def judged(self) -> str:
        """The number of windows in the format of the rows."""
        return "all" if self.windows is None else str(self.windows)


@dataclass(frozen=True)
class MeasuredRun:
    """One model, pruned with one method on one sample of the calibration text."""

    case: Case
    method: str
    settings: spap.PruneSettings
    amount: Amount

    @property
    def key(self) -> Key:
        """The key of the row that the run produces.

        Raises:
            UserError: a file of the model or a text cannot be read.
        """
        run = (self.case.name, self.settings.sparsity, self.method, self.settings.seed)
        return (*run, self.amount.sequences, self.amount.judged, settings_hash(self.settings), self.case.files_hash)

    @property
    def name(self) -> str:
        """The label shown while it runs."""
        return f"{self.case.name}, {self.settings.sparsity:.0%}, {self.method}, seed {self.settings.seed}"


def plan(cases: Sequence[Case], cells: Sequence[Cell], seeds: Sequence[int], amount: Amount) -> list[MeasuredRun]:
    """Lists all runs, by model and then by seed.

    Raises:
        UserError: a method or setting is invalid, or two models have the same name.
    """
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise spap.UserError(f"models are told apart by their folders' names, but these are {', '.join(names)}.")
    order = itertools.product(cases, seeds, cells)
    return [MeasuredRun(case, method, settings_of(method, cut, seed), amount) for case, seed, (cut, method) in order]


def execute(runs: Sequence[MeasuredRun], commit: str, starting: Callable[[MeasuredRun], None]) -> Iterator[Row]:
    """Yields the row of every run; consecutive runs of the same model share its weights and texts in memory.

    Args:
        runs: Runs to execute.
        commit: Commit of the code.
        starting: Called before each run.
    """
    for case, of_case in itertools.groupby(runs, lambda run: run.case):
        model = spap.load(case.model)
        texts = Texts(case, model)
        for run in of_case:
            starting(run)
            yield measure(model, run, texts, commit)
        jax.clear_caches()  # programs compiled for one model are of no use to the next


class Texts:
    """Token blocks of one case; the latest of each kind are cached."""

    def __init__(self, case: Case, model: spap.Model) -> None:
        self._case = case
        self._common: dict[str, Any] = {
            "tokenizer": case.model,
            "sequence_length": LENGTH,
            "vocabulary": model.config.vocabulary,
        }
        self._latest: dict[str, tuple[Any, TokenBlocks]] = {}

    def calibration(self, sequences: int, seed: int) -> TokenBlocks:
        """Returns sequences sampled with the seed."""
        return self._load("calibration", self._case.calibration, sequences=sequences, seed=seed)

    def evaluation(self, windows: int | None) -> np.ndarray:
        """Returns the first windows, [B, T]."""
        return self._load("evaluation", self._case.evaluation, sequences=windows).tokens

    def _load(self, role: Any, path: Path, **asked: Any) -> TokenBlocks:
        if role not in self._latest or self._latest[role][0] != asked:
            self._latest[role] = (asked, spap.load_tokens(path, role=role, **asked, **self._common))
        return self._latest[role][1]


def measure(model: spap.Model, run: MeasuredRun, texts: Texts, commit: str) -> Row:
    """Prunes the model and compares it with the dense one."""
    calibration = texts.calibration(run.amount.sequences, run.settings.seed)
    judged = texts.evaluation(run.amount.windows)
    start, busy = time.perf_counter(), time.process_time()
    pruned = spap.prune(model, calibration, settings=run.settings).model
    jax.block_until_ready(pruned.params)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    found = compare(model, pruned, judged)
    asked = ("model", "sparsity", "method", "seed", "sequences", "windows", "settings", "files")
    known: dict[str, Any] = dict(zip(asked, run.key, strict=True))
    return Row(
        **known,
        dense=found.dense,
        perplexity=found.pruned,
        rise=math.log(found.pruned / found.dense),
        divergence=found.divergence,
        width=pruned.config.intermediate,
        seconds=round(seconds, 2),
        processor_seconds=round(busy, 2),
        teraflops=round(_operations(model, run.settings, calibration.tokens.shape) / 1e12, 3),
        calibration_tokens=calibration.tokens.size,
        evaluation_tokens=judged.size,
        commit=commit,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _operations(model: spap.Model, settings: spap.PruneSettings, shape: tuple[int, int]) -> float:
    """Counts the operations of a run on calibration tokens of a shape [C, T]."""
    request = Request(model.config, settings, *shape, weight_bytes=4)
    return sum(phase.operations for phase in planned(request, mesh_named("h100x1")).phases)
