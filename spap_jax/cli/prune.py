"""``spap prune``."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spap_jax.cli.prune_many import OTHERS, Sparsities, check_different, runs
from spap_jax.cli.switches import Data, ModelName, Place, Resume
from spap_jax.settings import PruneSettings

if TYPE_CHECKING:
    from spap_jax.checkpoint import Reader
    from spap_jax.cli.prune_run import Given
    from spap_jax.pruning.waves import Choices

_GIGABYTE = 10**9


def prune(
    model: ModelName,
    /,
    *,
    output: Place,
    calibration: Data,
    sparsity: Sparsities = (PruneSettings.sparsity,),
    sequences: int = 128,
    sequence_length: int | None = None,
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
    """Write a smaller checkpoint, with fewer MLP channels (and heads) in every layer.

    Example: spap prune meta-llama/Llama-3.2-1B --calibration c4 --output pruned

    What is done is kept beside the output, in a folder .NAME.resume, until the output is there: after an interruption
    the same command goes on with the block that it was at; on another machine too, if the output is an address. Told to
    end (SIGTERM), it ends at once with the exit code 75. Otherwise 0 is success, and 2 something that one sentence says
    how to mend.

    Args:
        model: Folder or hub id of the checkpoint, or an address such as gs://bucket/model.
        output: Folder to write, complete or absent; or where to send it, gs://bucket/pruned or hf://owner/name.
        calibration: wikitext2, c4, a hub data set, a .txt, .jsonl or .parquet file, or a .npy of token ids; a file's
            path or address.
        sparsity: Fraction of MLP channels to remove from every layer, between 0 and 1. Several with commas between them
            make a checkpoint each, in OUTPUT/sparsity-0.1, OUTPUT/sparsity-0.2 and so on.
        sequences: Calibration sequences.
        sequence_length: Tokens in a sequence; 2048, or what the model's positions allow, where absent.
        eval: Data to measure perplexity on before and after; the same kinds as --calibration.
        overwrite: Replace the output folder if it is a checkpoint.
        resume: Go on where the same command was interrupted; --no-resume discards what it had done and starts over.
        dtype: Data type of the weights written; the source's where absent.
        devices: Over how many devices to spread the work; all where absent, but one of a CPU's.
        model_devices: Among how many of them to divide the weights, for models too large for one; a divisor of their
            number. The sequences are spread over the groups of so many.
        coordinator: Host and port of process 0, for a run of several processes; auto on a TPU pod or under SLURM.
        processes: How many processes there are.
        process_id: Which one this is, from 0; process 0 prints and writes.
        settings: How to prune.
    """
    from spap_jax import checkpoint
    from spap_jax.checkpoint.mirror import is_unfinished
    from spap_jax.cli.console import waiting
    from spap_jax.cli.downloads import fetch_data, fetch_models
    from spap_jax.cli.processes import wait_for_others
    from spap_jax.cli.prune_run import follow, lead
    from spap_jax.cli.stopping import stopping
    from spap_jax.devices import leads, sharing
    from spap_jax.pruning.achieved import warn_of_sparsity
    from spap_jax.pruning.allocation import check_allocation
    from spap_jax.pruning.ignored import warn_of_ignored
    from spap_jax.pruning.pipeline import pruned_config
    from spap_jax.pruning.waves import Choices

    wanted = runs(output, sparsity, settings)
    for run in wanted:
        if not (resume and is_unfinished(run.output)):  # else its output may be there, and be this command's
            checkpoint.check_output(run.output, overwrite)
    wait_for_others(coordinator, processes, process_id)
    with stopping() as before_end:
        fetch_models(model)
        fetch_data(calibration, eval)
        with waiting(f"reading {model}"):
            reader = checkpoint.Reader(_hugging_face_folder(model), name=model)
        narrows = []
        for run in wanted:
            check_allocation(reader.config, run.settings, model_devices)
            narrows.append(pruned_config(reader.config, run.settings))
            checkpoint.check_describable(reader.source, narrows[-1])
        check_different(wanted, narrows)
        warn_of_ignored(settings)
        for run, narrow in zip(wanted, narrows, strict=True):
            warn_of_sparsity(reader.config, narrow, run.settings)
        choices = Choices(narrow.intermediate for narrow in narrows)
        given = _given(reader, calibration, sequences, sequence_length, eval, settings, dtype, overwrite, choices)
        with sharing(devices, model_devices):
            if not leads():
                for run in wanted:
                    follow(run, given)
                return
            done = [lead(run, given, fresh=not resume, before_end=before_end) for run in wanted]
        for unfinished in done:
            unfinished.remove()


def _given(
    reader: "Reader",
    calibration: str,
    sequences: int,
    sequence_length: int | None,
    eval: str | None,
    settings: PruneSettings,
    dtype: str | None,
    overwrite: bool,
    choices: "Choices",
) -> "Given":
    """What all the runs of a command have in common."""
    from spap_jax.cli.console import request_progress, waiting
    from spap_jax.cli.evaluate import chosen_length
    from spap_jax.cli.prune_run import Given, perplexity_of
    from spap_jax.data import load_tokens
    from spap_jax.devices import leads
    from spap_jax.pruning.sampling import with_samples
    from spap_jax.repetition import warn_of_overlap, warn_of_repetition

    common: dict[str, Any] = {
        "tokenizer": reader.source.folder,
        "sequence_length": chosen_length(sequence_length, reader.config),
        "vocabulary": reader.config.vocabulary,
    }
    with waiting(f"tokenising {calibration}"):
        blocks = load_tokens(calibration, sequences=sequences, seed=settings.seed, role="calibration", **common)
        judged = load_tokens(eval, sequences=None, role="evaluation", **common) if eval else None
    warn_of_repetition(blocks.tokens, calibration)
    warn_of_overlap(blocks.tokens, judged and judged.tokens)
    with request_progress() as watch:
        if leads() and not _read_whole(settings, eval):
            reader.check_finite(functools.partial(_gigabytes, watch))
        blocks = with_samples(blocks, reader.model, settings, functools.partial(watch, "sequences written"))
    before = functools.cache(lambda: perplexity_of(reader.model(), judged, "before pruning") if judged else None)
    return Given(reader, blocks, judged, before, dtype, overwrite, choices)


def _read_whole(settings: PruneSettings, eval: str | None) -> bool:
    """Whether all weights are read, and so looked at, before the first layer is pruned."""
    return bool(eval or settings.decided.sampled or settings.allocation == "global")


def _gigabytes(watch: Callable[[str, int, int], None], seen: int, total: int) -> None:
    """Shows how much was looked at, unless that takes but a moment."""
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
