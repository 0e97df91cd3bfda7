"""A whole training run: from a model to a model, and the account of it."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from spap_jax import devices
from spap_jax.model import Model
from spap_jax.settings import FinetuneSettings
from spap_jax.training.report import FinetuneReport, new_finetune_report
from spap_jax.training.train import Begun, Stage, result, stages


def run(
    model: Model,
    tokens: Any,
    teacher: Model | None,
    settings: FinetuneSettings,
    watch: Callable[[Stage], None],
    begun: Begun | None = None,
) -> tuple[Model, FinetuneReport]:
    """Trains to the end.

    Args:
        model: What to train.
        tokens: Token blocks [B, T], or ``TokenBlocks``; the last of them are held out.
        teacher: The dense model whose predictions are to be met; the text itself where absent.
        settings: How.
        watch: Gets every stage before training goes on from it.
        begun: What an earlier process left of the same run.

    Raises:
        UserError: what ``stages`` raises.
    """
    started = time.perf_counter()
    last = None
    for last in stages(model, getattr(tokens, "tokens", tokens), teacher, settings, begun):
        watch(last)
    assert last is not None  # there is one before any step
    trained = replace(model, params=devices.alone(result(model, last, settings)))
    names = (model.source.name, teacher and teacher.source.name)
    return trained, new_finetune_report(settings, names, tokens, last.best, last.checks, time.perf_counter() - started)
