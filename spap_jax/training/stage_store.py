"""Identity of a training run, and resuming of an interrupted one."""

import dataclasses
import functools
from typing import Any

from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.checkpoint.unfinished import Unfinished
from spap_jax.data.tokens import TokenBlocks
from spap_jax.models.model import Model
from spap_jax.pruning.step_store import computing
from spap_jax.report.schema import Check, converted
from spap_jax.settings import FinetuneSettings
from spap_jax.training.engine import StoredStage


def finetune_identity(
    model: Model, teacher: Model | None, blocks: TokenBlocks, settings: FinetuneSettings
) -> dict[str, Any]:
    """Returns everything that the result depends on, by name; a run resumes only if all of it is the same.

    Args:
        model: The model to train, read from a folder.
        teacher: The dense model, read from a folder, if there is one.
        blocks: The training tokens.
        settings: Settings of the training.
    """
    how = dataclasses.asdict(settings) | {"lora_rank": settings.rank, "learning_rate": settings.rate}
    folders = {"model": model.source.folder, "teacher": teacher and teacher.source.folder}
    models = {name: folder and fingerprint(folder) for name, folder in folders.items()}
    return how | models | {"data": blocks.sha256, "sequence length": blocks.tokens.shape[1]} | computing()


def stored_stage(unfinished: Unfinished) -> StoredStage | None:
    """Returns the state that an interrupted run left; None if there is no such run."""
    if not unfinished.told:
        return None
    checks = tuple(converted(told, Check) for told in unfinished.told)
    return functools.partial(unfinished.read, len(checks) - 1), checks
