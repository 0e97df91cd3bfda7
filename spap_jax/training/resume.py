"""What identifies a training run, and how an interrupted one comes back."""

import dataclasses
from typing import Any

from spap_jax import devices
from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.checkpoint.resume import Unfinished
from spap_jax.data import TokenBlocks
from spap_jax.model import Model
from spap_jax.pruning.resume import computing, told_to_all
from spap_jax.settings import FinetuneSettings
from spap_jax.training.report import Check
from spap_jax.training.train import Begun, Stage


def identity(model: Model, teacher: Model | None, blocks: TokenBlocks, settings: FinetuneSettings) -> dict[str, Any]:
    """All that the result depends on, by name; a run goes on only where all of it is the same.

    Args:
        model: What is trained, read from a folder.
        teacher: The dense model, read from a folder, if there is one.
        blocks: What it is trained on.
        settings: How.
    """
    how = dataclasses.asdict(settings) | {"lora_rank": settings.rank, "learning_rate": settings.rate}
    models = {name: given and _fingerprint(given) for name, given in (("model", model), ("teacher", teacher))}
    return how | models | {"data": blocks.sha256, "sequence length": blocks.tokens.shape[1]} | computing()


def keep(unfinished: Unfinished, stage: Stage) -> None:
    """Keeps a stage, unless it is one that was kept."""
    if len(stage.checks) > len(unfinished.told):
        unfinished.add(stage.leaves(), dataclasses.asdict(stage.checks[-1]))


def begun(unfinished: Unfinished | None) -> Begun | None:
    """Where an earlier process stood, in every process of this run, which all have to call this.

    Args:
        unfinished: Where the process that leads keeps it; None in the others.

    Returns:
        None where there was no earlier one.
    """
    looks = told_to_all(unfinished.told if unfinished else [])
    if not looks:
        return None
    checks = tuple(Check(**{**told, "losses": tuple(told["losses"])}) for told in looks)
    return devices.from_leader(unfinished.layer(0) if unfinished else {}), checks


def _fingerprint(model: Model) -> str:
    assert model.source.folder is not None  # it was read from there
    return fingerprint(model.source.folder)
