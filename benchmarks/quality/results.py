"""The rows of ``results.csv``: one per run, appended as soon as the run is done."""

import csv
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import spap_jax as spap

Key = tuple[str, float, str, int, int, str, str, str]
"""Identity of a run: model, sparsity, method, seed, sequences, windows, hashes of the settings and of the files."""


@dataclass(frozen=True)
class Row:
    """Measurements of one pruned model.

    Attributes:
        model: Name of the dense model.
        sparsity: Requested fraction of channels removed.
        method: A name of ``methods.METHODS``.
        seed: Seed of the calibration sequences and of the pruning.
        dense: Perplexity of the dense model.
        perplexity: Perplexity of the pruned model.
        rise: Rise in log-perplexity over the dense model.
        divergence: KL(dense || pruned), nats per predicted token.
        width: Channels kept in every layer.
        seconds: Wall-clock time of pruning, which other load on the machine increases.
        processor_seconds: CPU time of pruning over all cores, compilation included; nan if it was not measured.
        teraflops: Operations of the run as `spap plan` counts them, in units of 10^12; nan in rows of earlier versions.
        calibration_tokens: Tokens used for pruning, held-out tokens included.
        evaluation_tokens: Tokens in the evaluation windows.
        sequences: Number of calibration sequences.
        windows: Evaluation windows as requested: a number, or "all".
        settings: Hash of the settings.
        files: Hash of the model's and the texts' files.
        commit: Commit of the code; ends in "-dirty" if the code had uncommitted changes.
        date: When the run ended, in UTC.
    """

    model: str
    sparsity: float
    method: str
    seed: int
    dense: float
    perplexity: float
    rise: float
    divergence: float
    width: int
    seconds: float
    processor_seconds: float
    teraflops: float
    calibration_tokens: int
    evaluation_tokens: int
    sequences: int
    windows: str
    settings: str
    files: str
    commit: str
    date: str

    @property
    def key(self) -> Key:
        """The key of the row; two rows with the same key belong to the same run."""
        run = (self.model, self.sparsity, self.method, self.seed)
        return (*run, self.sequences, self.windows, self.settings, self.files)


COLUMNS = [field.name for field in fields(Row)]


class Results:
    """Rows by key, stored in a file if a path is given."""

    def __init__(self, path: Path | None = None) -> None:
        """Reads the rows in the file, and truncates an incomplete last line.

        Raises:
            UserError: the file has other content.
        """
        self.path = path
        self.rows: dict[Key, Row] = {}
        if path is not None and path.exists():
            self.rows = {row.key: row for row in _read(path)}

    def add(self, row: Row) -> None:
        """Stores a row; it is on disk when this returns."""
        self.rows[row.key] = row
        if self.path is not None:
            _append(self.path, row)


def _read(path: Path) -> list[Row]:
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    header, *lines = list(csv.reader(io.StringIO(whole.decode(), newline=""))) or [COLUMNS]
    if header != COLUMNS:
        raise spap.UserError(f"{path} has other columns than this version writes; move it away.")
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 2)]


def _row(line: list[str], where: str) -> Row:
    try:
        cells = zip(fields(Row), line, strict=True)
        return Row(**{field.name: _CONVERT[field.type](text) for field, text in cells})
    except ValueError as error:
        raise spap.UserError(f"{where} is no row of this table ({error}); remove it.") from error


_CONVERT: dict[Any, Any] = {str: str, int: int, float: float}


def _append(path: Path, row: Row) -> None:
    """Writes one line in a single write, after the header in a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with path.open("ab", buffering=0) as file:
        if not file.tell():
            writer.writeheader()
        writer.writerow(asdict(row))
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())
