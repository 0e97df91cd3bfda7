"""``spap prune``."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from spap_jax.cli.prune_many import OTHERS, PruneRun, SparsityOption, check_different, runs
from spap_jax.cli.switches import Bos, Data, ModelName, OutputPath, Resume
from spap_jax.cli.texts import Texts, chosen_length
from spap_jax.settings import PruneSettings

if TYPE_CHECKING:
    from spap_jax.checkpoint import Reader
    from spap_jax.cli.prune_run import Command
    from spap_jax.model import Model
    from spap_jax.models import DecoderConfig

_GIGABYTE = 10**9


def prune(
    model: ModelName,
    /,
    *,
    data: Annotated[Data, Parameter(alias="--calibration")],  # its earlier name
    output: OutputPath,
    sparsity: SparsityOption = (PruneSettings.sparsity,),
    sequences: int = 128,
    sequence_length: int | None = None,
    bos: Bos = None,
    eval: Data | None = None,
    overwrite: bool = False,
    resume: Resume = True,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    devices: int | None = None,
    model_devices: int = 1,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    settings: Annotated[PruneSettings, OTHERS] = PruneSettings(),  # noqa: B008 (frozen)
) -> None:
    """Write a smaller checkpoint, with fewer MLP channels (and attention heads, if asked for) in every layer.

    ```
    spap prune meta-llama/Llama-3.2-1B --data c4 --output pruned
    spap prune ./model --data text.jsonl --sparsity 0.2 --effort high --output out
    ```

    An interrupted run picks up where it stopped when the same command is given again: until the output is complete, the
    finished blocks are kept beside it, in a folder .NAME.resume. If the output is an address, the run can continue on
    another machine. After SIGTERM the run ends at once with exit code 75. Exit code 0 is success, and 2 is an error
    that one sentence explains.

    Args:
        model: Checkpoint to prune: a folder, a hub id, or an address such as gs://bucket/model.
        data: Calibration text, which shows what each channel contributes: wikitext2, c4, a data set of the hub, or the
            path or address of a .txt, .jsonl or .parquet file, or of a .npy file of token ids. Conversations, in a
            column "messages", go through the model's chat template, and joint steps count what the assistant wrote.
            Several sets are mixed by weight: a.jsonl:0.7,b.txt:0.3.
        output: Folder to write, or an address to send it to: gs://bucket/pruned or hf://owner/name. It is either
            complete or absent.
        sparsity: Fraction of the MLP channels to remove from every layer, between 0 and 1. Several fractions, separated
            by commas, make one checkpoint each: OUTPUT/sparsity-0.1, OUTPUT/sparsity-0.2 and so on.
        eval: Text on which to measure perplexity before and after pruning; the same kinds as --data.
        sequences: Number of sequences drawn from the data; if it is long, from its first part, eight times as many.
        sequence_length: Tokens in each sequence. By default as many as the model's positions allow, at most 2048.
        bos: Begin each sequence with the tokenizer's beginning-of-text token. By default only for Gemma, which needs
            it.
        overwrite: Replace the output, if it holds only files that spap wrote and that have not been changed since.
        resume: Go on with an interrupted run of the same command. --no-resume discards what it has done and starts
            over.
        dtype: Data type of the weights that are written. By default that of the source.
        devices: Number of devices to use. By default all, but only one of a CPU's.
        model_devices: Number of devices among which the weights are divided, for models that are too large for one. It
            must divide the number of devices; each group of this size works on its own share of the sequences.
        coordinator: HOST:PORT of process 0, for a run of several processes; "auto" on a TPU pod or under SLURM.
        processes: Number of processes of the run.
        process_id: Number of this process, from 0. Process 0 prints and writes.
        settings: How to prune.
    """
    from spap_jax import checkpoint
    from spap_jax.checkpoint.mirror import is_unfinished
    from spap_jax.cli.console import waiting
    from spap_jax.cli.downloads import fetch_data, fetch_models
    from spap_jax.cli.inputs import inputs
    from spap_jax.cli.processes import wait_for_others
    from spap_jax.cli.prune_run import make_checkpoints
    from spap_jax.cli.stopping import stopping
    from spap_jax.devices import use_mesh

    wanted = runs(output, sparsity, settings)
    for run in wanted:
        begun = functools.partial(is_unfinished, run.output) if resume else None
        checkpoint.check_output(run.output, overwrite, inputs=inputs(model, None, data, eval), begun=begun)
    wait_for_others(coordinator, processes, process_id)
    with stopping() as before_end:
        fetch_data(data, eval)
        fetch_models(model)
        with waiting(f"reading {model}"):
            reader = checkpoint.Reader(_hugging_face_folder(model), name=model)
        narrows = _narrow_configs(reader, wanted, model_devices)
        with use_mesh(devices, model_devices):
            texts = Texts(data, eval, sequences, sequence_length, bos)
            wanted = _fitted_to_memory(reader, wanted, texts)
            command = _opened(reader, texts, wanted, narrows, dtype, overwrite)
            done = make_checkpoints(wanted, narrows, command, fresh=not resume, before_end=before_end)
        for unfinished in done:
            unfinished.remove()


def _narrow_configs(reader: "Reader", wanted: list[PruneRun], model_devices: int) -> "list[DecoderConfig]":
    """Returns the pruned config of each run; refuses what could not be pruned or written, before any work."""
    from spap_jax import checkpoint
    from spap_jax.pruning.ignored import warn_of_ignored
    from spap_jax.pruning.layer_widths import check_allocation
    from spap_jax.pruning.narrow import pruned_config, warn_of_sparsity

    narrows = [pruned_config(reader.config, run.settings) for run in wanted]
    for run, narrow in zip(wanted, narrows, strict=True):
        check_allocation(reader.config, narrow, run.settings, model_devices)
        checkpoint.check_describable(reader.source, narrow)
    check_different(wanted, narrows)
    warn_of_ignored(wanted[0].settings)
    for run, narrow in zip(wanted, narrows, strict=True):
        warn_of_sparsity(reader.config, narrow, run.settings)
    return narrows


def _fitted_to_memory(reader: "Reader", wanted: list[PruneRun], texts: Texts) -> list[PruneRun]:
    """Settles what runs leave to the memory of the devices, before any weight is read, and warns of too little.

    Runs differ only in what they remove, and the one that removes least takes most memory.
    """
    from spap_jax import checkpoint
    from spap_jax.cli import console
    from spap_jax.planning.plan import Request
    from spap_jax.planning.preflight import settings_here

    assert reader.source.folder  # from which it reads
    config, weight_bytes = checkpoint.read_config(reader.source.folder / "config.json", reader.source.name)
    length = chosen_length(texts.sequence_length, config)
    if min(texts.sequences, length) < 1:  # which is refused when the text is read
        return wanted
    largest = min((run.settings for run in wanted), key=lambda settings: settings.sparsity)
    blocks = settings_here(Request(config, largest, texts.sequences, length, weight_bytes)).joint_blocks
    if blocks and blocks != largest.joint_blocks:
        console.err.print(f"joint steps will adjust {blocks} blocks at a time, as many as fit in memory")
    return [run._replace(settings=run.settings.replace(joint_blocks=blocks)) for run in wanted]


def _opened(
    reader: "Reader",
    texts: Texts,
    wanted: list[PruneRun],
    narrows: "list[DecoderConfig]",
    dtype: str | None,
    overwrite: bool,
) -> "Command":
    """Reads what all runs of a command share."""
    from spap_jax.cli.console import counting, waiting
    from spap_jax.cli.prune_run import Command, perplexity_of
    from spap_jax.devices import leads, meet
    from spap_jax.placement import shard_params
    from spap_jax.pruning.progress import Progress
    from spap_jax.pruning.sampling import with_samples
    from spap_jax.pruning.waves import Choices

    settings = wanted[0].settings  # the same for all runs, except for the sparsity
    blocks, judged = texts.read(reader.source, reader.config, seed=settings.seed, further=bool(settings.passes))

    def whole_model() -> "Model":
        with waiting(f"reading all of {reader.source.name}"):
            return reader.model(shard_params)

    with counting() as watch:
        if leads() and not (reader.at_address or _read_whole(settings, texts.eval)):
            reader.check_finite(functools.partial(_gigabytes, watch))
        meet()  # the others do not read all weights
        blocks = with_samples(blocks, whole_model, settings, functools.partial(watch, "sequences written"))
    windows = len(judged.tokens) if judged else 0
    progress = Progress(reader.config, [run.settings for run in wanted], blocks.tokens.shape, windows)

    @functools.cache
    def before() -> float | None:
        return perplexity_of(whole_model(), judged, "before pruning", progress) if judged else None

    choices = Choices(narrow.intermediate for narrow in narrows)
    return Command(reader, blocks, judged, before, dtype, overwrite, choices, progress)


def _read_whole(settings: PruneSettings, eval: str | None) -> bool:
    """Whether all weights are read, and so checked, before the first layer is pruned."""
    return bool(eval or settings.sampled or settings.allocation == "global")


def _gigabytes(watch: Callable[[str, int, int], None], seen: int, total: int) -> None:
    """Shows how much was checked, unless the check takes only a moment."""
    if total >= _GIGABYTE:
        watch("GB of weights checked", seen // _GIGABYTE, total // _GIGABYTE)


def _hugging_face_folder(model: str) -> Path:
    from spap_jax import checkpoint
    from spap_jax.errors import UserError

    folder = checkpoint.locate(model)
    if checkpoint.is_orbax(folder):
        raise UserError(
            f"{model} is an Orbax folder, and pruning reads Hugging Face folders layer by layer: convert it first with "
            f"spap convert {model} --to huggingface --output DIR."
        )
    return folder
