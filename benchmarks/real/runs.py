"""One row: a prune command, timed by its own report, and its result compared with the dense model."""

import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

import spap_jax as spap
from benchmarks.shared import METHODS as SETTINGS
from spap_jax.evaluation.perplexity import compare
from spap_jax.evaluation.speed import speed_up, time_generation
from spap_jax.models import cost
from spap_jax.report.schema import GenerationWorkload

METHODS = ("flap", "fasp", "obs", "osscar", "obs, more text", "spap, low effort", "spap", "obs + steps",
           "spap, high effort")  # fmt: skip
"""Methods of ``benchmarks.quality``, in the order in which a sparsity is filled, and one of them with more text."""

_MORE = {"obs, more text": ("obs", 4)}
"""Which method reads more sequences, and how many times as many: our default effort reads 4 times what is asked."""

PEERS = ("flap", "fasp", "obs", "osscar")

SPARSITIES = (0.3, 0.2, 0.1, 0.5)
"""Fractions of the MLP channels removed, those of the widest interest first."""


class Text(msgspec.Struct, frozen=True):
    """Both models on one text: perplexities, KL(dense || pruned) in nats per token, and agreement on the top token."""

    dense: float
    pruned: float
    divergence: float
    agreement: float


class Row(msgspec.Struct, frozen=True):
    """Measurements of one pruned model.

    Attributes:
        model: Name of the dense model's folder, or its hub id.
        sparsity: Fraction of the MLP channels to remove.
        method: One of ``METHODS``.
        command: The words after ``spap prune MODEL``, without the output.
        texts: Quality by name of the text.
        seconds: Wall-clock time by phase, as in the report.
        peak_memory_bytes: Peak memory of the process.
        parameters: Parameters of the dense and of the pruned model.
        bytes: Bytes of their weights.
        speed: Speed-up over the dense model of prefill and decoding, medians of paired runs.
        commit: Commit of the code.
        date: When the row was measured, in UTC.
        windows: Windows of each text, of up to 2048 tokens; 0 is all.
    """

    model: str
    sparsity: float
    method: str
    command: str
    texts: dict[str, Text]
    seconds: dict[str, float]
    peak_memory_bytes: int
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    speed: tuple[float, float]
    commit: str
    date: str
    windows: int

    @property
    def key(self) -> tuple[str, str, int, tuple[str, ...]]:
        """What identifies a measurement: the model, the command, and the windows of the texts."""
        return self.model, self.command, self.windows, tuple(self.texts)

    def judged_like(self, other: "Row") -> bool:
        """Whether a page can show both rows: they are of the same model, on the same texts."""
        return (self.model, self.windows, {*self.texts}) == (other.model, other.windows, {*other.texts})


def command_of(method: str, sparsity: float, calibration: str, sequences: int, length: int) -> list[str]:
    """Returns the words of a prune command after the model, without its output.

    Raises:
        UserError: there is no such method.
    """
    if method not in METHODS:
        raise spap.UserError(f"there is no method {method!r}: name some of {', '.join(map(repr, METHODS))}.")
    name, times = _MORE.get(method, (method, 1))
    words = ["--sparsity", f"{sparsity:g}"]
    for setting, value in SETTINGS[name].items():
        words += [f"--{setting.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else value]
    return [*words, "--data", calibration, "--sequences", str(times * sequences), "--sequence-length", str(length)]


def perform(model: str, words: Sequence[str], output: Path) -> None:
    """Runs the command; its progress is shown, and a stopped run resumes.

    Raises:
        UserError: the command failed; it has said why.
    """
    if (output / "config.json").exists():
        return
    words = ["prune", model, *words, "--output", str(output)]
    if subprocess.run([sys.executable, "-m", "spap_jax", *words]).returncode:
        raise spap.UserError(f"spap {' '.join(words)} failed: its message is above.")


def row_of(
    name: str,
    sparsity: float,
    method: str,
    command: str,
    dense: spap.Model,
    folder: Path,
    texts: dict[str, Any],
    windows: int,
    commit: str,
) -> Row:
    """Measures the result of a command in its output folder on texts, windows [B, T] by name; see `Row`."""
    pruned, report = spap.load(folder), msgspec.json.decode((folder / "spap_report.json").read_bytes())
    work = GenerationWorkload(prompt=min(GenerationWorkload.prompt, dense.config.positions - GenerationWorkload.new))
    before, after = time_generation([dense, pruned], work)
    return Row(
        model=name,
        sparsity=sparsity,
        method=method,
        command=command,
        texts={text: Text(*compare(dense, pruned, tokens)) for text, tokens in texts.items()},
        seconds=report["seconds"],
        peak_memory_bytes=report["extras"]["peak_memory_bytes"],
        parameters=(_parameters(dense), _parameters(pruned)),
        bytes=(report["extras"]["bytes"]["before"], report["extras"]["bytes"]["after"]),
        speed=(speed_up(before.prefill, after.prefill), speed_up(before.decode, after.decode)),
        commit=commit,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        windows=windows,
    )


def _parameters(model: spap.Model) -> int:
    return cost.parameters(model.family, model.config).total
