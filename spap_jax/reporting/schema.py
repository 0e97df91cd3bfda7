"""The fields of ``spap_report.json``, ``spap_finetune.json`` and the JSON of ``spap bench`` that the page needs.

Other fields are ignored. A number that was not finite is null in a file and None here.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Whole = Annotated[int, msgspec.Meta(gt=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True)
class ErrorsRecord:
    """Relative errors of a layer after each of the three stages."""

    selection: float | None
    refit: float | None
    alternating: float | None


@dataclass(frozen=True)
class AttentionRecord:
    """Record of a layer's attention, with fields as in ``LayerRecord``; ``kept`` lists key/value heads."""

    kept: tuple[Count, ...]
    calibration: ErrorsRecord
    held_out: ErrorsRecord | None
    swaps: Count
    improving_swaps: Count


@dataclass(frozen=True)
class LayerRecord:
    """Record of one layer.

    Attributes:
        layer: Index of the layer.
        kept: MLP channels kept, ascending.
        calibration: Errors of the MLP on the calibration tokens.
        held_out: Errors on the held-out tokens; None if there are none.
        swaps: Number of channel swaps made by the polish.
        improving_swaps: Number of single swaps that would still lower the error.
        rounds: Number of alternating rounds accepted.
        seconds: Seconds by phase.
        attention: Record of the attention; None if all heads are kept.
    """

    layer: Count
    kept: tuple[Count, ...]
    calibration: ErrorsRecord
    held_out: ErrorsRecord | None
    swaps: Count
    improving_swaps: Count
    rounds: Count
    seconds: dict[str, float]
    attention: AttentionRecord | None = None

    def __post_init__(self) -> None:
        """Validates the record.

        Raises:
            ValueError: the channels kept are not ascending.
        """
        if any(low >= high for low, high in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError("The channels in `kept` do not ascend")


@dataclass(frozen=True)
class CheckRecord:
    """A measurement in the joint steps: the loss on held-out tokens, and whether these weights were kept.

    Attributes:
        step: Number of joint steps made so far.
        tokens: Number of tokens in these steps.
        losses: Loss on the tokens of each step since the previous measurement.
        held_out: Loss on held-out tokens.
        taken: Whether it is the lowest so far.
    """

    step: Count
    tokens: Count
    losses: tuple[float | None, ...]
    held_out: float | None
    taken: bool


@dataclass(frozen=True)
class ChangeRecord:
    """A count before and after pruning."""

    before: Whole
    after: Count

    @property
    def removed(self) -> float:
        """Fraction that was removed."""
        return 1 - self.after / self.before


@dataclass(frozen=True)
class WidthRecord:
    """MLP channels of the widest dense layer; the number kept is in each layer's record."""

    before: Whole


@dataclass(frozen=True)
class WidthsRecord:
    """MLP channels of each dense layer."""

    before: tuple[Whole, ...]


@dataclass(frozen=True)
class ModelRecord:
    """The model that was pruned."""

    name: str
    architecture: str
    intermediate: WidthRecord
    parameters: ChangeRecord
    mlp_parameters: ChangeRecord
    widths: WidthsRecord | None = None
    heads: ChangeRecord | None = None
    kv_heads: ChangeRecord | None = None


@dataclass(frozen=True)
class MethodRecord:
    """How channels were selected, and how the kept weights were updated."""

    selection: str
    update: str


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration tokens."""

    sequences: Whole
    sequence_length: Whole
    description: str
    sha256: str | None


@dataclass(frozen=True)
class PerplexityRecord:
    """Perplexity before and after, and the data on which it was measured."""

    data: str
    before: Positive
    after: Positive | None


@dataclass(frozen=True)
class ExtrasRecord:
    """Values that only the command line reports."""

    bytes: ChangeRecord | None = None
    perplexity: PerplexityRecord | None = None
    peak_memory_bytes: Count | None = None


@dataclass(frozen=True)
class Record:
    """The report of a pruning run."""

    settings: dict[str, Any]
    method: MethodRecord
    model: ModelRecord
    calibration: CalibrationRecord
    versions: dict[str, str]
    layers: Annotated[tuple[LayerRecord, ...], msgspec.Meta(min_length=1)]
    seconds: dict[str, float]
    sparsity: dict[str, dict[str, float]] = field(default_factory=dict)
    joint: tuple[CheckRecord, ...] = ()
    advice: tuple[str, ...] = ()
    extras: ExtrasRecord = field(default_factory=ExtrasRecord)

    def __post_init__(self) -> None:
        """Validates the report.

        Raises:
            ValueError: a layer keeps a channel that the model does not have.
        """
        for layer in self.layers:
            if layer.kept and layer.kept[-1] >= self.model.intermediate.before:
                raise ValueError(f"Layer {layer.layer} keeps a channel that the model does not have")

    @property
    def channels(self) -> ChangeRecord:
        """MLP channels of all layers together."""
        kept = sum(len(layer.kept) for layer in self.layers)
        widths = self.model.widths
        return ChangeRecord(sum(widths.before) if widths else self.model.intermediate.before * len(self.layers), kept)

    @property
    def removed(self) -> float:
        """Fraction of the MLP channels removed."""
        return self.channels.removed

    @property
    def fewer_heads(self) -> ChangeRecord | None:
        """Attention heads of a layer, if some were removed."""
        heads = self.model.heads
        return heads if heads and heads.removed else None


@dataclass(frozen=True)
class RatiosRecord:
    """How many times faster the second model is."""

    prefill: Positive
    decode: Positive


@dataclass(frozen=True)
class MeasuredRecord:
    """A model that ``spap bench`` timed: the name of its folder, and how many parameters it has."""

    model: str
    parameters: Whole


@dataclass(frozen=True)
class WorkloadRecord:
    """The work that ``spap bench`` timed."""

    batch: Whole
    prompt: Whole
    new: Whole
    repeats: Whole


@dataclass(frozen=True)
class SpeedRecord:
    """Speed-ups between two models from ``spap bench``: as measured, and as the arithmetic allows."""

    models: tuple[MeasuredRecord, MeasuredRecord]
    workload: WorkloadRecord
    speed_up: RatiosRecord
    by_arithmetic: RatiosRecord


@dataclass(frozen=True)
class StepsRecord:
    """Length of the training."""

    steps: Whole


@dataclass(frozen=True)
class TrainedRecord:
    """Report of ``spap finetune`` on a pruned checkpoint; the pruning report beside it is from before the training."""

    settings: StepsRecord
    objective: str
    extras: ExtrasRecord


@dataclass(frozen=True)
class RunRecord:
    """A pruned checkpoint's report, its unique label, and later measurements and training."""

    label: str
    record: Record
    speed: SpeedRecord | None = None
    trained: TrainedRecord | None = None
