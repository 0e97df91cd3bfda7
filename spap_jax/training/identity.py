"""What the result of a training run depends on: a run resumes only if all of it is the same."""

import dataclasses
from typing import Any

from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.data.tokens import TokenBlocks
from spap_jax.models.model import Model
from spap_jax.report.account import computing
from spap_jax.settings import FinetuneSettings


def finetune_identity(
    model: Model, teacher: Model | None, blocks: TokenBlocks, settings: FinetuneSettings
) -> dict[str, Any]:
    """Everything that the result depends on, by name; the models were read from folders."""
    how = dataclasses.asdict(settings) | {"lora_rank": settings.rank, "learning_rate": settings.rate}
    folders = {"model": model.source.folder, "teacher": teacher and teacher.source.folder}
    models = {name: folder and fingerprint(folder) for name, folder in folders.items()}
    return how | models | {"data": blocks.sha256, "sequence length": blocks.tokens.shape[1]} | computing()
