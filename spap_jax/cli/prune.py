"""``spap prune``."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spap_jax.cli.prune_many import OTHERS, Sparsities, runs
from spap_jax.settings import PruneSettings

if TYPE_CHECKING:
    from spap_jax.checkpoint import Reader
    from spap_jax.data import TokenBlocks
    from spap_jax.model import Model
    from spap_jax.pruning.report import LayerReport, PruneReport, SweepReport


def prune(
    model: str,
    /,
    *,
    output: Path,
    calibration: str,
    sparsity: Sparsities = (PruneSettings.sparsity,),
    sequences: int = 128,
    sequence_length: int | None = None,
    eval: str | None = None,
    overwrite: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    devices: int | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    settings: Annotated[PruneSettings, OTHERS] = PruneSettings(),  # noqa: B008 (frozen)
) -> None:
    """Write a smaller checkpoint, with fewer MLP channels (and heads) in every layer.

    Example: spap prune meta-llama/Llama-3.2-1B --sparsity 0.3 --calibration c4 --output pruned

    Args:
        model: Folder or hub id of the checkpoint.
        output: Folder to write; complete or absent.
        calibration: wikitext2, c4, a hub data set, a .txt, .jsonl or .parquet file, or a .npy of token ids.
        sparsity: Fraction of MLP channels to remove from every layer, between 0 and 1. Several with commas between them
            make a checkpoint each, in OUTPUT/sparsity-0.1, OUTPUT/sparsity-0.2 and so on.
        sequences: Calibration sequences.
        sequence_length: Tokens in a sequence; 2048, or what the model's positions allow, where absent.
        eval: Data to measure perplexity on before and after; the same kinds as --calibration.
        overwrite: Replace the output folder if it is a checkpoint.
        dtype: Data type of the weights written; the source's where absent.
        devices: Over how many devices to spread the sequences; all where absent, but one of a CPU's.
        coordinator: Host and port of process 0, for a run of several processes; auto on a TPU pod or under SLURM.
        processes: How many processes there are.
        process_id: Which one this is, from 0; process 0 prints and writes.
        settings: How to prune.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.console import err, out, waiting
    from spap_jax.cli.evaluate import chosen_length
    from spap_jax.data import load_tokens
    from spap_jax.devices import join, leads, sharing
    from spap_jax.pruning.pipeline import pruned_config

    wanted = runs(output, sparsity, settings)
    for run in wanted:
        checkpoint.check_output(run.output, overwrite)
    join(coordinator, processes, process_id)
    out.quiet = err.quiet = not leads()
    with waiting(f"reading {model}"):
        reader = checkpoint.Reader(_hugging_face_folder(model), name=model)
    config = reader.config
    for run in wanted:
        checkpoint.check_describable(reader.source, pruned_config(config, run.settings))
    length = chosen_length(sequence_length, config)
    common: dict[str, Any] = {
        "tokenizer": reader.source.folder,
        "sequence_length": length,
        "vocabulary": config.vocabulary,
    }
    with waiting(f"tokenising {calibration}"):
        blocks = load_tokens(calibration, sequences=sequences, seed=settings.seed, role="calibration", **common)
        judged = load_tokens(eval, sequences=None, role="evaluation", **common) if eval else None
    dense = functools.cache(lambda data: _perplexity(reader.model(), data, "before pruning"))
    with sharing(devices):
        for run in wanted:
            if not leads():
                _prune_along(reader, blocks, run.settings)
                continue
            narrow = pruned_config(config, run.settings)
            with checkpoint.Writer(
                run.output, narrow, reader.source, reader.dtypes, dtype=dtype, overwrite=overwrite
            ) as writer:
                report = _prune_into(writer, reader, narrow, blocks, judged, dense, run.settings)
                writer.file("spap_report.json", report.to_json())
                writer.file("README.md", _card(report))
            _summary(report)
            err.print(f"wrote {run.output}")


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


def _prune_into(writer, reader: "Reader", narrow, blocks: "TokenBlocks", judged: "TokenBlocks | None", dense, settings):
    """Prunes block by block into the writer; whole models are held only where there is data to judge them on."""
    import jax

    from spap_jax import memory
    from spap_jax.cli.console import layer_progress
    from spap_jax.pruning.pipeline import prune_layers
    from spap_jax.pruning.report import new_report

    before = dense(judged) if judged else None
    outer = reader.outer()
    writer.outer(outer)
    reports: list[LayerReport | SweepReport] = []
    layers = []
    with layer_progress(reader.config.layers) as progress:

        def watch(report: "LayerReport | SweepReport") -> None:
            reports.append(report)
            progress.advance(report)

        for index, layer in prune_layers(reader.config, outer, reader.layer, blocks.tokens, settings, watch):
            writer.layer(index, layer)
            layers += [jax.device_get(layer)] if judged else []  # for this process alone to judge
    extras: dict[str, Any] = {"bytes": {"before": reader.bytes, "after": writer.bytes}}
    if judged:
        after = _perplexity(_stacked(reader, narrow, outer, layers), judged, "after pruning")
        extras["perplexity"] = {"data": judged.description, "before": before, "after": after}
    extras["peak_memory_bytes"] = memory.peak()
    report = new_report(settings, reader.config, narrow, reader.source.name, blocks, reports)
    return replace(report, extras=extras)


def _prune_along(reader: "Reader", blocks: "TokenBlocks", settings) -> None:
    """The part of a process that does not lead: the same computations on its own sequences, and no result."""
    from spap_jax.pruning.pipeline import prune_layers

    for _ in prune_layers(reader.config, reader.outer(), reader.layer, blocks.tokens, settings, lambda _: None):
        pass


def _perplexity(model: "Model", judged: "TokenBlocks", when: str) -> float:
    from spap_jax.cli.console import waiting
    from spap_jax.evaluation.perplexity import perplexity

    with waiting(f"measuring perplexity {when}"):
        return perplexity(model, judged.tokens)


def _stacked(reader: "Reader", narrow, outer: dict, layers: list[dict]) -> "Model":
    import jax
    import jax.numpy as jnp

    from spap_jax.model import Model

    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    layers.clear()
    return Model(narrow, outer | {"layers": stacked}, reader.source)


def _summary(report: "PruneReport") -> None:
    from spap_jax.cli import console

    model, extras = report.model, report.extras
    counts = [("parameters", "parameters"), ("MLP parameters", "mlp_parameters"),
              ("MLP channels per layer", "intermediate")]  # fmt: skip
    if fewer_heads := model["kv_heads"]["after"] < model["kv_heads"]["before"]:
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
    removed = f"{report.settings['sparsity']:.0%} of the MLP channels"
    removed += f" and {1 - model['heads']['after'] / model['heads']['before']:.0%} of the heads" if fewer_heads else ""
    console.table(f"{model['name']}: {removed} removed", ("", "before", "after", "change"), rows)
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in report.seconds.items())
    console.out.print(f"seconds: {phases}; peak memory {console.bytes_text(extras['peak_memory_bytes'])}",
                      soft_wrap=True)  # fmt: skip


def _card(report: "PruneReport") -> str:
    from spap_jax.pruning.card import model_card

    return model_card(report)
