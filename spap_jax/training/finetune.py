"""Recovery training: steps on low-rank updates or all weights of a model, towards a teacher or the next token."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.data.tokens import TokenBlocks, check_counted, ids_of, mask_of
from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.models import DecoderConfig, Params
from spap_jax.models.decoder import check_length
from spap_jax.models.model import Model
from spap_jax.numerics import full_precision, step_dtype
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import fully_shard_params
from spap_jax.parallel.program import program
from spap_jax.parallel.sequences import Sequences, fitted_of
from spap_jax.report.account import computing, data_account, versions
from spap_jax.report.schema import Check, FinetuneReport
from spap_jax.settings import FinetuneSettings
from spap_jax.storage.location import public_name
from spap_jax.training import loop, lora
from spap_jax.training.loop import Restore, Stage, StepSchedule
from spap_jax.training.optimizers import clipped
from spap_jax.training.step import Frozen, Job, Recipe


def run(
    model: Model,
    tokens: Any,
    teacher: Model | None,
    settings: FinetuneSettings,
    watch: Callable[[Stage], object],
    restore: Restore = lambda like: None,
) -> tuple[Model, FinetuneReport]:
    """Trains a model to the end and returns it with the report.

    Args:
        tokens: Token blocks [B, T], or ``TokenBlocks``; the last of them are held out.
        teacher: The dense model whose predictions are the target; None for the next token of the text.
        watch: Called with every stage before training continues from it.
        restore: Returns the state of an interrupted run with the same identity, if there is one.

    Raises:
        UserError: sequences are too few, too short or too long, vocabularies differ, or the loss is not finite.
    """
    last = None
    for last in finetune_stages(model, tokens, teacher, settings, restore):
        watch(last)
    assert last is not None  # the first stage precedes any step
    trained = model.replace(params=mesh.to_process(result(model, last, settings)))
    used = {"lora_rank": None if settings.full else settings.rank, "learning_rate": settings.rate}
    report = FinetuneReport(
        settings=dataclasses.asdict(settings) | used,
        model=public_name(model.source.name),  # no path
        teacher=teacher and public_name(teacher.source.name),
        objective="next token" if teacher is None else "divergence from the teacher",
        data=data_account(tokens),
        trained_parameters=sum(array.size for array in jax.tree.leaves(last.best)),
        checks=last.checks,
        versions=versions(),
        seconds=sum(check.seconds for check in last.checks),
    )
    return trained, report


def finetune_stages(
    model: Model,
    tokens: Any,
    teacher: Model | None,
    settings: FinetuneSettings,
    restore: Restore = lambda like: None,
) -> Iterator[Stage]:
    """Trains a model; the arguments are those of ``run``. ``result`` returns the weights of the last stage's best.

    Yields:
        The stage at the start, or of the interrupted run, and after every ``check_every`` steps.
    """
    blocks = ids_of(tokens)
    check(model, blocks, teacher, settings)
    parts = _split(blocks, mask_of(tokens), settings.held_out)
    params = fully_shard_params(model.config, model.params)
    taught = fully_shard_params(teacher.config, teacher.params) if teacher else None
    frozen, start = ({}, params) if settings.full else (params, _updates(model, params, settings))
    recipe, s = Recipe(clipped, (settings.weight_decay,)), settings
    job = Job(model.config, recipe, step_dtype(), _scale(settings), teacher and teacher.config)
    schedule = StepSchedule(s.steps, s.rate, s.step_sequences, s.check_every, s.batch_tokens, (s.seed,))
    for stage in loop.stages(job, Frozen(frozen, taught), *parts, start, schedule, restore):
        _check_finite(stage.checks)
        yield stage


def result(model: Model, stage: Stage, settings: FinetuneSettings) -> Params:
    """Returns the weights that were best on the held-out sequences; the initial ones if no step improved on them."""
    if not any(check.taken for check in stage.checks[1:]):
        return model.params
    if settings.full:
        return stage.best
    params = fully_shard_params(model.config, model.params)
    return params | merged(model.config, params, stage.best, _scale(settings))


def check(model: Model, tokens: np.ndarray, teacher: Model | None, settings: FinetuneSettings) -> None:
    """Checks that the model can be trained on the tokens, before any work.

    Raises:
        UserError: sequences are too few, too short or too long, or vocabularies differ.
    """
    if len(tokens) < 2 or tokens.shape[1] < 2:
        raise UserError(
            f"training needs at least two sequences of at least two tokens, one of them to judge by, not "
            f"{len(tokens)} of {tokens.shape[1]}: give more sequences, or longer ones."
        )
    check_length(model.config, tokens.shape[1])
    if not settings.full and settings.rank > model.config.width:
        raise UserError(
            f"updates of rank {settings.rank} are no smaller than the weights of a model of width "
            f"{model.config.width}: lower {option('lora_rank')}, or train all weights with {option('full', True)}."
        )
    if teacher is None:
        return
    check_length(teacher.config, tokens.shape[1])
    folder = model.source.weights_folder
    if teacher is model or (folder is not None and folder == teacher.source.weights_folder):
        raise UserError(
            f"the teacher {teacher.source.name} is the model itself, which has nothing to learn from it: name the "
            "dense model that this one was made of."
        )
    if teacher.config.vocabulary != model.config.vocabulary:
        raise UserError(
            f"the teacher has a vocabulary of {teacher.config.vocabulary} tokens and the model one of "
            f"{model.config.vocabulary}: name the dense model that this one was made of."
        )


@program(static_argnames=("config", "scale"))
@full_precision
def merged(config: DecoderConfig, params: Params, best: Params, scale: float) -> Params:
    """Returns {"layers": ...} with low-rank updates merged, in the checkpoint's dtype, one layer at a time."""

    def one(layer: tuple[Params, Params]) -> Params:
        return lora.merged(layer[0], layer[1], scale)

    layers = jax.lax.map(one, (params["layers"], best["updates"]))
    return fully_shard_params(config, {"layers": layers})


def _updates(model: Model, params: Params, settings: FinetuneSettings) -> Params:
    """Returns updates that change nothing yet."""
    start = jax.jit(lora.start, static_argnames="rank")
    updates = start(params["layers"], settings.rank, jax.random.key(settings.seed))
    return fully_shard_params(model.config, {"updates": updates})


def _scale(settings: FinetuneSettings) -> float:
    return 1.0 if settings.full else settings.lora_alpha / settings.rank


def _split(tokens: np.ndarray, mask: np.ndarray | None, held_out: float) -> tuple[Sequences, Sequences]:
    """Splits sequences into training and held-out ones, at least one of each, both replicated in chunks of one."""
    count = len(tokens) - fitted_of(len(tokens), held_out)
    if mask is not None:
        check_counted(mask[:-count], "the sequences that are trained on")
        check_counted(mask[-count:], "the sequences that are held out")

    def part(rows: slice) -> Sequences:
        counted = None if mask is None else mesh.replicate(mesh.put(mask[rows, None]))
        ids = mesh.replicate(mesh.put(tokens[rows, None]))
        return Sequences(ids, len(ids), counted)

    return part(slice(-count)), part(slice(-count, None))


def _check_finite(checks: tuple[Check, ...]) -> None:
    loss, step = checks[-1].held_out, checks[-1].step
    if np.isfinite(loss) or any(check.taken for check in checks[1:]):
        return  # the steps go on from the best weights, half as large
    if step == 0:
        raise NotFiniteError("the model's loss on the held-out sequences is not finite: its weights are damaged.")
    raise NotFiniteError(f"the loss is no longer finite after {step} steps: give a smaller {option('learning_rate')}.")


def identity(model: Model, teacher: Model | None, blocks: TokenBlocks, settings: FinetuneSettings) -> dict[str, Any]:
    """Everything that the result depends on, by name: a run resumes only if all of it is the same.

    The models were read from folders.
    """
    how = dataclasses.asdict(settings) | {"lora_rank": settings.rank, "learning_rate": settings.rate}
    folders = {"model": model.source.folder, "teacher": teacher and teacher.source.folder}
    models = {name: folder and fingerprint(folder) for name, folder in folders.items()}
    return how | models | {"data": blocks.sha256, "sequence length": blocks.tokens.shape[1]} | computing()
