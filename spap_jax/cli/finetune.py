"""``spap finetune``."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from spap_jax import progress
from spap_jax.cli import console
from spap_jax.cli.options import Bos, Count, Data, Devices, ModelName, OutputPath, Overwrite, Process, Resume
from spap_jax.cli.texts import perplexity_of, read_texts
from spap_jax.quantities import count_text, peak_text
from spap_jax.settings import FinetuneSettings

if TYPE_CHECKING:
    from spap_jax.models.model import Model
    from spap_jax.report.schema import FinetuneReport
    from spap_jax.training.loop import Stage


def finetune(
    model: ModelName,
    /,
    *,
    data: Data,
    output: OutputPath,
    teacher: ModelName | None = None,
    sequences: Count = 512,
    sequence_length: Count | None = None,
    bos: Bos = None,
    eval: Data | None = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    devices: Devices = None,
    model_devices: int = 1,
    process: Process = None,
    settings: Annotated[FinetuneSettings, Parameter(name="*")] = FinetuneSettings(),  # noqa: B008 (frozen)
) -> None:
    """Train a pruned checkpoint, to recover more of the quality that it lost.

    ```
    spap finetune pruned --teacher DENSE --data c4 --output trained
    spap finetune pruned --data text.jsonl --full --steps 1000 --output trained
    ```

    Low-rank updates (LoRA) of the attention and MLP projections are trained and merged into the weights, or all weights
    with --full. The loss is that of the next token, or with --teacher the divergence from the dense model's
    predictions.

    The same command continues an interrupted run, from a folder .NAME.resume beside the output. After SIGTERM the run
    ends with exit code 75.

    Args:
        model: Checkpoint to train: a folder, a hub id, or an address such as gs://bucket/pruned.
        data: Text or chats to train on: wikitext2, c4, a data set of the hub, or a .txt, .jsonl, .parquet or .npy file.
            Mix several by weight: a.jsonl:0.7,b.txt:0.3.
        output: Folder to write, or an address to send it to, such as gs://bucket/trained. It is complete or absent.
        teacher: Dense checkpoint whose predictions the model learns. By default it learns to predict the text.
        eval: Text on which to measure perplexity before and after training; the same kinds as --data.
        sequences: Number of sequences, those that are held out included, drawn at random.
        sequence_length: Tokens in each sequence. By default as many as the model's positions allow, at most 2048.
        model_devices: Number of devices among which the weights are divided. Each such group works on its own
            sequences.
        settings: How to train.
    """
    from spap_jax import checkpoint, memory
    from spap_jax.backend import peak_of_a_device
    from spap_jax.checkpoint.inventory import array_dtypes
    from spap_jax.checkpoint.side_files import accounts
    from spap_jax.checkpoint.store import FolderStore
    from spap_jax.checkpoint.writer import put_model
    from spap_jax.cli.inputs import fetch, inputs
    from spap_jax.cli.options import wait_for_others
    from spap_jax.cli.stopping import stopping, telling
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.parallel.placement import bytes_of, fully_shard_params
    from spap_jax.parallel.processes import barrier, is_leader
    from spap_jax.report.card import trained_files
    from spap_jax.report.schema import Check, Extras, Perplexities, converted
    from spap_jax.training.finetune import check, identity, run

    checkpoint.check_output(output, overwrite, inputs=inputs(model, teacher, data, eval), resume=resume)
    with stopping() as before_end:
        wait_for_others(process)
        fetch([model, teacher], [data, eval])
        checkpoint.fetch_side_files(model)
        with console.waiting(f"reading {model}"), use_mesh(devices, model_devices):
            start = checkpoint.load(model, fully_shard_params)
            dense = checkpoint.load(teacher, fully_shard_params) if teacher else None
        barrier()  # one process may have had to download them
        how = sequences, sequence_length, bos, settings.seed, False
        blocks, judged = read_texts(data, eval, start.source, start.config, *how)
        check(start, blocks.tokens, dense, settings)
        with use_mesh(devices, model_devices):
            depends_on = identity(start, dense, blocks, settings)
        dtypes = array_dtypes(start.params, start.config)
        opened = FolderStore(
            output, depends_on, start.config, start.source, dtypes, overwrite=overwrite, fresh=not resume
        )
        shared = None if model_devices == 1 else model_devices  # training gathers a block at a time, a judge has all

        def measured_on(model: "Model", when: str) -> float | None:
            with use_mesh(devices, shared, bytes_of(start.params)):
                return perplexity_of(model, judged, when) if judged else None

        def reached(_: int, checks: int) -> str:  # the first check is before any step
            return f"step {min(max(0, checks - 1) * settings.check_every, settings.steps)} of {settings.steps} is done"

        def restore(like: Any) -> "tuple[Any, tuple[Check, ...]] | None":
            found = store.restore_state(like)
            return found and (found[0], tuple(converted(each, Check) for each in found[1]))

        def watch(stage: "Stage") -> None:
            store.save_state((stage.state, stage.best), [asdict(each) for each in stage.checks])
            show(stage.checks[-1])

        with opened as store, telling(store, before_end, reached):
            if store.finished:
                console.err.print(f"{output} was made before the interruption")
                store.remove()
                return
            before = measured_on(start, "before training")
            with use_mesh(devices, model_devices), progress.training(settings.steps, console=console.err) as show:
                console.say_devices("training")
                trained, report = run(start, blocks, dense, settings, watch, restore)
            after = measured_on(trained, "after training")
            measured = Perplexities(judged.description, before, after) if judged and before and after else None
            report = replace(report, extras=Extras(None, measured, memory.peak(), peak_of_a_device()))
            put_model(store, trained)
            store.finish(trained_files(report, accounts(start.source)))
            store.remove()
    if is_leader():
        _summary(report)
        console.err.print(f"wrote {output}")


def _summary(report: "FinetuneReport") -> None:
    kind = "all weights" if report.settings["full"] else f"LoRA of rank {report.settings['lora_rank']}"
    trained = count_text(report.trained_parameters)
    console.table(
        f"{report.model}: {report.steps} steps, {kind} ({trained} numbers)",
        ("", "before", "after", "change"),
        report.rows,
    )
    kept = f"the weights of step {report.kept.step} are kept"
    if report.kept.step == 0:
        kept = "no step was better on the held-out sequences: the weights are as they were"
    memory = peak_text(report.extras.peak_memory_bytes, report.extras.peak_device_bytes)
    console.out.print(f"{kept}; {report.seconds:.1f} seconds; peak memory {memory}")
