"""Reads and validates the files from which a page is made.

The files are the interface, and ``schema.py`` says what they hold, so a page does not require JAX.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from spap_jax.errors import UserError
from spap_jax.report.schema import FORMAT, FinetuneReport, PruneReport, RunReports, SpeedReport, parsed
from spap_jax.storage.location import public_name, real_path

REPORT = "spap_report.json"
TRAINED = "spap_finetune.json"

T = TypeVar("T")


def with_sparsities(folders: Sequence[Path]) -> list[Path]:
    """Returns the folders; one without a report is replaced by its subfolders with one, as for several sparsities."""
    return [run for folder in folders for run in _runs_in(folder)]


def _runs_in(folder: Path) -> list[Path]:
    if (real_path(folder) / REPORT).is_file():
        return [folder]
    return sorted(file.parent for file in real_path(folder).glob(f"[!.]*/{REPORT}")) or [folder]


def read_runs(folders: Sequence[Path], benches: Sequence[Path] = ()) -> list[RunReports]:
    """Reads the reports of pruned checkpoints, and pairs them with measurements of their speed.

    Args:
        folders: Folders of the checkpoints.
        benches: Files that ``spap bench DENSE PRUNED --json`` wrote, at most one for each checkpoint.

    Raises:
        UserError: a folder is named twice or has no report, a file cannot be decoded or has another format, or a
            measurement matches none of the checkpoints, or several.
    """
    places = list(map(real_path, folders))
    twice = [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UserError(f"{' and '.join(twice)} are the same folder: name each run once.")
    reports = [_read_pruned(folder) for folder in folders]
    measured = [_speed_of(file, folders, reports) for file in benches]
    speeds = dict(measured)
    if len(speeds) < len(measured):
        again = next(folder for folder, _ in measured if [each for each, _ in measured].count(folder) > 1)
        raise UserError(f"{again} was measured in several of the files: name one of them.")
    return [
        RunReports(label, report, speeds.get(folder), _read_trained(place))
        for label, folder, place, report in zip(_labels(places), folders, places, reports, strict=True)
    ]


def _labels(places: Sequence[Path]) -> list[str]:
    """Returns the shortest unique endings of the paths; readers of a page have no use for the rest."""
    depths = range(1, max(len(place.parts) for place in places) + 1)
    ends = ([Path(*place.parts[-depth:]).as_posix() for place in places] for depth in depths)
    return next(names for names in ends if len({*names}) == len(names))


def _read_pruned(folder: Path) -> PruneReport:
    file = real_path(folder) / REPORT
    if not file.is_file():
        raise UserError(f"{folder} holds no {REPORT}: name a folder that spap prune wrote.")
    found = _read(file, dict[str, Any], "spap prune").get("format", FORMAT)
    if found != FORMAT:
        raise UserError(
            f"{file} is a report of format {found!r} and this version reads format {FORMAT}: use the version of "
            "spap-jax that wrote it, or prune again."
        )
    return _read(file, PruneReport, "spap prune")


def _read_trained(folder: Path) -> FinetuneReport | None:
    file = folder / TRAINED
    return _read(file, FinetuneReport, "spap finetune") if file.is_file() else None


def _speed_of(file: Path, folders: Sequence[Path], reports: Sequence[PruneReport]) -> tuple[Path, SpeedReport]:
    """Returns the folder of the checkpoint that was measured as the second of two models, and the measurement.

    The checkpoint is identified by the name of its folder, or of a link to it, and by its size: files hold no paths,
    and folders move.
    """
    speed = _read(file, SpeedReport, "spap bench DENSE PRUNED --json")
    dense, measured = speed.models
    found = [
        (folder, report)
        for folder, report in zip(folders, reports, strict=True)
        if Path(measured.model).name in (public_name(folder), real_path(folder).name)
        and measured.parameters == report.model.parameters.after
    ]
    if len(found) == 1:
        [(folder, report)] = found
        if dense.parameters != report.model.parameters.before:
            raise UserError(
                f"{file} compares {measured.model} with {dense.model} of {dense.parameters} parameters, and the model "
                f"that was pruned has {report.model.parameters.before}: give spap bench that one first."
            )
        return folder, speed
    what = f"{file} measures {measured.model} of {measured.parameters} parameters, which"
    if not found:
        raise UserError(f"{what} is none of the folders given: name that folder too, or leave the file out.")
    each = " and ".join(str(folder) for folder, _ in found)
    raise UserError(f"{what} may be each of {each}: name one of them alone, or rename one.")


def _read(file: Path, kind: type[T], origin: str) -> T:
    """Reads a JSON file.

    Args:
        file: The file.
        kind: Type to decode to.
        origin: The command that writes files of this kind.

    Raises:
        UserError: the file cannot be read, or is not JSON of this type.
    """
    try:
        return parsed(file.read_bytes(), kind)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name another file.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is cut off, or not what this version's {origin} writes ({error}): make it again."
        ) from error
