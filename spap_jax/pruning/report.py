"""What a pruning run tells: one record a layer, and the whole."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from spap_jax.baselines import update_used
from spap_jax.checkpoint.locate import public_name
from spap_jax.models import cost
from spap_jax.models.config import DecoderConfig
from spap_jax.models.registry import FAMILIES
from spap_jax.pruning.achieved import Sparsities, sparsities
from spap_jax.pruning.advice import advice
from spap_jax.settings import PruneSettings

FORMAT = 1
"""Of the JSON; another number when a field that ``spap report`` reads changes its name or meaning."""


@dataclass(frozen=True)
class Errors:
    """Relative error ||Y - H V - b||^2 / ||Y||^2 of one layer at the three stages.

    Attributes:
        selection: Channels removed, dense weights kept.
        refit: With the update in closed form: the output projection, or the output bias; as before where there is none.
        alternating: After alternating minimisation; as before where the update has none. The error of the result.
    """

    selection: float
    refit: float
    alternating: float


@dataclass(frozen=True)
class AttentionReport:
    """What happened to the attention of one layer.

    Attributes:
        kept: Key/value heads kept, ascending, each with the query heads that read it.
        calibration: Errors on the tokens that were fitted; attention has no alternating rounds.
        held_out: Errors on the tokens that were not; None where none were held out.
        swaps: Exchanges of key/value heads made by the polish.
        improving_swaps: Single exchanges that would still lower the refitted error; 0 certifies that there is none.
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
    """What happened to one layer.

    Attributes:
        layer: Its index.
        kept: Channels kept, ascending.
        calibration: Errors on the tokens that were fitted.
        held_out: Errors on the tokens that were not; None where none were held out.
        swaps: Exchanges of channels made by the polish.
        improving_swaps: Single exchanges that would still lower the refitted error (in the parallel schedule that on
            the dense stream); 0 certifies that there is none.
        ridge: Relative ridge used; above the setting where the second moments were too nearly singular for it.
        rounds: Alternating rounds accepted.
        seconds: Time by phase.
        attention: What happened to its attention; None where it was left as it is.
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


@dataclass(frozen=True)
class SweepReport:
    """What a sweep over the pruned model did to one block.

    Attributes:
        sweep: Number of the sweep, from 0.
        layer: The block.
        before: Mean KL divergence of the pruned model's predictions from the dense model's, in nats per token, on the
            held-out tokens; on the calibration tokens where none are held out.
        after: The same with the new weights of the block, and of those adjusted together with it.
        taken: Whether it fell, so that they were taken.
        seconds: Time by phase.
    """

    sweep: int
    layer: int
    before: float
    after: float
    taken: bool
    seconds: dict[str, float]

    @property
    def reached(self) -> float:
        """The divergence of the model with this step made."""
        return self.after if self.taken else self.before


def report_of(tree: dict[str, Any]) -> LayerReport | SweepReport:
    """The inverse of ``dataclasses.asdict`` for the report of a step, after a way through JSON."""
    if "sweep" in tree:
        return SweepReport(**tree)
    attention = tree["attention"]
    return LayerReport(**_typed(tree | {"attention": attention and AttentionReport(**_typed(attention))}))


def _typed(tree: dict[str, Any]) -> dict[str, Any]:
    held_out = tree["held_out"]
    errors: dict[str, Any] = {"calibration": Errors(**tree["calibration"]), "held_out": held_out and Errors(**held_out)}
    return tree | errors | {"kept": tuple(tree["kept"])}


@dataclass(frozen=True)
class PruneReport:
    """What a run did: enough to repeat it and to judge it.

    Attributes:
        settings: Every setting, with what the effort means.
        method: How channels were chosen, and the update that the weights kept got ("own" resolved).
        model: Name, architecture, and widths (the largest as ``intermediate``), heads, biases and parameters before
            and after.
        sparsity: Fractions of the MLP channels and of the heads that are gone, beside those asked for.
        calibration: What the tokens were: description, shape, hash.
        versions: Of the libraries that computed it.
        layers: A record a layer.
        sweeps: A record a layer in every sweep over the whole model.
        seconds: Time by phase, all layers together.
        extras: What the command line adds: perplexities, bytes on disk, peak memory of the process that ended the run,
            and a hash that names the run.
    """

    settings: dict[str, Any]
    method: dict[str, str]
    model: dict[str, Any]
    sparsity: Sparsities
    calibration: dict[str, Any]
    versions: dict[str, str]
    layers: tuple[LayerReport, ...]
    sweeps: tuple[SweepReport, ...] = ()
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Time by phase, all layers together."""
        steps = (*self.layers, *self.sweeps)
        phases = dict.fromkeys(phase for step in steps for phase in step.seconds)
        return {phase: sum(step.seconds.get(phase, 0.0) for step in steps) for phase in phases}

    @property
    def one_width(self) -> bool:
        """Whether all layers of the pruned model are as wide, so that stock loaders take it."""
        return len(set(self.model["widths"]["after"])) == 1

    @property
    def advice(self) -> tuple[str, ...]:
        """What would have helped, where work was for nothing: a sentence each, without its full stop."""
        return advice(self)

    def to_json(self) -> str:
        """As ``spap_report.json`` stores it; numbers that are not finite become null, as JSON has none."""
        tree = {"format": FORMAT} | dataclasses.asdict(self) | {"seconds": self.seconds, "advice": self.advice}
        return json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n"


def new_report(
    settings: PruneSettings,
    config: DecoderConfig,
    narrow: DecoderConfig,
    name: str,
    tokens: Any,
    steps: Sequence[LayerReport | SweepReport],
) -> PruneReport:
    """Puts a report together.

    Args:
        settings: The run's.
        config: The dense decoder.
        narrow: The pruned one.
        name: What the user called the model; the report holds no path.
        tokens: Calibration: an array [B, T], or ``TokenBlocks`` with a description and a hash.
        steps: The reports of the layers and of the sweeps.
    """
    family = FAMILIES[config.family]
    before, after = cost.parameters(family, config), cost.parameters(family, narrow)
    return PruneReport(
        settings=dataclasses.asdict(settings) | settings.decided._asdict(),
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
        calibration=data_account(tokens),
        versions=versions(),
        layers=tuple(step for step in steps if isinstance(step, LayerReport)),
        sweeps=tuple(step for step in steps if isinstance(step, SweepReport)),
    )


def data_account(tokens: Any) -> dict[str, Any]:
    """What tokens were: an array [B, T], or ``TokenBlocks`` with a description and a hash."""
    blocks = getattr(tokens, "tokens", tokens)
    return {
        "sequences": len(blocks),
        "sequence_length": len(blocks[0]),
        "description": getattr(tokens, "description", "token ids from memory"),
        "sha256": getattr(tokens, "sha256", None),
    }


def versions() -> dict[str, str]:
    """Of this package, of what computed for it, and of the device."""
    names = ("spap-jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "safetensors")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
