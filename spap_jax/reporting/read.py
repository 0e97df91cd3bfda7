"""What the page needs of ``spap_report.json`` and of the JSON of ``spap bench``, checked as it is read.

The files are the interface: nothing of what wrote them is imported, so a page needs no JAX. Fields that are not named
here are passed by. A number that was not finite is null in the file and None here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from spap_jax.errors import UserError
from spap_jax.reporting.decode import content, decoded

FORMAT = 1
"""Of the reports that can be read; a report without one is of the first."""

REPORT = "spap_report.json"
TRAINED = "spap_finetune.json"

Count = Annotated[int, msgspec.Meta(ge=0)]
Whole = Annotated[int, msgspec.Meta(gt=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True)
class Errors:
    """Relative errors of a layer at the three stages."""

    selection: float | None
    refit: float | None
    alternating: float | None


@dataclass(frozen=True)
class Layer:
    """One layer's record; ``held_out`` is None where no tokens were held out."""

    layer: Count
    kept: tuple[Count, ...]
    calibration: Errors
    held_out: Errors | None
    swaps: Count
    improving_swaps: Count
    rounds: Count
    seconds: dict[str, float]

    def __post_init__(self) -> None:
        """Raises: ValueError: the channels kept are not ascending."""
        if any(low >= high for low, high in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError("The channels in `kept` do not ascend")


@dataclass(frozen=True)
class Sweep:
    """What a sweep did to one layer: divergence before and with its new weights, and whether they were taken."""

    sweep: Count
    layer: Count
    before: float | None
    after: float | None
    taken: bool


@dataclass(frozen=True)
class Change:
    """A count before and after pruning."""

    before: Whole
    after: Count


@dataclass(frozen=True)
class Width:
    """MLP channels of a dense layer, the widest; how many stay, each layer's record tells."""

    before: Whole


@dataclass(frozen=True)
class Widths:
    """MLP channels of each dense layer."""

    before: tuple[Whole, ...]


@dataclass(frozen=True)
class Model:
    """The model that was pruned."""

    name: str
    architecture: str
    intermediate: Width
    parameters: Change
    mlp_parameters: Change
    widths: Widths | None = None


@dataclass(frozen=True)
class Method:
    """How channels were chosen, and the update that the weights kept got."""

    selection: str
    update: str


@dataclass(frozen=True)
class Calibration:
    """What the calibration tokens were."""

    sequences: Whole
    sequence_length: Whole
    description: str
    sha256: str | None


@dataclass(frozen=True)
class Perplexity:
    """Perplexity before and after, and on what."""

    data: str
    before: Positive
    after: Positive | None


@dataclass(frozen=True)
class Extras:
    """What only the command line reports."""

    bytes: Change | None = None
    perplexity: Perplexity | None = None
    peak_memory_bytes: Count | None = None


@dataclass(frozen=True)
class Record:
    """A report."""

    settings: dict[str, Any]
    method: Method
    model: Model
    calibration: Calibration
    versions: dict[str, str]
    layers: Annotated[tuple[Layer, ...], msgspec.Meta(min_length=1)]
    seconds: dict[str, float]
    sparsity: dict[str, dict[str, float]] = field(default_factory=dict)
    sweeps: tuple[Sweep, ...] = ()
    extras: Extras = field(default_factory=Extras)

    def __post_init__(self) -> None:
        """Raises: ValueError: a layer keeps a channel that the model does not have."""
        for layer in self.layers:
            if layer.kept and layer.kept[-1] >= self.model.intermediate.before:
                raise ValueError(f"Layer {layer.layer} keeps a channel that the model does not have")

    @property
    def channels(self) -> Change:
        """MLP channels of all layers together."""
        kept = sum(len(layer.kept) for layer in self.layers)
        widths = self.model.widths
        return Change(sum(widths.before) if widths else self.model.intermediate.before * len(self.layers), kept)

    @property
    def removed(self) -> float:
        """Fraction of the MLP channels removed."""
        return 1 - self.channels.after / self.channels.before


@dataclass(frozen=True)
class Ratios:
    """How many times faster the second model is."""

    prefill: Positive
    decode: Positive


@dataclass(frozen=True)
class Measured:
    """A model that ``spap bench`` timed."""

    model: str


@dataclass(frozen=True)
class Workload:
    """What it timed."""

    batch: Whole
    prompt: Whole
    new: Whole
    repeats: Whole


@dataclass(frozen=True)
class Speed:
    """What ``spap bench`` found of two models: measured, and allowed by the arithmetic."""

    models: tuple[Measured, Measured]
    workload: Workload
    speed_up: Ratios
    by_arithmetic: Ratios


@dataclass(frozen=True)
class Steps:
    """How long training was."""

    steps: Whole


@dataclass(frozen=True)
class Trained:
    """What ``spap finetune`` did to a pruned checkpoint, whose report goes along and is from before."""

    settings: Steps
    objective: str
    extras: Extras


@dataclass(frozen=True)
class Run:
    """A pruned checkpoint's report, the name that tells it from the others, and what was measured or done since."""

    label: str
    record: Record
    speed: Speed | None = None
    trained: Trained | None = None


def with_sweeps(folders: Sequence[Path]) -> list[Path]:
    """The folders; in place of one without a report those in it that have one, as of several sparsities."""
    return [run for folder in folders for run in _runs_in(folder)]


def _runs_in(folder: Path) -> list[Path]:
    if (folder.expanduser() / REPORT).is_file():
        return [folder]
    return sorted(file.parent for file in folder.expanduser().glob(f"[!.]*/{REPORT}")) or [folder]


def read_runs(folders: Sequence[Path], benches: Sequence[Path] = ()) -> list[Run]:
    """Reads the reports of pruned checkpoints, and pairs them with measurements of their speed.

    Args:
        folders: Of the checkpoints.
        benches: Files that ``spap bench DENSE PRUNED --json`` wrote, at most one for each checkpoint.

    Raises:
        UserError: a folder is named twice or holds no report, a file cannot be understood or is of another format, or
            a measurement is of none of the checkpoints.
    """
    places = [folder.expanduser().resolve() for folder in folders]
    twice = [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UserError(f"{' and '.join(twice)} are the same folder: name each run once.")
    records = [_read_record(folder) for folder in folders]
    speeds = dict(_speed_of(file, places) for file in benches)
    names = [place.name for place in places]
    unique = len(set(names)) == len(names)
    return [
        Run(place.name if unique else str(folder), record, speeds.get(place), _read_trained(place))
        for folder, place, record in zip(folders, places, records, strict=True)
    ]


def _read_record(folder: Path) -> Record:
    file = folder.expanduser() / REPORT
    if not file.is_file():
        raise UserError(f"{folder} holds no {REPORT}: name a folder that spap prune wrote.")
    text = content(file)
    found = decoded(file, text, dict[str, Any], "spap prune").get("format", FORMAT)
    if found != FORMAT:
        raise UserError(
            f"{file} is a report of format {found!r} and this version reads format {FORMAT}: use the version of "
            "spap-jax that wrote it, or prune again."
        )
    return decoded(file, text, Record, "spap prune")


def _read_trained(folder: Path) -> Trained | None:
    file = folder / TRAINED
    return decoded(file, content(file), Trained, "spap finetune") if file.is_file() else None


def _speed_of(file: Path, places: Sequence[Path]) -> tuple[Path, Speed]:
    """The checkpoint that was measured as the second of two, and what was found."""
    speed = decoded(file, content(file), Speed, "spap bench DENSE PRUNED --json")
    name = speed.models[1].model
    place = Path(name).expanduser().resolve()
    if place not in places:
        raise UserError(
            f"{file} measures {name}, which is none of the folders given: name that folder too, or leave out --bench."
        )
    return place, speed
