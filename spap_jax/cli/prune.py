"""``spap prune``."""

import functools
from typing import Annotated, Literal

from spap_jax.cli import console
from spap_jax.cli.options import Bos, Data, ModelName, OutputPath, Resume
from spap_jax.cli.prune_many import OTHERS, SparsityOption, runs
from spap_jax.cli.texts import Texts
from spap_jax.settings import PruneSettings


def prune(
    model: ModelName,
    /,
    *,
    data: Data,
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
    finished blocks are kept beside it, in a folder .NAME.resume. If the output is in a bucket (gs://, s3://), the run
    can continue on another machine. After SIGTERM the run ends at once with exit code 75. Exit code 0 is success, 2 an
    error that one sentence explains, 1 a fault of spap, and 130 Ctrl-C.

    Args:
        model: Checkpoint to prune: a folder, a hub id, or an address such as gs://bucket/model. It must not be an Orbax
            folder, of which spap convert makes a checkpoint.
        data: Calibration text, which shows what each channel contributes: wikitext2, c4, a data set of the hub, or the
            path or address of a .txt, .jsonl or .parquet file, or of a .npy file of token ids. Conversations, in a
            column "messages", go through the model's chat template, and joint steps count what the assistant wrote.
            Several sets are mixed by weight: a.jsonl:0.7,b.txt:0.3.
        output: Folder to write, or an address to send it to, such as gs://bucket/pruned. It is either complete or
            absent.
        sparsity: Fraction of the MLP channels to remove from every layer, between 0 and 1. Several fractions, separated
            by commas, make one checkpoint each: OUTPUT/sparsity-0.1, OUTPUT/sparsity-0.2 and so on.
        eval: Text on which to measure perplexity before and after pruning; the same kinds as --data.
        sequences: Number of sequences, drawn at random. Of long data only the beginning is read, which is enough for
            eight times as many.
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
    from spap_jax.backend import quick_compilation
    from spap_jax.checkpoint.unfinished import is_unfinished
    from spap_jax.cli.downloads import fetch_data, fetch_models
    from spap_jax.cli.inputs import inputs
    from spap_jax.cli.options import wait_for_others
    from spap_jax.cli.prune_run import fitted_to_memory, make_checkpoints, narrow_configs, opened, reader_of
    from spap_jax.cli.stopping import stopping
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.parallel.processes import meet

    wanted = runs(output, sparsity, settings)
    for run in wanted:
        begun = functools.partial(is_unfinished, run.output) if resume else None
        checkpoint.check_output(run.output, overwrite, inputs=inputs(model, None, data, eval), begun=begun)
    with stopping() as before_end:
        wait_for_others(coordinator, processes, process_id)
        fetch_data(data, eval)
        fetch_models(model)
        checkpoint.fetch_side_files(model)
        with console.waiting(f"reading {model}"):
            reader = reader_of(model)
        meet()  # one process may have had to download it
        narrows = narrow_configs(reader, wanted, model_devices)
        with use_mesh(devices, model_devices), quick_compilation():
            console.say_devices("pruning")
            texts = Texts(data, eval, sequences, sequence_length, bos)
            wanted = fitted_to_memory(reader, wanted, texts, fresh=not resume)
            command = opened(reader, texts, wanted, narrows, dtype, overwrite)
            done = make_checkpoints(wanted, narrows, command, fresh=not resume, before_end=before_end)
        for unfinished in done:
            unfinished.remove()
