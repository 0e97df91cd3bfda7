"""Makes one checkpoint of ``spap prune``: prunes block by block into its folder, and stores each finished block."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from spap_jax import checkpoint, memory
from spap_jax.checkpoint.mirror import unfinished
from spap_jax.checkpoint.resume import Unfinished
from spap_jax.cli import console
from spap_jax.cli.prune_many import PruneRun
from spap_jax.cli.side_by_side import side_by_side
from spap_jax.cli.unfinished import layers_done, telling
from spap_jax.data import TokenBlocks
from spap_jax.evaluation.perplexity import check_finite, perplexity
from spap_jax.model import Model
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.placement import placed, stacked
from spap_jax.pruning.allocation import allocated_config
from spap_jax.pruning.card import OWN_LOADER, pruned_files
from spap_jax.pruning.pipeline import Begun, Step, checks_of, prune_layers, pruned_config
from spap_jax.pruning.progress import Progress
from spap_jax.pruning.report import LayerReport, PruneReport, new_report
from spap_jax.pruning.resume import begun, decided_widths, identity, keep
from spap_jax.pruning.waves import Choices
from spap_jax.settings import PruneSettings
from spap_jax.training.checks import Check


class Given(NamedTuple):
    """What all runs of a command share.

    Attributes:
        reader: The dense checkpoint.
        blocks: Calibration tokens.
        judged: Tokens on which perplexity is measured, if any.
        before: Returns the dense model's perplexity on them.
        dtype: Data type of the weights written; None for the source's.
        overwrite: Whether to replace existing outputs.
        choices: Channel selections that the runs share in the parallel schedule.
        progress: Tracks the progress of all runs.
    """

    reader: checkpoint.Reader
    blocks: TokenBlocks
    judged: TokenBlocks | None
    before: Callable[[], float | None]
    dtype: str | None
    overwrite: bool
    choices: Choices
    progress: Progress


def lead(runs: Sequence[PruneRun], given: Given, fresh: bool, before_end: list[Callable[[], str]]) -> list[Unfinished]:
    """Makes the checkpoints of a command, or those that an interrupted process did not finish.

    Args:
        runs: Output and settings of each run.
        given: What the runs share.
        fresh: Whether to start over.
        before_end: List to which the actions before a termination by SIGTERM are added.

    Returns:
        The stored records that mark each run as made, to be removed when the whole command has ended.
    """
    done = []
    for number, run in enumerate(runs):
        if len(runs) > 1:
            console.err.print(f"sparsity {run.settings.sparsity}, {number + 1} of {len(runs)} ...")
        done.append(_lead_one(run, given, number, fresh, before_end))
    if len(runs) > 1:
        console.table(*side_by_side(runs))
    return done


def _lead_one(run: PruneRun, given: Given, number: int, fresh: bool, before_end: list[Callable[[], str]]) -> Unfinished:
    """Makes the checkpoint of a run; ``number`` is its index in the command."""
    reader = given.reader
    which = identity(reader.fingerprint(), given.blocks, given.judged, given.dtype, run.settings)
    blocks = reader.config.layers
    amount = functools.partial(layers_done, blocks, checks_of(given.blocks.tokens, blocks, run.settings))
    with unfinished(run.output, which, blocks, fresh) as kept, telling(kept, before_end, amount):
        done = begun(kept, run.output)
        if done is None:
            console.err.print(f"{run.output} was made before the interruption")
            return kept
        checkpoint.check_output(run.output, given.overwrite, inputs={})  # was skipped for a resumed run
        narrow = _narrow(run.settings, given, kept)
        with checkpoint.Writer(
            run.output, narrow, reader.source, reader.dtypes,
            dtype=given.dtype, overwrite=given.overwrite, partial=kept.output,
        ) as writer:  # fmt: skip
            report = _prune_into(writer, given, run, number, kept, done)
            for name, text in pruned_files(report).items():
                writer.file(name, text)
        kept.drop_steps()
    _summary(report)
    console.err.print(f"wrote {run.output}")
    return kept


def follow(run: PruneRun, given: Given) -> None:
    """Runs a process that does not lead: makes the same computations on its own sequences, and writes no result."""
    done = begun(None, run.output)
    if done is None:
        return
    narrow = _narrow(run.settings, given, None)
    given.before()
    outer, layers = given.reader.outer(), []
    for step in _steps(run, given, outer, done, narrow, None):
        if step.fresh:
            step.kept()
        for _, layer in step.final:
            layers += _for_judging(layer, given)
        del step
    if given.judged:
        perplexity_of(_pruned(given, narrow, outer, layers), given.judged, "after pruning", given.progress)


def _narrow(settings: PruneSettings, given: Given, kept: Unfinished | None) -> DecoderConfig:
    """Returns the config of the pruned decoder; all processes have to call this."""
    reader = given.reader
    uniform = pruned_config(reader.config, settings)
    if settings.allocation == "uniform":
        return uniform

    def choose() -> tuple[int, ...]:
        with console.waiting("choosing a width for each layer"):
            args = reader.config, reader.outer(), reader.layer, given.blocks.tokens, settings
            return allocated_config(*args).layer_widths

    narrow = uniform.with_widths(decided_widths(kept, choose))
    if narrow.widths:
        console.err.print(f"MLP channels by layer: {', '.join(map(str, narrow.widths))}; {OWN_LOADER}")
    return narrow


def _steps(
    run: PruneRun, given: Given, outer: Params, done: Begun, narrow: DecoderConfig,
    watch: Callable[[int, int], None] | None,
) -> Iterator[Step]:  # fmt: skip
    args = given.reader.config, outer, given.reader.layer, given.blocks.tokens, run.settings
    return prune_layers(*args, done, narrow, watch, given.choices, given.blocks.mask)


def _prune_into(
    writer: checkpoint.Writer, given: Given, run: PruneRun, number: int, kept: Unfinished, done: Begun
) -> PruneReport:
    """Prunes block by block into the writer; a whole model is held only if there is data to evaluate it on."""
    reader, judged = given.reader, given.judged
    before = given.before()
    if before is not None:
        check_finite(before, reader.source.name)
    outer = reader.outer()
    writer.outer(outer)
    reports: list[LayerReport | Check] = []
    layers: list[Params] = []
    with console.layer_progress(given.progress, number) as progress:
        for step in _steps(run, given, outer, done, writer.config, progress.together):
            if step.fresh:
                keep(kept, step)
            for index, layer in step.final:
                writer.layer(index, layer)
                layers += _for_judging(layer, given)
            reports.append(step.report)
            progress.advance(step.report, step.fresh)
            del step
    extras: dict[str, Any] = {"run": kept.name, "bytes": {"before": reader.bytes, "after": writer.bytes}}
    if judged:
        after = perplexity_of(_pruned(given, writer.config, outer, layers), judged, "after pruning", given.progress)
        extras["perplexity"] = {"data": judged.description, "before": before, "after": after}
    extras["peak_memory_bytes"] = memory.peak()
    report = new_report(run.settings, reader.config, writer.config, reader.source.name, given.blocks, reports)
    return replace(report, extras=extras)


def perplexity_of(model: Model, judged: TokenBlocks, when: str, progress: Progress) -> float:
    """Measures perplexity and shows the progress."""
    with console.counting() as watch:

        def measured(done: int, total: int) -> None:
            progress.measured(done, total)
            watch(f"measuring perplexity {when}", done, total)

        return perplexity(model, judged.tokens, watch=measured, mask=judged.mask)


def _for_judging(layer: Params, given: Given) -> list[Params]:
    """Returns a final block on the host, if there is data to evaluate the model on."""
    return [jax.device_get(layer)] if given.judged else []


def _pruned(given: Given, narrow: DecoderConfig, outer: Params, layers: list[Params]) -> Model:
    """Returns the pruned model, spread over the devices; empties the list of its blocks."""
    return Model(narrow, placed(narrow, outer | {"layers": stacked(layers)}), given.reader.source)


def _summary(report: PruneReport) -> None:
    model, extras = report.model, report.extras
    width = "MLP channels per layer" if report.one_width else "MLP channels of the widest layer"
    counts = [("parameters", "parameters"), ("MLP parameters", "mlp_parameters"), (width, "intermediate")]
    if report.sparsity.heads.achieved:
        counts += [("attention heads per layer", "heads"), ("key/value heads per layer", "kv_heads")]
    rows = [
        (name, console.count_text(model[key]["before"]), console.count_text(model[key]["after"]),
         console.change_text(model[key]["before"], model[key]["after"]))
        for name, key in counts
    ]  # fmt: skip
    size = extras["bytes"]
    rows.append(("weights on disk", console.bytes_text(size["before"]), console.bytes_text(size["after"]),
                 console.change_text(size["before"], size["after"])))  # fmt: skip
    if measured := extras.get("perplexity"):
        before, after = measured["before"], measured["after"]
        rows.append(("perplexity", f"{before:.4f}", f"{after:.4f}", console.change_text(before, after)))
    console.table(f"{model['name']}: {report.sparsity.words} removed", ("", "before", "after", "change"), rows)
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    console.out.print(f"seconds: {phases}; peak memory {console.bytes_text(extras['peak_memory_bytes'])}")
    for line in report.advice:
        console.out.print(f"advice: {line}")
