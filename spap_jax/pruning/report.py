"""What a pruning run tells: one record a layer, and the whole."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Errors:
    """Relative error ||Y - H V - b||^2 / ||Y||^2 of one layer at the three stages.

    Attributes:
        selection: Channels removed, dense weights kept.
        refit: With the closed-form output projection.
        alternating: After alternating minimisation.
    """

    selection: float
    refit: float
    alternating: float


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        layer: Its index.
        kept: Channels kept, ascending.
        calibration: Errors on the tokens that were fitted.
        held_out: Errors on the tokens that were not; None where none were held out.
        swaps: Exchanges of channels made by the polish.
        improving_swaps: Single exchanges that would still lower the error; 0 certifies that there is none. None where
            the method does not polish.
        ridge: Relative ridge used; above the setting where the second moments were too nearly singular for it.
        rounds: Alternating rounds accepted.
        seconds: Time by phase.
    """

    layer: int
    kept: tuple[int, ...]
    calibration: Errors
    held_out: Errors | None
    swaps: int | None
    improving_swaps: int | None
    ridge: float
    rounds: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class PruneReport:
    """What a run did: enough to repeat it and to judge it.

    Attributes:
        settings: Every setting.
        model: Name, architecture, and widths and parameters before and after.
        calibration: What the tokens were: description, shape, hash.
        versions: Of the libraries that computed it.
        layers: A record a layer.
        seconds: Time by phase, all layers together.
        extras: What the command line adds: perplexities, bytes on disk, peak memory.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, str]
    layers: tuple[LayerReport, ...]
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Time by phase, all layers together."""
        phases = dict.fromkeys(phase for layer in self.layers for phase in layer.seconds)
        return {phase: sum(layer.seconds.get(phase, 0.0) for layer in self.layers) for phase in phases}

    def to_json(self) -> str:
        """As ``spap_report.json`` stores it; numbers that are not finite become null, as JSON has none."""
        tree = dataclasses.asdict(self) | {"seconds": self.seconds}
        return json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n"


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
