"""The Python API: load, prune, train, save and inspect models."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spap_jax import checkpoint, memory
from spap_jax import progress as shown
from spap_jax.backend import peak_of_a_device, quick_compilation
from spap_jax.checkpoint.side_files import accounts
from spap_jax.data.token_ids import token_blocks
from spap_jax.data.tokens import TokenBlocks, load_tokens
from spap_jax.errors import UserError
from spap_jax.evaluation.generation import generate
from spap_jax.evaluation.inspect import divergence, logits, loss, perplexity
from spap_jax.evaluation.writing import settings_for, write
from spap_jax.models import DecoderConfig, cost
from spap_jax.models.blocks import get_layer
from spap_jax.models.model import UNKNOWN, Model, checked
from spap_jax.parallel.mesh import use_mesh
from spap_jax.parallel.placement import place_params, stack_layers
from spap_jax.parallel.sequences import fitted_of
from spap_jax.planning.plan import run_that_fits
from spap_jax.pruning.dial import decide, reached
from spap_jax.pruning.inspect import moments
from spap_jax.pruning.prune import MemoryStore
from spap_jax.pruning.prune import prune as prune_blocks
from spap_jax.pruning.prune_report import new_report
from spap_jax.pruning.run import Dense, joint_sequences, warn_of_settings
from spap_jax.pruning.widths import check_allocation, choose_widths
from spap_jax.quantities import change_text
from spap_jax.report.card import converted_files, pruned_files, trained_files
from spap_jax.report.schema import Change, Check, Extras, FinetuneReport, LayerReport, PruneReport
from spap_jax.settings import LENGTH, SEQUENCES, FinetuneSettings, PruneSettings
from spap_jax.training.finetune import run
from spap_jax.training.loop import Stage

__all__ = [
    "FinetuneResult",
    "PruneResult",
    "divergence",
    "finetune",
    "generate",
    "load",
    "load_tokens",
    "logits",
    "loss",
    "moments",
    "perplexity",
    "prune",
    "save",
    "write",
]


def load(name: str | Path) -> Model:
    """Reads a model from a local folder, of Hugging Face or of Orbax, or from the hub.

    A model that does not fit the memory of one device is divided among as many as it needs.

    Args:
        name: The folder, its address (gs://bucket/model), or a hub id of the form owner/name.

    Raises:
        UserError: There is no such model, it is not supported, or its files are damaged.
    """
    return checkpoint.load(name, place_params)


@dataclass(frozen=True, eq=False, repr=False)
class PruneResult:
    """A pruned model and the report of how it was made; ``spap.save`` writes both.

    Attributes:
        model: The pruned model.
        report: Report of the pruning, layer by layer.
    """

    model: Model
    report: PruneReport

    def __repr__(self) -> str:
        widths, parameters = self.report.model.widths.total, self.report.model.parameters
        return (
            f"PruneResult(MLP channels {change_text(widths.before, widths.after)}, parameters "
            f"{change_text(parameters.before, parameters.after)}, model={self.model!r})"
        )


def prune(
    model: Model,
    tokens: Any = None,
    *,
    settings: PruneSettings | None = None,
    progress: bool | Callable[[LayerReport | Check], None] | None = None,
    devices: int | None = None,
    model_devices: int = 1,
    **changes: Any,
) -> PruneResult:
    """Removes MLP channels from every layer and adjusts the remaining weights; ``model`` is not modified.

    Every setting of `PruneSettings` can be given as a keyword argument, which overrides the value in ``settings``.

    Args:
        model: A model from ``load``, or the model of an earlier result.
        tokens: Calibration token ids [B, T]; the result of ``load_tokens``; or an iterable of arrays [B, T], such as a
            Grain loader or a generator, from which 128 sequences are drawn, and as many further ones as the joint steps
            read, if there are any. By default the model writes its own, as ``write`` does: 128 sequences of up to 512
            tokens.
        settings: Pruning settings; by default ``PruneSettings()``.
        progress: Whether to show progress on standard error; by default it is shown in a terminal and in a notebook. A
            function is called instead, with the report of every layer once it is pruned, and with every measurement in
            the joint steps.
        devices: Number of devices to use; by default all of them, but only one if they are CPUs.
        model_devices: Number of devices that the weights are sharded over; a divisor of the number of devices.
        **changes: Individual settings.

    Raises:
        UserError: the model is not a ``Model`` (``spap.load`` makes one of a path), or a setting, the tokens or the
            model's numbers are unusable.
    """
    model = checked(model)
    config = model.config
    settings = (settings or PruneSettings()).replace(**changes)
    weight_bytes = checkpoint.weight_bytes(model) / cost.parameters(model.family, config).total
    about = next(reached(config, settings, weight_bytes))
    check_allocation(config, about, model_devices)
    warn_of_settings(config, about, changes)
    if tokens is None:
        tokens = _own_tokens(model, devices)
    elif _gives_blocks(tokens):
        tokens = _drawn(tokens, config, settings)
    tokens = _checked(tokens, config)
    outer = {name: model.params[name] for name in ("embed", "head")}
    dense = Dense(config, outer, functools.partial(get_layer, model.params["layers"]))
    with use_mesh(devices, model_devices), quick_compilation():
        settings = decide(dense, tokens, settings, weight_bytes)
        run = run_that_fits(config, tokens, settings, model.params)
        if settings.allocation == "global":
            run = replace(run, pruned=run.pruned.with_widths(choose_widths(run, dense)))
        store = MemoryStore(run.pruned)
        steps = run.joint.steps if run.joint else 0
        with shown.pruning(progress, run.pruned.layers, steps) as (report, step):
            reports = prune_blocks(run, dense, store, report, step)
    params = model.params | {"layers": stack_layers(store.layers)}
    sharers = model_devices if model_devices > 1 else None
    smaller = Model(run.pruned, place_params(run.pruned, params, devices, sharers), model.source)
    size = Change(checkpoint.weight_bytes(model), checkpoint.weight_bytes(smaller))
    extras = Extras(size, None, memory.peak(), peak_of_a_device())
    report = replace(new_report(run, model.source.name, tokens, reports), extras=extras)
    return PruneResult(_told(smaller, pruned_files(report)), report)


def _own_tokens(model: Model, devices: int | None) -> TokenBlocks:
    """Lets a model write what it is calibrated on."""
    length = min(LENGTH, model.config.positions)
    rows = write(model, settings=settings_for(model, SEQUENCES, length), devices=devices)
    named = model.source.folder or model.source.name
    return load_tokens(rows, tokenizer=named, sequence_length=length, sequences=SEQUENCES, role="calibration")


def _gives_blocks(tokens: Any) -> bool:
    """Whether tokens are an iterable of arrays [B, T], rather than one array or a sequence of sequences."""
    if isinstance(tokens, Sequence):
        return len(tokens) > 0 and getattr(tokens[0], "ndim", 0) == 2
    return isinstance(tokens, Iterable) and not hasattr(tokens, "__array__")


def _drawn(arrays: Iterable[Any], config: DecoderConfig, settings: PruneSettings) -> TokenBlocks:
    """Draws calibration sequences from arrays [B, T], and what there is of the further ones that joint steps read."""
    rows: list[np.ndarray] = []
    most = SEQUENCES
    for array in arrays:
        rows.extend(token_blocks(array, config))
        first, length = len(rows[0]), len(rows[-1])
        if first != length:
            raise UserError(f"the tokens come in sequences of {first} and of {length}: give all the same length.")
        joint = joint_sequences(config, settings, SEQUENCES, length)
        most = SEQUENCES + max(0, joint - fitted_of(SEQUENCES, settings.held_out))
        if len(rows) >= most:
            break
    if len(rows) < SEQUENCES:
        raise UserError(f"the tokens end after {len(rows)} of {SEQUENCES} sequences: give more, or one array [B, T].")
    ids = np.stack(rows[:most])
    description = f"token ids from an iterable: {SEQUENCES} sequences of {ids.shape[1]} tokens"
    further = TokenBlocks(ids[SEQUENCES:], description, len(ids)) if len(ids) > SEQUENCES else None
    return TokenBlocks(ids[:SEQUENCES], description, len(ids), None, further)


@dataclass(frozen=True, eq=False, repr=False)
class FinetuneResult:
    """A trained model and the report of its training; ``spap.save`` writes both.

    Attributes:
        model: The trained model.
        report: Report of the training.
    """

    model: Model
    report: FinetuneReport

    def __repr__(self) -> str:
        held_out = self.report.held_out
        return (
            f"FinetuneResult({self.report.steps} steps, held-out loss {held_out['before']:.4f} to "
            f"{held_out['after']:.4f}, model={self.model!r})"
        )


def finetune(
    model: Model,
    tokens: Any,
    *,
    teacher: Model | None = None,
    settings: FinetuneSettings | None = None,
    progress: bool | Callable[[Check], None] | None = None,
    devices: int | None = None,
    model_devices: int = 1,
    **changes: Any,
) -> FinetuneResult:
    """Trains a model, usually a pruned one, on text or to match the dense model; ``model`` is not modified.

    Some sequences are held out. The result has the weights with the lowest held-out loss, which is never higher than
    that of the given model. Every setting can be given as a keyword argument, which overrides the value in
    ``settings``.

    Args:
        model: A model from ``load``, or the model of an earlier result.
        tokens: Training token ids [B, T], or the result of ``load_tokens``; the last sequences are held out.
        teacher: The dense model. If it is given, the loss is the divergence from its predictions, not the next-token
            loss.
        settings: Training settings; by default ``FinetuneSettings()``.
        progress: Whether to show progress on standard error; by default it is shown in a terminal and in a notebook. A
            function is called instead, after every evaluation on the held-out sequences.
        devices: Number of devices to use; by default all of them, but only one if they are CPUs.
        model_devices: Number of devices that the weights are sharded over; a divisor of the number of devices.
        **changes: Individual settings.

    Raises:
        UserError: the model or the teacher is not a ``Model``, a setting or the tokens are unusable, the teacher is
            another model's, or the training diverges.
    """
    model, teacher = checked(model), None if teacher is None else checked(teacher)
    settings = (settings or FinetuneSettings()).replace(**changes)
    tokens = _checked(tokens, model.config)
    with use_mesh(devices, model_devices), shown.training(settings.steps, progress) as show:

        def watch(stage: Stage) -> None:
            show(stage.checks[-1])

        trained, report = run(model, tokens, teacher, settings, watch)
    sharers = model_devices if model_devices > 1 else None
    placed = place_params(trained.config, trained.params, devices, sharers)
    return FinetuneResult(_told(trained.replace(params=placed), trained_files(report, accounts(model.source))), report)


def _told(model: Model, files: Mapping[str, str]) -> Model:
    """Returns a model whose weights were made in memory, with the card and the reports that they have from now on."""
    return model.replace(source=replace(model.source, accounts=tuple(files.items())))


def _checked(tokens: Any, config: DecoderConfig) -> np.ndarray | TokenBlocks:
    """Returns token ids [B, T], checked; those of ``load_tokens`` with their further windows."""
    blocks = token_blocks(tokens, config)
    if not isinstance(tokens, TokenBlocks):
        return blocks
    if (further := tokens.further) is not None:
        ids = token_blocks(further, config)
        if ids.shape[1] != blocks.shape[1]:
            raise UserError(
                f"the tokens are windows of {blocks.shape[1]}, and those that follow them in `further` of "
                f"{ids.shape[1]}: cut both, or leave the others out with dataclasses.replace(tokens, further=None)."
            )
        further = replace(further, tokens=ids)
    return replace(tokens, tokens=blocks, further=further)


def save(
    model: Model | PruneResult | FinetuneResult,
    folder: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a model as a Hugging Face folder that stock loaders read; the folder is complete or absent.

    The report and the model card of a result are written too, as by ``spap prune`` and ``spap finetune``, so that
    ``spap report`` and ``spap push`` accept the folder.

    Args:
        model: The model to write, or a result of ``prune`` or ``finetune``.
        folder: Output folder: a path, or an address such as gs://bucket/pruned.
        dtype: "float32", "bfloat16" or "float16"; by default the dtypes of the arrays.
        overwrite: Whether to replace an existing checkpoint.
        files: Additional text files, by name.

    Raises:
        UserError: it is not a model, the folder may not be replaced, a name of ``files`` has folders, there is no room,
            or a weight does not fit the dtype.
    """
    own: dict[str, str] = {}
    if isinstance(model, PruneResult):
        model, report = model.model, model.report
        size = report.extras.bytes and replace(report.extras.bytes, after=checkpoint.weight_bytes(model, dtype))
        own = pruned_files(replace(report, extras=replace(report.extras, bytes=size)))
    elif isinstance(model, FinetuneResult):
        model, report = model.model, model.report
        there = converted_files(accounts(model.source), checkpoint.weight_bytes(model, dtype), stock=True)
        own = {name: content.decode() for name, content in there.items()}
    files = own | dict(files or {})
    if wrong := [name for name in files if name in ("", "..") or Path(name).name != name]:
        raise UserError(f"a file to write is called {wrong[0]!r}: give each a name without folders.")
    if checked(model).source == UNKNOWN:
        raise UserError(
            "a model that a jitted function returned has no source, which has its config and tokenizer: save "
            "model.replace(source=loaded.source), with the model that spap.load returned."
        )
    checkpoint.save(checked(model), folder, dtype=dtype, overwrite=overwrite, files=files)
