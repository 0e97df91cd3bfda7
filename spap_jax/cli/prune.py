"""``spap prune``."""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter

from spap_jax.cli import console
from spap_jax.cli.options import Bos, Count, Data, Devices, ModelName, OutputPath, Overwrite, Process, Resume
from spap_jax.cli.texts import chosen_length, perplexity_of, read_texts
from spap_jax.cli.write import with_own_text
from spap_jax.errors import UserError
from spap_jax.settings import LENGTH, OWN, PruneSettings
from spap_jax.storage.location import check_name, is_address

if TYPE_CHECKING:
    from spap_jax import checkpoint
    from spap_jax.checkpoint.store import FolderStore
    from spap_jax.data.tokens import TokenBlocks
    from spap_jax.models import DecoderConfig
    from spap_jax.progress import PruningProgress
    from spap_jax.pruning.run import Dense, Run
    from spap_jax.report.schema import PruneReport


def fractions(_: Any, tokens: Sequence[Any]) -> tuple[float, ...]:
    """Parses numbers separated by commas.

    Raises:
        ValueError: one of them is not a number.
    """
    return tuple(float(word) for token in tokens for word in token.value.split(","))


def whole_numbers(_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    """Parses whole numbers separated by commas.

    Raises:
        ValueError: one of them is not a whole number.
    """
    return tuple(int(word) for token in tokens for word in token.value.split(","))


SparsityOption = Annotated[tuple[float, ...], Parameter(converter=fractions, negative="", show_default=False)]
BlocksOption = Annotated[tuple[int, ...], Parameter(converter=whole_numbers, negative="", show_default=False)]
OTHERS = Parameter(name="*", parse="^(?!sparsity$|drop_blocks$)")
"""Makes an option of every field of PruneSettings except those with an option of their own."""


def prune(
    model: ModelName,
    /,
    *,
    data: Data = OWN,
    output: OutputPath,
    sparsity: SparsityOption = (),
    drop_blocks: BlocksOption = (),
    sequences: Count = 128,
    sequence_length: Count | None = None,
    bos: Bos = None,
    eval: Data | None = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    devices: Devices = None,
    model_devices: int = 1,
    process: Process = None,
    settings: Annotated[PruneSettings, OTHERS] = PruneSettings(),  # noqa: B008 (frozen)
) -> None:
    """Write a smaller checkpoint, with fewer MLP channels (and attention heads, if asked for) in every layer.

    ```
    spap prune meta-llama/Llama-3.2-1B --output pruned
    spap prune ./model --data own:0.5,text.jsonl:0.5 --effort high --output out
    ```

    An interrupted run picks up where it stopped when the same command is given again; until the output is complete,
    what is done is kept beside it, in .OUTPUT.resume. Exit code 0 is success, 2 an error that one sentence explains,
    75 a run that the same command continues (after SIGTERM), 1 a fault of spap, and 130 Ctrl-C.

    Args:
        model: Checkpoint to prune: a folder, a hub id, or an address such as gs://bucket/model.
        data: Calibration text: own (written by the model itself), wikitext2, c4, a data set of the hub, a .txt, .jsonl,
            .parquet or .npy file, or a mixture: own:0.5,c4:0.5.
        output: Folder or address (gs://bucket/pruned) to write. It is either complete or absent.
        sparsity: Fraction of the MLP channels to remove, by default 0.3, or 0 with --drop-blocks; several, as in
            0.1,0.2, make OUTPUT/sparsity-0.1 and so on.
        drop_blocks: Numbers of whole blocks to remove, as in 17,20; --target finds them itself. By default none.
        eval: Text on which to measure perplexity before and after pruning; the same kinds as --data.
        sequences: Number of calibration sequences, drawn at random.
        sequence_length: Tokens in each sequence. By default as many as the model's positions allow, at most 2048, or
            512 of own text.
        dtype: Data type of the weights that are written. By default that of the source.
        model_devices: Number of devices among which the weights are divided, for models too large for one.
        settings: How to prune.
    """
    from spap_jax import checkpoint
    from spap_jax.backend import quick_compilation
    from spap_jax.cli.inputs import fetch, inputs
    from spap_jax.cli.options import wait_for_others
    from spap_jax.cli.stopping import stopping
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.parallel.processes import barrier, is_leader
    from spap_jax.progress import PruningProgress
    from spap_jax.pruning.dial import reached
    from spap_jax.pruning.run import Dense, joint_sequences, pruned_config, warn_of_settings
    from spap_jax.pruning.widths import check_allocation

    wanted = outputs(output, sparsity, settings.replace(drop_blocks=drop_blocks))
    for one in wanted:
        checkpoint.check_output(one.output, overwrite, inputs=inputs(model, None, data, eval), resume=resume)
    with stopping() as before_end:
        wait_for_others(process)
        fetch([model], [data, eval])
        checkpoint.fetch_side_files(model)
        with console.waiting(f"reading {model}"):
            reader = _reader_of(model)
        barrier()  # one process may have had to download it
        abouts = [next(reached(reader.config, one.settings, _weight_bytes(reader, dtype))) for one in wanted]
        configs = [pruned_config(reader.config, about) for about in abouts]
        _check_different(wanted, configs)
        for one, about, config in zip(wanted, abouts, configs, strict=True):
            checkpoint.check_describable(reader.source, config)
            _check_room(one, reader, config)
            check_allocation(reader.config, about, model_devices)
            warn_of_settings(reader.config, about)
        if data == OWN:
            sequence_length = sequence_length or min(LENGTH, reader.config.positions)
        length = chosen_length(sequence_length, reader.config)
        sharers = model_devices if model_devices > 1 else None  # a model that writes needs room for all its weights
        writer = reader.model(checkpoint.as_stored)
        data = with_own_text(data, writer, reader.fingerprint(), sequences, length, devices, sharers)
        with use_mesh(devices, model_devices), quick_compilation():
            console.say_devices("pruning")
            jointly = joint_sequences(reader.config, abouts[0], sequences, length) > 0
            tokens, judged = read_texts(
                data, eval, reader.source, reader.config, sequences, sequence_length, bos, settings.seed, jointly
            )
            all_read = eval or settings.target or settings.allocation == "global"
            if is_leader() and not (reader.at_address or all_read):
                with console.counting() as watch:
                    reader.check_finite(lambda seen, total: watch("weights checked", seen, total))
            barrier()  # the others do not read all weights
            dense = Dense(reader.config, reader.outer(), reader.layer)
            command = Command(reader, dense, tokens, judged, dtype, overwrite, resume)
            with contextlib.ExitStack() as opened:  # before any work, since another run may have begun a later output
                stores = [opened.enter_context(_store_of(*each, command)) for each in zip(wanted, configs, strict=True)]
                runs = [_run_of(*each, command) for each in zip(wanted, abouts, stores, strict=True)]
                steps, windows = runs[0].joint.steps if runs[0].joint else 0, len(judged.tokens) if judged else 0
                progress = PruningProgress(runs[0].pruned.layers, steps, windows, len(wanted), console.err)
                before = _before(reader, judged, progress)
                for number, (one, run, store) in enumerate(zip(wanted, runs, stores, strict=True)):
                    if len(wanted) > 1:
                        console.err.print(f"sparsity {one.settings.sparsity}, {number + 1} of {len(wanted)} ...")
                    progress.begin(number)
                    _make(one, run, store, command, before, progress, before_end)
        for store in stores:
            store.remove()


class PruneRun(NamedTuple):
    """A checkpoint to make: the path or address of its folder, and the settings."""

    output: str
    settings: PruneSettings


class Command(NamedTuple):
    """What the runs of a command share.

    Attributes:
        judged: Tokens on which perplexity is measured, if any.
        dtype: Data type of the weights written; None for the source's.
    """

    reader: "checkpoint.Reader"
    dense: "Dense"
    tokens: "TokenBlocks"
    judged: "TokenBlocks | None"
    dtype: str | None
    overwrite: bool
    resume: bool


def outputs(output: str, sparsities: Sequence[float], settings: PruneSettings) -> list[PruneRun]:
    """Returns the runs that a command requests: one into ``output``, or several into folders in it.

    Raises:
        UserError: a sparsity is out of range, or the output has no name.
    """
    check_name(output)
    chosen = [settings.replace(sparsity=sparsity) for sparsity in sparsities or (None,)]
    if len(chosen) == 1:
        return [PruneRun(output, chosen[0])]
    return [PruneRun(f"{output.rstrip('/')}/sparsity-{each.sparsity}", each) for each in chosen]


def _check_different(wanted: Sequence[PruneRun], configs: "Sequence[DecoderConfig]") -> None:
    """Raises UserError if two sparsities are equal after rounding."""
    for number, config in enumerate(configs):
        if config in configs[:number]:
            twice = wanted[configs.index(config)].settings.sparsity, wanted[number].settings.sparsity
            raise UserError(
                f"--sparsity {twice[0]} and {twice[1]} both leave {config.intermediate} channels in a layer: name one "
                "of the two."
            )


def _check_room(one: PruneRun, reader: "checkpoint.Reader", config: "DecoderConfig") -> None:
    """Raises UserError if a disk has no room for all blocks and for the changed versions that joint steps make."""
    from spap_jax import checkpoint
    from spap_jax.models import cost

    if not is_address(one.output):
        before, after = (cost.parameters(reader.family, each).total for each in (reader.config, config))
        checkpoint.check_room(one.output, 2 * reader.bytes * after // before)


def _reader_of(model: str) -> "checkpoint.Reader":
    """Opens the dense checkpoint; an Orbax folder raises UserError."""
    from spap_jax import checkpoint

    folder = checkpoint.locate(model)
    if checkpoint.is_orbax(folder):
        raise UserError(
            f"{model} is an Orbax folder, and pruning reads Hugging Face folders layer by layer: convert it first with "
            f"spap convert {model} --to huggingface --output DIR."
        )
    return checkpoint.Reader(folder, name=model)


def _before(reader: "checkpoint.Reader", judged: "TokenBlocks | None", progress: "PruningProgress") -> float | None:
    """Measures the dense model's perplexity."""
    from spap_jax.evaluation.perplexity import check_finite
    from spap_jax.parallel.placement import shard_params

    if judged is None:
        return None
    with console.waiting(f"reading all of {reader.source.name}"):
        model = reader.model(shard_params)
    found = perplexity_of(model, judged, "before pruning", progress.measured)
    check_finite(found, reader.source.name)
    return found


def _weight_bytes(reader: "checkpoint.Reader", dtype: str | None) -> float:
    """Bytes of a weight of the output, on average."""
    from spap_jax.checkpoint.tensors import DTYPES
    from spap_jax.models import cost

    return DTYPES[dtype].itemsize if dtype else reader.bytes / cost.parameters(reader.family, reader.config).total


def _run_of(one: PruneRun, about: PruneSettings, store: "FolderStore", command: Command) -> "Run":
    """Resolves a run; what has to be measured for it, the blocks and widths that stay, is decided once and stored."""
    import dataclasses

    from spap_jax.planning.plan import run_that_fits
    from spap_jax.pruning.dial import DECIDED, decide
    from spap_jax.pruning.widths import choose_widths

    def fitting(settings: PruneSettings) -> "Run":
        return run_that_fits(dense.config, command.tokens, settings, dense.outer, command.dtype)

    dense, settings = command.dense, one.settings
    chooses_widths = settings.allocation == "global"
    if store.finished or not (settings.target or chooses_widths):
        return fitting(about)
    decided = store.decided
    if decided is None:
        if settings.target:
            console.err.print(f"looking for the best way to {settings.target} ...")
            about = decide(
                dense, command.tokens, settings, _weight_bytes(command.reader, command.dtype), console.err.print
            )
        decided = {name: getattr(about, name) for name in DECIDED}
        if chooses_widths:
            with console.waiting("choosing a width for each layer"):
                decided["widths"] = choose_widths(fitting(about), dense)
        store.decide(decided)
    run = fitting(settings.replace(**{name: decided[name] for name in DECIDED}))
    if chooses_widths:
        run = dataclasses.replace(run, pruned=run.pruned.with_widths(tuple(decided["widths"])))
    store.config = run.pruned
    return run


def _store_of(one: PruneRun, config: "DecoderConfig", command: Command) -> "FolderStore":
    """Opens the store of a run."""
    from spap_jax.checkpoint.store import FolderStore
    from spap_jax.pruning.identity import prune_identity

    reader = command.reader
    return FolderStore(
        one.output,
        prune_identity(reader.fingerprint(), command.tokens, command.judged, command.dtype, one.settings),
        config,
        reader.source,
        reader.dtypes,
        dtype=command.dtype,
        overwrite=command.overwrite,
        fresh=not command.resume,
    )


def _make(
    one: PruneRun,
    run: "Run",
    store: "FolderStore",
    command: Command,
    before: float | None,
    progress: "PruningProgress",
    before_end: list[Callable[[], str]],
) -> None:
    """Makes a checkpoint, unless an earlier process has."""
    import dataclasses

    from spap_jax import memory
    from spap_jax.backend import peak_of_a_device
    from spap_jax.cli.stopping import telling
    from spap_jax.pruning.prune import prune
    from spap_jax.pruning.prune_report import new_report
    from spap_jax.report.card import pruned_files
    from spap_jax.report.schema import Change, Extras, Perplexities

    if store.finished:
        console.err.print(f"{one.output} was made before the interruption")
        return

    def amount(blocks: int, checks: int) -> str:
        if not checks:
            return f"{blocks} of {run.pruned.layers} layers are done"
        parts = run.joint.checks if run.joint else 0
        return f"all {run.pruned.layers} layers are done, and {checks - 1} of {parts} parts of the joint steps"

    with telling(store, before_end, amount):
        store.outer(command.dense.outer)
        with contextlib.closing(progress):
            reports = prune(run, command.dense, store, progress.report, progress.step)
        after = _after(run, store, command, progress)
        command.reader.check_unchanged()
        measured = None
        if command.judged and before is not None and after is not None:
            measured = Perplexities(command.judged.description, before, after)
        size = Change(command.reader.bytes, store.output_bytes)
        extras = Extras(size, measured, memory.peak(), peak_of_a_device())
        report = new_report(run, command.reader.source.name, command.tokens, reports)
        report = dataclasses.replace(report, extras=extras)
        store.finish(pruned_files(report))
    console.err.print(f"wrote {one.output}")
    _summary(report)


def _after(run: "Run", store: "FolderStore", command: Command, progress: "PruningProgress") -> float | None:
    """Measures the pruned model's perplexity, with the weights as they are written."""
    from spap_jax.models.model import Model
    from spap_jax.parallel.placement import shard_params, stack_layers
    from spap_jax.pruning.layer import in_dtype

    if command.judged is None:
        return None
    layers = stack_layers([store.layer(index) for index in range(run.pruned.layers)])
    params = in_dtype(run, shard_params(run.pruned, command.dense.outer | {"layers": layers}))
    return perplexity_of(
        Model(run.pruned, params, command.reader.source), command.judged, "after pruning", progress.measured
    )


def _summary(report: "PruneReport") -> None:
    from spap_jax.quantities import peak_text

    title = f"{report.model.name}: {report.sparsity.words} removed"
    console.table(title, ("", "before", "after", "change"), report.rows)
    peak = peak_text(report.extras.peak_memory_bytes, report.extras.peak_device_bytes)
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    console.out.print(f"seconds: {phases}; peak memory {peak}")
    for line in report.advice:
        console.out.print(f"advice: {line}")
