"""Identity of a training run, and resuming of an interrupted one."""

import dataclasses
from typing import Any

import jax

from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.checkpoint.unfinished import Unfinished
from spap_jax.data.tokens import TokenBlocks
from spap_jax.models.model import Model
from spap_jax.parallel import mesh
from spap_jax.report.account import computing
from spap_jax.report.schema import Check, converted
from spap_jax.settings import FinetuneSettings
from spap_jax.training.loop import Stage


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


def parts_of(stage: Stage) -> dict[str, Any]:
    """Returns what this process's devices hold of a stage."""
    leaves = jax.tree.leaves((stage.state, stage.best))
    return {str(number): mesh.parts_of(array) for number, array in enumerate(leaves)}


def restored(unfinished: Unfinished, like: Any) -> tuple[Any, tuple[Check, ...]] | None:
    """Returns the state that an interrupted run left, see ``loop.Restore``; None if there is no such run."""
    if not unfinished.told:
        return None
    checks = tuple(converted(told, Check) for told in unfinished.told)
    parts = unfinished.read(len(checks) - 1)
    arrays, tree = jax.tree.flatten(like)
    return tree.unflatten([mesh.from_parts(parts.pop(str(n), {}), a) for n, a in enumerate(arrays)]), checks
