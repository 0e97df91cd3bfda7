"""What identifies a run, and how the steps of an interrupted one come back, to all processes of the next."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spap_jax import devices
from spap_jax.checkpoint.publish import read_made
from spap_jax.checkpoint.resume import Unfinished
from spap_jax.data import TokenBlocks
from spap_jax.models.decoder import Params
from spap_jax.pruning.pipeline import Begun, Step
from spap_jax.pruning.report import report_of, versions
from spap_jax.settings import PruneSettings

_COMPUTING = ("spap-jax", "jax", "jaxlib", "flax", "optax", "device")


def identity(
    model: str, blocks: TokenBlocks, judged: TokenBlocks | None, dtype: str | None, settings: PruneSettings
) -> dict[str, Any]:
    """All that the result of ``spap prune`` depends on, by name; a run goes on only where all of it is the same.

    Args:
        model: Fingerprint of the dense checkpoint.
        blocks: Calibration tokens.
        judged: What perplexity is measured on.
        dtype: What the weights are converted to.
        settings: How to prune.
    """
    how = dataclasses.asdict(settings) | settings.decided._asdict()
    del how["effort"]  # is what it means
    tokens = {"calibration": blocks.sha256, "sequence length": blocks.tokens.shape[1]}
    output = {"evaluation": judged and judged.sha256, "dtype": dtype}
    return how | {"model": model} | tokens | output | computing()


def computing() -> dict[str, Any]:
    """What computes a run, as far as its numbers depend on it."""
    found = versions()
    return {"devices": devices.everyone(), "model devices": devices.sharers()} | {
        name: found[name] for name in _COMPUTING
    }


def keep(unfinished: Unfinished, step: Step) -> None:
    """Keeps a step that this run made."""
    unfinished.add(step.layer, dataclasses.asdict(step.report))


def begun(unfinished: Unfinished | None, output: str | Path) -> Begun | None:
    """The steps that earlier processes made, in every process of this run; all of them have to call this.

    Args:
        unfinished: Where the process that leads keeps them; None in the others.
        output: The run's.

    Returns:
        None where the output was put in its place: a command that makes several was interrupted later.
    """
    told = told_to_all(unfinished.told if unfinished and not _is_made(unfinished, output) else None)

    def read_layer(index: int) -> Params:
        return devices.from_leader(unfinished.layer(index) if unfinished else {})

    return None if told is None else Begun([report_of(each) for each in told], read_layer)


def decided_widths(unfinished: Unfinished | None, choose: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """The widths of the layers that an earlier process chose, or else those of now; all processes have to call this.

    Args:
        unfinished: Where the process that leads keeps them; None in the others.
        choose: Chooses them, in all processes together.
    """
    widths = told_to_all(unfinished and unfinished.decided)
    if widths is None:
        widths = told_to_all(choose())
        if unfinished:
            unfinished.decide(widths)
    return tuple(widths)


def told_to_all(told: Any) -> Any:
    """What the process that leads has to tell, as JSON has it, in every process; all of them have to call this."""
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    return json.loads(devices.from_leader({"told": text})["told"].tobytes())


def _is_made(unfinished: Unfinished, output: str | Path) -> bool:
    """Whether the output is this run's."""
    try:
        report = json.loads(read_made(output, "spap_report.json") or b"")
        return unfinished.found and report["extras"]["run"] == unfinished.name
    except (ValueError, LookupError, TypeError):
        return False
