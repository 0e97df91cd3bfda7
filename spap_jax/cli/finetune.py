"""``spap finetune``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from spap_jax.cli.switches import Resume
from spap_jax.settings import FinetuneSettings

if TYPE_CHECKING:
    from spap_jax.data import TokenBlocks
    from spap_jax.model import Model
    from spap_jax.training.report import FinetuneReport
    from spap_jax.training.train import Stage

_REPORT = "spap_report.json"
"""Of the pruning, which goes along."""


def finetune(
    model: str,
    /,
    *,
    data: str,
    output: Path,
    teacher: str | None = None,
    sequences: int = 512,
    sequence_length: int | None = None,
    eval: str | None = None,
    overwrite: bool = False,
    resume: Resume = True,
    devices: int | None = None,
    settings: Annotated[
        FinetuneSettings, Parameter(name="*", group=Group("Training", sort_key=1))
    ] = FinetuneSettings(),  # noqa: B008 (frozen)
) -> None:
    """Train a pruned checkpoint for a while, to win back more of what it lost.

    Low-rank updates (LoRA) of attention and MLP are trained and merged into the weights, or all weights are with
    --full. The loss is that of the next token; with --teacher it is the divergence from the dense model's predictions.

    Example: spap finetune pruned --teacher meta-llama/Llama-3.2-1B --data c4 --output trained

    Where training stands is kept beside the output, in a folder .NAME.resume, every --check-every steps: after an
    interruption the same command goes on from there. Told to end (SIGTERM), it ends at once with the exit code 75.

    Args:
        model: Folder or hub id of the checkpoint.
        data: Text to train on: wikitext2, c4, a hub data set, a .txt, .jsonl or .parquet file, or a .npy of token ids.
        output: Folder to write; complete or absent.
        teacher: Folder or hub id of the dense checkpoint.
        sequences: Sequences drawn from the text; a part of them only judges.
        sequence_length: Tokens in a sequence; 2048, or what the model's positions allow, where absent.
        eval: Data to measure perplexity on before and after; the same kinds as --data.
        overwrite: Replace the output folder if it is a checkpoint.
        resume: Go on where the same command was interrupted; --no-resume discards what it had done and starts over.
        devices: Over how many devices to spread the sequences; all where absent, but one of a CPU's.
        settings: How to train.
    """
    from spap_jax import checkpoint, memory
    from spap_jax.checkpoint.resume import Unfinished
    from spap_jax.cli.console import err, training_progress, waiting
    from spap_jax.cli.stopping import stopping
    from spap_jax.cli.unfinished import telling
    from spap_jax.devices import sharing
    from spap_jax.errors import UserError
    from spap_jax.training.card import trained_card
    from spap_jax.training.resume import begun, identity, keep
    from spap_jax.training.run import run
    from spap_jax.training.train import check

    checkpoint.check_output(output, overwrite)
    with waiting(f"reading {model}"):
        start = checkpoint.load(model)
        dense = checkpoint.load(teacher) if teacher else None
    blocks, judged = _texts(start, data, eval, sequences, sequence_length, settings.seed)
    before = _perplexity(start, judged, "before training")
    check(start, blocks.tokens, dense, settings)
    with sharing(devices), stopping() as before_end:
        kept = Unfinished(output, identity(start, dense, blocks, settings), blocks=1, fresh=not resume)
        with kept, telling(kept, before_end), training_progress(settings.steps) as progress:

            def watch(stage: "Stage") -> None:
                keep(kept, stage)
                progress(stage.checks[-1])

            try:
                trained, report = run(start, blocks, dense, settings, watch, begun(kept))
            except UserError:  # other settings are needed, with which there is nothing to go on from
                kept.forget()
                raise
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

    common: dict[str, Any] = {
        "tokenizer": model.source.folder,
        "sequence_length": chosen_length(sequence_length, model.config),
        "vocabulary": model.config.vocabulary,
    }
    with waiting(f"tokenising {data}"):
        blocks = load_tokens(data, sequences=sequences, seed=seed, role="calibration", **common)
        judged = load_tokens(eval, sequences=None, role="evaluation", **common) if eval else None
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
