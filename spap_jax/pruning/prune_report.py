"""Reports of a pruning run: one record per layer, and the complete report."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from spap_jax.checkpoint.locate import public_name
from spap_jax.data import further_of
from spap_jax.methods import update_used
from spap_jax.models import cost
from spap_jax.models.registry import FAMILIES
from spap_jax.pruning.achieved import Sparsities, sparsities
from spap_jax.pruning.advice import advice
from spap_jax.training.check import Check, check_of

if TYPE_CHECKING:
    from spap_jax.pruning.run import Run

FORMAT = 1
"""Version of the JSON format; incremented when a field that ``spap report`` reads changes its name or meaning."""


@dataclass(frozen=True)
class Errors:
    """Relative error ||Y - H V - b||^2 / ||Y||^2 of one layer at the three stages.

    Attributes:
        selection: After removing channels, with dense weights.
        refit: After the closed-form update of the output projection or bias; the same as before if there is none.
        alternating: After alternating minimisation; the same as before if there is none. The error of the result.
    """

    selection: float
    refit: float
    alternating: float


@dataclass(frozen=True)
class AttentionReport:
    """Report on the attention of one layer.

    Attributes:
        kept: Key/value heads kept, ascending, each with the query heads that read it.
        calibration: Errors on the calibration tokens; attention has no alternating rounds.
        held_out: Errors on the held-out tokens; None if there are none.
        swaps: Swaps of key/value heads made by the polish.
        improving_swaps: Single swaps that would still lower the refitted error; 0 certifies that there is none.
        ridge: Relative ridge used, as in ``LayerReport``.
    """

    kept: tuple[int, ...]
    calibration: Errors
    held_out: Errors | None
    swaps: int
    improving_swaps: int
    ridge: float


@dataclass(frozen=True)
class LayerReport:
    """Report on one layer.

    Attributes:
        layer: Index of the layer.
        kept: Channels kept, ascending.
        calibration: Errors on the calibration tokens.
        held_out: Errors on the held-out tokens; None if there are none.
        swaps: Swaps of channels made by the polish.
        improving_swaps: Single swaps that would still lower the refitted error (in the parallel schedule, the error on
            the dense stream); 0 certifies that there is none.
        ridge: Relative ridge used; above the setting if the second moments were too nearly singular for it.
        rounds: Alternating rounds accepted.
        seconds: Time by phase.
        attention: Report on the layer's attention; None if it was left unchanged.
    """

    layer: int
    kept: tuple[int, ...]
    calibration: Errors
    held_out: Errors | None
    swaps: int
    improving_swaps: int
    ridge: float
    rounds: int
    seconds: dict[str, float]
    attention: AttentionReport | None = None


def report_of(tree: dict[str, Any]) -> LayerReport | Check:
    """Inverts ``dataclasses.asdict`` for the report of a step, after a round trip through JSON."""
    if "step" in tree:
        return check_of(tree)
    attention = tree["attention"]
    return LayerReport(**_typed(tree | {"attention": attention and AttentionReport(**_typed(attention))}))


def _typed(tree: dict[str, Any]) -> dict[str, Any]:
    held_out = tree["held_out"]
    errors: dict[str, Any] = {"calibration": Errors(**tree["calibration"]), "held_out": held_out and Errors(**held_out)}
    return tree | errors | {"kept": tuple(tree["kept"])}


@dataclass(frozen=True)
class PruneReport:
    """Report of a run, sufficient to reproduce and to assess it.

    Attributes:
        settings: Every setting, those that the effort, the model or the calibration text decide with their values.
        method: The selection method, and the update of the kept weights ("own" resolved).
        model: Name, architecture, and widths (the largest as ``intermediate``), heads, biases and parameters before
            and after.
        sparsity: Fractions of the MLP channels and of the heads that were removed, and those requested.
        calibration: Description, shape and hash of the calibration tokens, and of further ones for joint steps.
        versions: Versions of the libraries used.
        layers: One record per layer.
        joint: The measurements of the joint steps: what the pruned model's predictions lose against the dense model's
            ("Loss" in ``docs/glossary.md``); the first is from before any step.
        seconds: Time by phase, summed over all layers.
        extras: Values added by the command line: perplexities, bytes on disk, peak memory of the process that ended
            the run, and a hash that identifies the run.
    """

    settings: dict[str, Any]
    method: dict[str, str]
    model: dict[str, Any]
    sparsity: Sparsities
    calibration: dict[str, Any]
    versions: dict[str, str]
    layers: tuple[LayerReport, ...]
    joint: tuple[Check, ...] = ()
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Time by phase, summed over all layers."""
        phases = dict.fromkeys(phase for layer in self.layers for phase in layer.seconds)
        found = {phase: sum(layer.seconds.get(phase, 0.0) for layer in self.layers) for phase in phases}
        return found | ({"joint steps": sum(check.seconds for check in self.joint)} if self.joint else {})

    @property
    def one_width(self) -> bool:
        """Whether all layers of the pruned model have the same width, so that stock loaders accept it."""
        return len(set(self.model["widths"]["after"])) == 1

    @property
    def advice(self) -> tuple[str, ...]:
        """Advice if some of the work had no effect: a sentence each, without full stop."""
        return advice(self)

    def to_json(self) -> str:
        """Serialises the report as in ``spap_report.json``; non-finite numbers become null, as JSON has none."""
        tree = {"format": FORMAT} | dataclasses.asdict(self) | {"seconds": self.seconds, "advice": self.advice}
        return json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n"


def new_report(run: "Run", name: str, tokens: Any, steps: Sequence[LayerReport | Check]) -> PruneReport:
    """Assembles the report of a run.

    Args:
        run: The run.
        name: The model's name as given by the user; the report contains no path.
        tokens: Calibration tokens: an array [B, T], or ``TokenBlocks`` with a description and a hash.
        steps: The reports of the layers and of the joint steps.
    """
    config, narrow, settings = run.config, run.narrow, run.settings
    family = FAMILIES[config.family]
    before, after = cost.parameters(family, config), cost.parameters(family, narrow)
    return PruneReport(
        settings=dataclasses.asdict(settings),
        method={"selection": settings.method, "update": update_used(settings)},
        model={
            "name": public_name(name),
            "architecture": family.architecture,
            "layers": config.layers,
            "intermediate": {"before": config.intermediate, "after": narrow.intermediate},
            "widths": {"before": config.layer_widths, "after": narrow.layer_widths},
            "heads": {"before": config.heads, "after": narrow.heads},
            "kv_heads": {"before": config.kv_heads, "after": narrow.kv_heads},
            "mlp_bias": {"before": config.mlp_bias, "after": narrow.mlp_bias},
            "parameters": {"before": before.total, "after": after.total},
            "mlp_parameters": {"before": before.mlp, "after": after.mlp},
        },
        sparsity=sparsities(config, narrow, settings),
        calibration=data_account(tokens) | _further_account(run, tokens),
        versions=versions(),
        layers=tuple(step for step in steps if isinstance(step, LayerReport)),
        joint=tuple(step for step in steps if isinstance(step, Check)),
    )


def _further_account(run: "Run", tokens: Any) -> dict[str, Any]:
    """Describes the windows that were fitted beside those that were asked for, as joint steps read them."""
    further, asked = further_of(tokens), data_account(tokens)
    count = run.fitted.real + run.held_out.real - asked["sequences"]
    if further is None or not count:
        return {}
    words = f"{asked['description']}; {count} more for joint steps"
    return {"description": words, "further_sequences": count, "further_sha256": further.sha256}


def data_account(tokens: Any) -> dict[str, Any]:
    """Describes tokens: an array [B, T], or ``TokenBlocks`` with a description and a hash."""
    blocks = getattr(tokens, "tokens", tokens)
    return {
        "sequences": len(blocks),
        "sequence_length": len(blocks[0]),
        "description": getattr(tokens, "description", "token ids from memory"),
        "sha256": getattr(tokens, "sha256", None),
    }


def versions() -> dict[str, str]:
    """Returns the versions of this package, its numerical dependencies and Python, and the kind of device."""
    names = ("spap-jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "safetensors")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
