"""A complete training run, which returns the trained model and its report."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from spap_jax import devices
from spap_jax.data.blocks import mask_of
from spap_jax.model import Model
from spap_jax.reporting.schema import FinetuneReport
from spap_jax.settings import FinetuneSettings
from spap_jax.training.engine import Stage, StoredStage
from spap_jax.training.finetune_report import new_finetune_report
from spap_jax.training.train import finetune_stages, result


def run(
    model: Model,
    tokens: Any,
    teacher: Model | None,
    settings: FinetuneSettings,
    watch: Callable[[Stage], object],
    begun: StoredStage | None = None,
) -> tuple[Model, FinetuneReport]:
    """Trains a model to the end and returns it with the report.

    Args:
        model: The model to train.
        tokens: Token blocks [B, T], or ``TokenBlocks``; the last of them are held out.
        teacher: The dense model whose predictions are the target; None for the next token of the text.
        settings: Settings of the training.
        watch: Called with every stage before training continues from it.
        begun: The state of an interrupted run with the same identity, if there is one.

    Raises:
        UserError: see ``finetune_stages``.
    """
    started = time.perf_counter()
    last = None
    blocks, mask = getattr(tokens, "tokens", tokens), mask_of(tokens)
    for last in finetune_stages(model, blocks, teacher, settings, begun, mask):
        watch(last)
    assert last is not None  # the first stage precedes any step
    trained = replace(model, params=devices.to_process(result(model, last, settings)))
    names = (model.source.name, teacher and teacher.source.name)
    return trained, new_finetune_report(settings, names, tokens, last.like, last.checks, time.perf_counter() - started)
