"""The rows of ``results.csv``: one a run, appended as soon as it is done."""

import csv
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import spap_jax as spap

Key = tuple[str, float, str, int, int, str, str, str]
"""What a run is: model, sparsity, method, seed, sequences, windows, hashes of the settings and of the files."""


@dataclass(frozen=True)
class Row:
    """One pruned model, measured.

    Attributes:
        model: Name of the dense model.
        sparsity: Fraction of channels that was to be removed.
        method: A name of ``methods.METHODS``.
        seed: Of the calibration sequences and of the pruning.
        dense: Perplexity of the dense model.
        perplexity: Of the pruned one.
        rise: In log-perplexity, over the dense model.
        divergence: KL(dense || pruned), nats per predicted token.
        width: Channels kept in every layer.
        seconds: That pruning took by the clock, which other work on the machine makes longer.
        processor_seconds: What it took of all cores together, compiling included; nan where it was not measured.
        calibration_tokens: Seen by the pruning, those held out included.
        evaluation_tokens: In the windows that were judged.
        sequences: Calibration sequences.
        windows: Evaluation windows as asked for: a number, or "all".
        settings: Hash of the settings.
        files: Hash of the model's and the texts' files.
        commit: Of the code; ends in "-dirty" where the code had been changed since.
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
        """Two rows with the same key are of the same run."""
        run = (self.model, self.sparsity, self.method, self.seed)
        return (*run, self.sequences, self.windows, self.settings, self.files)


COLUMNS = [field.name for field in fields(Row)]


class Results:
    """Rows by key, kept in a file if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        """Reads the rows that the file holds, and cuts off a last line that was not written to its end.

        Raises:
            UserError: the file holds something else.
        """
        self.path = path
        self.rows: dict[Key, Row] = {}
        if path is not None and path.exists():
            self.rows = {row.key: row for row in _read(path)}

    def add(self, row: Row) -> None:
        """Keeps a row; it is on the disk when this returns."""
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
    """Writes one line in one go, after the header in a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with path.open("ab", buffering=0) as file:
        if not file.tell():
            writer.writeheader()
        writer.writerow(asdict(row))
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())
