"""Reads and validates the files from which a page or a table is made; none of it requires JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spap_jax.errors import UserError
from spap_jax.report.schema import FORMAT, FinetuneReport, PruneReport, SpeedReport, parsed
from spap_jax.storage.location import real_path

REPORT = "spap_report.json"
TRAINED = "spap_finetune.json"

T = TypeVar("T")


@dataclass(frozen=True)
class RunReports:
    """The report of a pruned checkpoint, and those of what came later."""

    folder: Path
    pruned: PruneReport
    trained: FinetuneReport | None = None
    speed: SpeedReport | None = None


def with_sparsities(folders: Sequence[Path]) -> list[Path]:
    """Returns the folders; one without a report is replaced by its subfolders with one, as for several sparsities."""
    runs = []
    for folder in folders:
        inside = sorted(file.parent for file in real_path(folder).glob(f"[!.]*/{REPORT}"))
        runs += [folder] if (real_path(folder) / REPORT).is_file() else inside or [folder]
    return runs


def read_run(folder: Path, bench: Path | None = None) -> RunReports:
    """Reads the reports of a pruned checkpoint.

    Args:
        bench: File that ``spap bench DENSE PRUNED --json`` wrote about it.

    Raises:
        UserError: there is no report, a file cannot be read, or the measurement is of another checkpoint.
    """
    place = real_path(folder)
    if not (place / REPORT).is_file():
        raise UserError(f"{folder} holds no {REPORT}: name a folder that spap prune wrote.")
    found = _read(place / REPORT, dict[str, Any]).get("format", FORMAT)
    if found != FORMAT:
        raise UserError(
            f"{place / REPORT} is a report of format {found!r} and this version reads format {FORMAT}: use the version "
            "of spap-jax that wrote it, or prune again."
        )
    report = _read(place / REPORT, PruneReport)
    trained = _read(place / TRAINED, FinetuneReport) if (place / TRAINED).is_file() else None
    speed = None if bench is None else _read(bench, SpeedReport)
    sizes = (report.model.parameters.before, report.model.parameters.after)
    if speed and (speed.models[0].parameters, speed.models[1].parameters) != sizes:
        raise UserError(f"{bench} measures other models: give it to spap bench as DENSE {folder}.")
    return RunReports(place, report, trained, speed)


def _read(file: Path, kind: type[T]) -> T:
    try:
        return parsed(file.read_bytes(), kind)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name another file.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is cut off, or of another version ({error}): make it again.") from error
