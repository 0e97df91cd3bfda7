"""Prunes one model in one way after another, and measures what is left."""

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
from benchmarks.quality import ideas
from benchmarks.quality.cases import LENGTH, Case
from benchmarks.quality.methods import idea_of, settings_hash, settings_of
from benchmarks.quality.results import Key, Row
from benchmarks.quality.scope import Cell
from spap_jax.data import TokenBlocks
from spap_jax.evaluation.divergence import compare


@dataclass(frozen=True)
class Amount:
    """How much text a run sees: calibration sequences, and evaluation windows (all of them where None)."""

    sequences: int
    windows: int | None

    @property
    def judged(self) -> str:
        """The windows as rows have them."""
        return "all" if self.windows is None else str(self.windows)


@dataclass(frozen=True)
class Run:
    """One model, pruned in one way on one draw of the calibration text."""

    case: Case
    method: str
    settings: spap.PruneSettings
    amount: Amount

    @property
    def key(self) -> Key:
        """As the key of the row that the run gives.

        Raises:
            UserError: a file of the model or a text cannot be read.
        """
        run = (self.case.name, self.settings.sparsity, self.method, self.settings.seed)
        return (*run, self.amount.sequences, self.amount.judged, settings_hash(self.settings), self.case.files_hash)

    @property
    def name(self) -> str:
        """What is shown while it runs."""
        return f"{self.case.name}, {self.settings.sparsity:.0%}, {self.method}, seed {self.settings.seed}"


def plan(cases: Sequence[Case], cells: Sequence[Cell], seeds: Sequence[int], amount: Amount) -> list[Run]:
    """All runs: model by model, in it seed by seed.

    Raises:
        UserError: a method or a setting is none, or two models have one name.
    """
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise spap.UserError(f"models are told apart by their folders' names, but these are {', '.join(names)}.")
    order = itertools.product(cases, seeds, cells)
    return [Run(case, method, settings_of(method, cut, seed), amount) for case, seed, (cut, method) in order]


def execute(runs: Sequence[Run], commit: str, starting: Callable[[Run], None]) -> Iterator[Row]:
    """Yields the row of every run; a model and its texts are read once for the runs in a row that share them.

    Args:
        runs: What to do.
        commit: Of the code.
        starting: Called before each run.
    """
    for case, of_case in itertools.groupby(runs, lambda run: run.case):
        model = spap.load(case.model)
        texts = Texts(case, model)
        for run in of_case:
            starting(run)
            yield measure(model, run, texts, commit)
        jax.clear_caches()  # what was compiled for one model is of no use to the next


class Texts:
    """Token blocks of one case; the latest of each kind are kept."""

    def __init__(self, case: Case, model: spap.Model) -> None:
        self._case = case
        self._common: dict[str, Any] = {
            "tokenizer": case.model,
            "sequence_length": LENGTH,
            "vocabulary": model.config.vocabulary,
        }
        self._latest: dict[str, tuple[Any, TokenBlocks]] = {}

    def calibration(self, sequences: int, seed: int) -> TokenBlocks:
        """Sequences drawn by the seed."""
        return self._load("calibration", self._case.calibration, sequences=sequences, seed=seed)

    def evaluation(self, windows: int | None) -> np.ndarray:
        """The first windows, [B, T]."""
        return self._load("evaluation", self._case.evaluation, sequences=windows).tokens

    def _load(self, role: Any, path: Path, **asked: Any) -> TokenBlocks:
        if role not in self._latest or self._latest[role][0] != asked:
            self._latest[role] = (asked, spap.load_tokens(path, role=role, **asked, **self._common))
        return self._latest[role][1]


def measure(model: spap.Model, run: Run, texts: Texts, commit: str) -> Row:
    """Prunes the model and compares it with what it was."""
    calibration = texts.calibration(run.amount.sequences, run.settings.seed)
    judged = texts.evaluation(run.amount.windows)
    start, busy = time.perf_counter(), time.process_time()
    if idea := idea_of(run.method):
        pruned = ideas.prune(model, calibration.tokens, run.settings, idea)
    else:
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
        calibration_tokens=calibration.tokens.size,
        evaluation_tokens=judged.size,
        commit=commit,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
