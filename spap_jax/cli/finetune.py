"""``spap finetune``."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from spap_jax.cli.switches import Data, ModelName, Place, Resume
from spap_jax.settings import FinetuneSettings

if TYPE_CHECKING:
    from spap_jax.data import TokenBlocks
    from spap_jax.model import Model
    from spap_jax.training.report import FinetuneReport
    from spap_jax.training.train import Stage

_REPORT = "spap_report.json"
"""Of the pruning, which goes along."""


def finetune(
    model: ModelName,
    /,
    *,
    data: Data,
    output: Place,
    teacher: ModelName | None = None,
    sequences: int = 512,
    sequence_length: int | None = None,
    eval: Data | None = None,
    overwrite: bool = False,
    resume: Resume = True,
    devices: int | None = None,
    model_devices: int = 1,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    settings: Annotated[
        FinetuneSettings, Parameter(name="*", group=Group("Training", sort_key=1))
    ] = FinetuneSettings(),  # noqa: B008 (frozen)
) -> None:
    """Train a pruned checkpoint for a while, to win back more of what it lost.

    Low-rank updates (LoRA) of attention and MLP are trained and merged into the weights, or all weights are with
    --full. The loss is that of the next token; with --teacher it is the divergence from the dense model's predictions.

    Example: spap finetune pruned --teacher DENSE --data c4 --output trained

    Where training stands is kept beside the output, in a folder .NAME.resume, every --check-every steps: after an
    interruption the same command goes on from there; on another machine too, if the output is an address. Told to end
    (SIGTERM), it ends at once with the exit code 75.

    Args:
        model: Folder or hub id of the checkpoint, or an address such as gs://bucket/pruned.
        data: Text to train on: wikitext2, c4, a hub data set, a .txt, .jsonl or .parquet file, or a .npy of token ids;
            a file's path or address.
        output: Folder to write, complete or absent; or where to send it, gs://bucket/trained or hf://owner/name.
        teacher: Folder, hub id or address of the dense checkpoint.
        sequences: Sequences drawn from the text; a part of them only judges.
        sequence_length: Tokens in a sequence; 2048, or what the model's positions allow, where absent.
        eval: Data to measure perplexity on before and after; the same kinds as --data.
        overwrite: Replace the output folder if it is a checkpoint.
        resume: Go on where the same command was interrupted; --no-resume discards what it had done and starts over.
        devices: Over how many devices to spread the work; all where absent, but one of a CPU's.
        model_devices: Among how many of them to divide the weights, for models too large for one; a divisor of their
            number. The sequences are spread over the groups of so many.
        coordinator: Host and port of process 0, for a run of several processes; auto on a TPU pod or under SLURM.
        processes: How many processes there are.
        process_id: Which one this is, from 0; process 0 prints and writes.
        settings: How to train.
    """
    import jax

    from spap_jax import checkpoint, memory
    from spap_jax.checkpoint.mirror import unfinished
    from spap_jax.cli.console import err, training_progress, waiting
    from spap_jax.cli.downloads import fetch_data, fetch_models
    from spap_jax.cli.processes import wait_for_others
    from spap_jax.cli.stopping import stopping
    from spap_jax.cli.unfinished import telling
    from spap_jax.devices import leads, sharing
    from spap_jax.errors import UserError
    from spap_jax.placement import placed
    from spap_jax.training.card import trained_card
    from spap_jax.training.resume import begun, identity, keep
    from spap_jax.training.run import run
    from spap_jax.training.train import check

    checkpoint.check_output(output, overwrite)
    wait_for_others(coordinator, processes, process_id)
    fetch_models(model, teacher)
    fetch_data(data, eval)
    if model_devices > 1 and jax.process_count() > 1:
        raise UserError(
            "spap finetune divides weights among the devices of one process, and this run has several: leave out "
            "--model-devices."
        )
    with waiting(f"reading {model}"), sharing(devices, model_devices):
        place = placed if model_devices > 1 else checkpoint.local
        start = checkpoint.load(model, place)
        dense = checkpoint.load(teacher, place) if teacher else None
    blocks, judged = _texts(start, data, eval, sequences, sequence_length, settings.seed)
    check(start, blocks.tokens, dense, settings)
    before = _perplexity(start, judged, "before training") if leads() else None
    with sharing(devices, model_devices), stopping() as before_end:
        if not leads():  # the same computations on its own sequences, and no result
            run(start, blocks, dense, settings, lambda _: None, begun(None))
            return
        kept = unfinished(output, identity(start, dense, blocks, settings), blocks=1, fresh=not resume)

        def reached(looks: int) -> str:  # what is kept at each of them; the first is before any step
            return f"step {min((looks - 1) * settings.check_every, settings.steps)} of {settings.steps} is kept"

        with kept, telling(kept, before_end, reached), training_progress(settings.steps) as progress:

            def watch(stage: "Stage") -> None:
                keep(kept, stage)
                progress(stage.checks[-1])

            trained, report = run(start, blocks, dense, settings, watch, begun(kept))
    extras: dict[str, Any] = {}
    if judged is not None:
        after = _perplexity(trained, judged, "after training")
        extras["perplexity"] = {"data": judged.description, "before": before, "after": after}
    report = replace(report, extras=extras | {"peak_memory_bytes": memory.peak()})
    folder = start.source.folder
    files = {"spap_finetune.json": report.to_json(), "README.md": trained_card(report, folder)}
    if folder and (folder / _REPORT).is_file():
        files[_REPORT] = (folder / _REPORT).read_text(encoding="utf-8")
    checkpoint.save(trained, output, overwrite=overwrite, files=files)
    kept.remove()
    _summary(report)
    err.print(f"wrote {output}")


def _texts(
    model: "Model", data: str, eval: str | None, sequences: int, sequence_length: int | None, seed: int
) -> tuple["TokenBlocks", "TokenBlocks | None"]:
    """Token blocks to train on, and to measure perplexity on."""
    from spap_jax.cli.console import waiting
    from spap_jax.cli.evaluate import chosen_length
    from spap_jax.data import load_tokens
    from spap_jax.repetition import warn_of_overlap, warn_of_repetition

    common: dict[str, Any] = {
        "tokenizer": model.source.folder,
        "sequence_length": chosen_length(sequence_length, model.config),
        "vocabulary": model.config.vocabulary,
    }
    with waiting(f"tokenising {data}"):
        blocks = load_tokens(data, sequences=sequences, seed=seed, role="calibration", **common)
        judged = load_tokens(eval, sequences=None, role="evaluation", **common) if eval else None
    warn_of_repetition(blocks.tokens, data)
    warn_of_overlap(blocks.tokens, judged and judged.tokens)
    return blocks, judged


def _perplexity(model: "Model", judged: "TokenBlocks | None", when: str) -> float | None:
    from spap_jax.cli.console import waiting
    from spap_jax.evaluation.perplexity import perplexity

    if judged is None:
        return None
    with waiting(f"measuring perplexity {when}"):
        return perplexity(model, judged.tokens)


def _summary(report: "FinetuneReport") -> None:
    from spap_jax.cli import console

    rows = [(f"held-out loss ({report.objective})", report.held_out["before"], report.held_out["after"])]
    if measured := report.extras.get("perplexity"):
        rows.append(("perplexity", measured["before"], measured["after"]))
    kind = "all weights" if report.settings["full"] else f"LoRA of rank {report.settings['lora_rank']}"
    trained = console.count_text(report.trained_parameters)
    console.table(
        f"{report.model}: {report.settings['steps']} steps, {kind} ({trained} numbers)",
        ("", "before", "after", "change"),
        [(name, f"{old:.4f}", f"{new:.4f}", console.change_text(old, new)) for name, old, new in rows],
    )
    kept = f"the weights of step {report.kept.step} are kept"
    if report.kept.step == 0:
        kept = "no step was better on the held-out sequences: the weights are as they were"
    memory = console.bytes_text(report.extras["peak_memory_bytes"])
    console.out.print(f"{kept}; {report.seconds:.1f} seconds; peak memory {memory}", soft_wrap=True)
