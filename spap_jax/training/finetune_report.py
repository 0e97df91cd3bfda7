"""Assembles the report of a training run."""

import dataclasses
from typing import Any

import jax

from spap_jax.checkpoint.locate import public_name
from spap_jax.pruning.prune_report import data_account, versions
from spap_jax.reporting.schema import Check, FinetuneReport
from spap_jax.settings import FinetuneSettings


def new_finetune_report(
    settings: FinetuneSettings,
    names: tuple[str, str | None],
    tokens: Any,
    trained: Any,
    checks: tuple[Check, ...],
    seconds: float,
) -> FinetuneReport:
    """Assembles a report.

    Args:
        settings: Settings of the run.
        names: Names of the model and its teacher as the user gave them; the report holds no path.
        tokens: An array [B, T], or ``TokenBlocks`` with a description and a hash.
        trained: The arrays that were trained.
        checks: All evaluations on the held-out sequences.
        seconds: Duration of the training.
    """
    used = {"lora_rank": None if settings.full else settings.rank, "learning_rate": settings.rate}
    return FinetuneReport(
        settings=dataclasses.asdict(settings) | used,
        model=public_name(names[0]),
        teacher=names[1] and public_name(names[1]),
        objective="next token" if names[1] is None else "divergence from the teacher",
        data=data_account(tokens),
        trained_parameters=sum(array.size for array in jax.tree.leaves(trained)),
        checks=checks,
        versions=versions(),
        seconds=seconds,
    )
