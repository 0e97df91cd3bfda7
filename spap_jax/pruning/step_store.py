"""Identity of a run, and recovery of an interrupted run's steps in all processes of the next run."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spap_jax import devices
from spap_jax.checkpoint.publish import read_made
from spap_jax.checkpoint.unfinished import Unfinished
from spap_jax.data import TokenBlocks
from spap_jax.models.decoder import Params
from spap_jax.pruning.prune_report import report_of, versions
from spap_jax.pruning.run import Begun, Step
from spap_jax.settings import PruneSettings

_COMPUTING = ("spap-jax", "jax", "jaxlib", "flax", "optax", "device")


def prune_identity(
    model: str, blocks: TokenBlocks, judged: TokenBlocks | None, dtype: str | None, settings: PruneSettings
) -> dict[str, Any]:
    """Returns everything that the result of ``spap prune`` depends on, by name; a run resumes only if all are equal.

    Args:
        model: Fingerprint of the dense checkpoint.
        blocks: Calibration tokens.
        judged: Tokens on which perplexity is measured; None if it is not.
        dtype: Data type to which the weights are converted; None if they are not.
        settings: The pruning settings.
    """
    how = dataclasses.asdict(settings) | settings.decided._asdict()
    del how["effort"]  # represented by the values it stands for
    tokens = {"calibration": blocks.sha256, "sequence length": blocks.tokens.shape[1]}
    output = {"evaluation": judged and judged.sha256, "dtype": dtype}
    return how | {"model": model} | tokens | output | computing()


def computing() -> dict[str, Any]:
    """Returns the properties of the software and hardware that a run's numbers depend on."""
    found = versions()
    return {"devices": devices.mesh_size(), "model devices": devices.model_size()} | {
        name: found[name] for name in _COMPUTING
    }


def store_step(unfinished: Unfinished | None, step: Step) -> None:
    """Stores a step that this run made; all processes must call this.

    Args:
        unfinished: The stored steps in the leading process; None in the others.
        step: The step.
    """
    kept = step.kept()
    if unfinished:
        unfinished.add(kept, dataclasses.asdict(step.report))


def stored_steps(unfinished: Unfinished | None, output: str | Path) -> Begun | None:
    """Returns the steps of earlier processes in every process of this run; all processes must call this.

    Args:
        unfinished: The stored steps in the leading process; None in the others.
        output: Output folder of the run.

    Returns:
        The steps; None if no steps are stored, or if the output is already complete, because a command that makes
        several outputs was interrupted later.
    """
    told = told_to_all(unfinished.told if unfinished and not _is_made(unfinished, output) else None)

    def read(number: int) -> Params:
        return devices.broadcast_from_leader(unfinished.read(number) if unfinished else {})

    return None if told is None else Begun([report_of(each) for each in told], read)


def decided_widths(unfinished: Unfinished | None, choose: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the layer widths that an earlier process chose, or else chooses them now; all processes must call this.

    Args:
        unfinished: The stored widths in the leading process; None in the others.
        choose: Chooses the widths; called in all processes together.
    """
    widths = told_to_all(unfinished and unfinished.decided)
    if widths is None:
        widths = told_to_all(choose())
        if unfinished:
            unfinished.decide(widths)
    return tuple(widths)


def told_to_all(told: Any) -> Any:
    """Broadcasts a JSON-serialisable value from the leading process; all processes must call this."""
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    return json.loads(devices.broadcast_from_leader({"told": text})["told"].tobytes())


def _is_made(unfinished: Unfinished, output: str | Path) -> bool:
    """Whether the output already exists and was written by this run."""
    try:
        report = json.loads(read_made(output, "spap_report.json") or b"")
        return unfinished.found and report["extras"]["run"] == unfinished.name
    except (ValueError, LookupError, TypeError):
        return False
