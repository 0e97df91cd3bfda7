"""Makes the checkpoints of ``spap prune``: prunes block by block into a folder, and stores each finished block.

All processes of a run make the same computations on their own sequences. Each stores what its devices hold of a state;
the leading one stores the blocks and writes.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import jax

from spap_jax import checkpoint, memory
from spap_jax.backend import peak_of_a_device
from spap_jax.checkpoint.behind import Behind
from spap_jax.checkpoint.publish import read_made
from spap_jax.checkpoint.unfinished import Unfinished, begun_with
from spap_jax.cli import console
from spap_jax.cli.prune_many import PruneRun, check_different
from spap_jax.cli.resume_messages import layers_done, telling
from spap_jax.cli.texts import Texts, chosen_length, perplexity_of
from spap_jax.data.tokens import TokenBlocks
from spap_jax.errors import UserError
from spap_jax.evaluation.perplexity import check_finite
from spap_jax.models import DecoderConfig, Params
from spap_jax.models.model import Model
from spap_jax.parallel.placement import layer_to_host, shard_params, stack_layers
from spap_jax.parallel.processes import leads, meet, told_to_all
from spap_jax.planning.memory import block_elements, decoder_elements
from spap_jax.planning.plan import Request
from spap_jax.planning.preflight import settings_here
from spap_jax.planning.workload import number_of_joint_steps
from spap_jax.progress import PruningProgress
from spap_jax.pruning import joint
from spap_jax.pruning.ignored import warn_of_ignored
from spap_jax.pruning.layer_widths import Widths, allocated, check_allocation
from spap_jax.pruning.narrow import pruned_config, warn_of_sparsity
from spap_jax.pruning.pipeline import prune_layers
from spap_jax.pruning.prune_report import new_report
from spap_jax.pruning.run import Run, resolve
from spap_jax.pruning.sampling import with_samples
from spap_jax.pruning.step_store import prune_identity, stored_steps
from spap_jax.pruning.waves import Choices
from spap_jax.quantities import bytes_text, change_text, count_text, duration_text, peak_text, percent_text
from spap_jax.report.card import OWN_LOADER, pruned_files
from spap_jax.report.schema import Change, Check, Extras, LayerReport, Perplexities, PruneReport, parsed

_GIGABYTE = 10**9


class Command(NamedTuple):
    """What all runs of a command share.

    Attributes:
        reader: The dense checkpoint.
        read: Calibration tokens as they were read, by which an interrupted run is known: kernels of a GPU may differ
            from run to run, and the model then writes other samples.
        blocks: Calibration tokens, with the samples.
        judged: Tokens on which perplexity is measured, if any.
        before: Returns the dense model's perplexity on them.
        dtype: Data type of the weights written; None for the source's.
        overwrite: Whether to replace existing outputs.
        choices: Channel selections that the runs share in the parallel schedule.
        progress: Tracks the progress of all runs.
    """

    reader: checkpoint.Reader
    read: TokenBlocks
    blocks: TokenBlocks
    judged: TokenBlocks | None
    before: Callable[[], float | None]
    dtype: str | None
    overwrite: bool
    choices: Choices
    progress: PruningProgress


def reader_of(model: str) -> checkpoint.Reader:
    """Opens the dense checkpoint.

    Raises:
        UserError: it is an Orbax folder.
    """
    folder = checkpoint.locate(model)
    if checkpoint.is_orbax(folder):
        raise UserError(
            f"{model} is an Orbax folder, and pruning reads Hugging Face folders layer by layer: convert it first with "
            f"spap convert {model} --to huggingface --output DIR."
        )
    return checkpoint.Reader(folder, name=model)


def narrow_configs(reader: checkpoint.Reader, wanted: list[PruneRun], model_devices: int) -> list[DecoderConfig]:
    """Returns the pruned config of each run; refuses what could not be pruned or written, before any work."""
    narrows = [pruned_config(reader.config, run.settings) for run in wanted]
    for run, narrow in zip(wanted, narrows, strict=True):
        check_allocation(reader.config, narrow, run.settings, model_devices)
        checkpoint.check_describable(reader.source, narrow)
    check_different(wanted, narrows)
    warn_of_ignored(wanted[0].settings)
    for run, narrow in zip(wanted, narrows, strict=True):
        warn_of_sparsity(reader.config, narrow, run.settings)
    return narrows


def fitted_to_memory(reader: checkpoint.Reader, wanted: list[PruneRun], texts: Texts, fresh: bool) -> list[PruneRun]:
    """Settles what runs leave to the memory of the devices, before any weight is read, and warns of too little.

    Runs differ only in what they remove, and the one that removes least takes most memory. Unless they start ``fresh``,
    those that were interrupted go on as they began.
    """
    assert reader.source.folder  # from which it reads
    config, weight_bytes = checkpoint.read_config(reader.source.folder / "config.json", reader.source.name)
    length = chosen_length(texts.sequence_length, config)
    if min(texts.sequences, length) < 1:  # which is refused when the text is read
        return wanted
    largest = min((run.settings for run in wanted), key=lambda settings: settings.sparsity)
    blocks = settings_here(Request(config, largest, texts.sequences, length, weight_bytes)).joint_blocks
    asked = largest.joint_blocks is not None

    def settled(run: PruneRun) -> PruneRun:
        begun = told_to_all(begun_with(run.output) if leads() and not (asked or fresh) else {})
        return run._replace(settings=run.settings.replace(joint_blocks=begun.get("joint_blocks", blocks)))

    fitted = list(map(settled, wanted))
    if not asked and (number := fitted[0].settings.joint_blocks):
        many = f"{number} block{'s' * (number > 1)}"
        console.err.print(f"joint steps will adjust {many} at a time, as many as fit in memory")
    return fitted


def opened(
    reader: checkpoint.Reader,
    texts: Texts,
    wanted: list[PruneRun],
    narrows: list[DecoderConfig],
    dtype: str | None,
    overwrite: bool,
) -> Command:
    """Reads what all runs of a command share."""
    settings = wanted[0].settings  # the same for all runs, except for the sparsity
    read, judged = texts.read(reader.source, reader.config, seed=settings.seed, further=bool(settings.passes))

    def whole_model() -> Model:
        with console.waiting(f"reading all of {reader.source.name}"):
            return reader.model(shard_params)

    with console.counting() as watch:
        read_later = texts.eval or settings.sampled or settings.allocation == "global"  # all weights, and so checked
        if leads() and not (reader.at_address or read_later):
            reader.check_finite(functools.partial(_gigabytes, watch))
        meet()  # the others do not read all weights
        blocks = with_samples(read, whole_model, settings, functools.partial(watch, "sequences written"))
    windows = len(judged.tokens) if judged else 0
    steps = number_of_joint_steps(reader.config, settings, blocks.tokens.shape)
    progress = PruningProgress(reader.config.layers, steps, windows, len(wanted), console.err)

    @functools.cache
    def before() -> float | None:
        return perplexity_of(whole_model(), judged, "before pruning", progress.measured) if judged else None

    choices = Choices(narrow.intermediate for narrow in narrows)
    return Command(reader, read, blocks, judged, before, dtype, overwrite, choices, progress)


def _gigabytes(watch: Callable[[str, int, int], None], seen: int, total: int) -> None:
    """Shows how much was checked, unless the check takes only a moment."""
    if total >= _GIGABYTE:
        watch("GB of weights checked", seen // _GIGABYTE, total // _GIGABYTE)


def make_checkpoints(
    wanted: Sequence[PruneRun],
    narrows: Sequence[DecoderConfig],
    command: Command,
    fresh: bool,
    before_end: list[Callable[[], str]],
) -> list[Unfinished]:
    """Makes the checkpoints of a command, or those that an interrupted process did not finish.

    Args:
        wanted: Output and settings of each run.
        narrows: The pruned config of each run, before widths are chosen by layer.
        command: What the runs share.
        fresh: Whether to start over.
        before_end: List to which the actions before a termination by SIGTERM are added.

    Returns:
        The stored records that mark each run as made, to be removed when the whole command has ended.
    """
    with ExitStack() as until_all_are_made:
        # Before any work, since another run may have begun a later output.
        stores = [until_all_are_made.enter_context(_store_of(one, command, fresh)) for one in wanted]
        for number, (one, narrow, store) in enumerate(zip(wanted, narrows, stores, strict=True)):
            if len(wanted) > 1:
                console.err.print(f"sparsity {one.settings.sparsity}, {number + 1} of {len(wanted)} ...")
            dense = command.reader.config, command.reader.outer(), command.reader.layer
            run = resolve(*dense, command.blocks, one.settings, narrow, command.choices)
            amount = functools.partial(layers_done, run.config.layers, joint.number_of_checks(run))
            with telling(store, before_end, amount):
                _make(one, run, command, number, store)
    if leads() and len(wanted) > 1:
        texts = [(one, read_made(one.output, "spap_report.json")) for one in wanted]
        there = [(one, parsed(text, PruneReport)) for one, text in texts if text]  # the user may have moved others
        if there:
            console.table(*_side_by_side(there))
    return stores


def _store_of(one: PruneRun, command: Command, fresh: bool) -> Unfinished:
    """Opens what is kept of a run."""
    reader, told = command.reader, (command.judged, command.dtype, one.settings)
    which = prune_identity(reader.fingerprint(), command.read, *told)
    return Unfinished(one.output, which, reader.config.layers, fresh)


def _make(one: PruneRun, run: Run, command: Command, number: int, store: Unfinished) -> None:
    """Makes the checkpoint of a run, unless an earlier process has; ``number`` is its index in the command."""
    earlier = stored_steps(store, one.output)
    if earlier is None:
        console.err.print(f"{one.output} was made before the interruption")
        return
    if leads():  # was skipped for a resumed run
        checkpoint.check_output(one.output, command.overwrite, inputs={})
    run = allocated(replace(run, begun=earlier), functools.partial(_decided, store))
    if run.settings.allocation == "global" and run.narrow.widths:
        console.err.print(f"MLP channels by layer: {', '.join(map(str, run.narrow.widths))}; {OWN_LOADER}")
    if leads():
        _write(one, run, command, number, store)
    else:
        _prune(run, command, number, store, None)
    store.drop_steps()
    if leads():
        console.err.print(f"wrote {one.output}")


def _write(one: PruneRun, run: Run, command: Command, number: int, store: Unfinished) -> None:
    source = command.reader.source
    with checkpoint.Writer(
        one.output, run.narrow, source, command.reader.dtypes, dtype=command.dtype, overwrite=command.overwrite,
        partial=store.output, kept_beside=_blocks_to_keep(run, command),
    ) as writer:  # fmt: skip
        reports, measured = _prune(run, command, number, store, writer)
        command.reader.check_unchanged()
        size = Change(command.reader.bytes, writer.bytes)
        extras = Extras(store.name, size, measured, memory.peak(), peak_of_a_device())
        report = replace(new_report(run, source.name, command.blocks, reports), extras=extras)
        for name, text in pruned_files(report).items():
            writer.file(name, text)
    _summary(report)


def _blocks_to_keep(run: Run, command: Command) -> int:
    """Returns the bytes of the blocks that are stored until the result is complete, in the type of the source."""
    stored = sum(isinstance(report, LayerReport) for report in run.begun.reports)
    elements = (run.config.layers - stored) * block_elements(run.narrow)
    return command.reader.bytes * elements // decoder_elements(run.config)


def _decided(store: Unfinished, choose: Callable[[], Widths]) -> Widths:
    """Returns the widths that an earlier process chose, or else chooses and stores them; all processes call this."""
    widths = told_to_all(store.decided)
    if widths is None:
        with console.waiting("choosing a width for each layer"):
            widths = told_to_all(choose())
        store.decide(widths)
    return tuple(widths)


def _prune(
    run: Run, command: Command, number: int, store: Unfinished, writer: checkpoint.Writer | None
) -> tuple[list[LayerReport | Check], Perplexities | None]:
    """Prunes block by block into the writer; a whole model is held only if there is data to evaluate it on.

    A block is written while the next one is computed. If that fails, the run ends when the next one is to be written.

    Returns:
        The reports of all steps, and the perplexities, if they are measured.
    """
    judged, source = command.judged, command.reader.source
    before = command.before()
    if before is not None:
        check_finite(before, source.name)
    if writer:
        writer.outer(run.outer)
    reports: list[LayerReport | Check] = []
    layers: list[Params] = []
    command.progress.begin(number)
    with closing(command.progress) as progress, Behind() as behind:
        for step in prune_layers(run, progress.step):
            if step.fresh:
                store.add(step.kept, asdict(step.report))
            # No device holds a layer until it is written, or while the next one is pruned.
            settled = ((index, layer_to_host(run.narrow, layer)) for index, layer in step.final)
            for index, on_host in settled:
                if writer:
                    behind(writer.layer, index, on_host)
                if judged:
                    layers.append(on_host)
            reports.append(step.report)
            progress.report(step.report, step.fresh)
            del step, settled
    if not judged or before is None:
        return reports, None
    params = shard_params(run.narrow, run.outer | {"layers": stack_layers(layers)})
    if command.dtype:
        params = jax.tree.map(lambda array: array.astype(command.dtype), params)  # as it is written
    after = perplexity_of(Model(run.narrow, params, source), judged, "after pruning", command.progress.measured)
    return reports, Perplexities(judged.description, before, after)


def _summary(report: PruneReport) -> None:
    model, extras = report.model, report.extras
    width = "MLP channels per layer" if report.one_width else "MLP channels of the widest layer"
    counts = {"parameters": model.parameters, "MLP parameters": model.mlp_parameters, width: model.intermediate}
    if report.fewer_heads:
        counts |= {"attention heads per layer": model.heads, "key/value heads per layer": model.kv_heads}
    rows = [_row(name, count, count_text) for name, count in counts.items()]
    if extras.bytes:
        rows.append(_row("weights on disk", extras.bytes, bytes_text))
    if extras.perplexity:
        rows.append(_row("perplexity", extras.perplexity, "{:.4f}".format))
    console.table(f"{model.name}: {report.sparsity.words} removed", ("", "before", "after", "change"), rows)
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    console.out.print(f"seconds: {phases}; peak memory {peak_text(extras.peak_memory_bytes, extras.peak_device_bytes)}")
    for line in report.advice:
        console.out.print(f"advice: {line}")


def _row(name: str, change: Change | Perplexities, text: Callable[[Any], str]) -> tuple[str, ...]:
    return name, text(change.before), text(change.after), change_text(change.before, change.after)


def _side_by_side(runs: Sequence[tuple[PruneRun, PruneReport]]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Compares the results of a command's runs: a row for the dense model and one for each sparsity.

    Args:
        runs: The finished runs with their reports.

    Returns:
        A table: its title, the names of its columns, and its rows.
    """
    reports = [report for _, report in runs]
    sizes = [report.extras.bytes for report in reports if report.extras.bytes]
    measured = [report.extras.perplexity for report in reports if report.extras.perplexity]
    columns = {
        "sparsity": ["dense", *(str(run.settings.sparsity) for run, _ in runs)],
        "channels removed": ["", *(percent_text(report.removed) for report in reports)],
        "parameters": _before_and_after([report.model.parameters for report in reports], count_text),
        "weights on disk": _before_and_after(sizes, bytes_text),
    }
    if measured:
        columns["perplexity"] = _before_and_after(measured, "{:.4f}".format)
    columns["time"] = ["", *(duration_text(sum(report.seconds.values()), digits=2) for report in reports)]
    title = f"{reports[0].model.name} at {len(runs)} sparsities"
    return title, tuple(columns), list(zip(*columns.values(), strict=True))


def _before_and_after(changes: Sequence[Change | Perplexities], text: Callable[[Any], str]) -> list[str]:
    """Returns what there was before, the same in all runs, and what each run left."""
    return [text(changes[0].before), *(text(change.after) for change in changes)]
