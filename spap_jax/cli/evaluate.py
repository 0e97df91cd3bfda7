"""``spap eval``."""

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spap_jax.cli import console
from spap_jax.cli.switches import Bos, Data, ModelName
from spap_jax.errors import UserError
from spap_jax.quantities import count_text

if TYPE_CHECKING:
    from spap_jax.models.model import Model


def eval_(
    model: ModelName,
    /,
    *,
    data: Data | None = None,
    sequence_length: int | None = None,
    sequences: int | None = None,
    bos: Bos = None,
    tasks: str | None = None,
    task_path: Path | None = None,
    limit: int | None = None,
    batch_tokens: int = 4096,
    devices: int | None = None,
    model_devices: int | None = None,
    json: Path | None = None,
) -> None:
    """Measure perplexity on --data, or run --tasks of the lm-evaluation-harness.

    ```
    spap eval pruned --data wikitext2
    spap eval pruned --tasks arc_easy,hellaswag,piqa,winogrande --json scores.json
    ```

    The text is cut into windows that do not overlap. Perplexity is exp of the mean negative log-likelihood of all their
    tokens but the first of each.

    Args:
        model: Checkpoint to evaluate: a folder, a hub id, or an address such as gs://bucket/model.
        data: Text to measure perplexity on: wikitext2, c4 (or wikitext2:FILE, c4:FILE for a local copy), a data set of
            the hub, or the path or address of a .txt, .jsonl or .parquet file, or of a .npy file of token ids. Of
            conversations, in a column "messages", only the tokens that the assistant wrote count.
        sequence_length: Tokens in each window. By default as many as the model's positions allow, at most 2048.
        sequences: Number of windows, from the start of the text. By default all.
        bos: Begin each window with the tokenizer's beginning-of-text token. By default only for Gemma, which needs it.
        tasks: Names of tasks, separated by commas.
        task_path: Folder with further tasks (YAML files). Code that they refer to is run.
        limit: Number of examples of each task, from its start. By default all.
        batch_tokens: Tokens that a device processes at once; fewer need less memory.
        devices: Number of devices to use. By default all, but only one of a CPU's.
        model_devices: Number of devices among which the weights are divided; it must divide the number of devices, and
            each group of this size works on its own share of the text. By default as many as the weights need.
        json: JSON file to which the results are written as well.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.downloads import fetch_data, fetch_models
    from spap_jax.cli.json_file import check_json_place, write_json
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.parallel.placement import bytes_of, shard_params

    if (data is None) == (tasks is None):
        given = "neither was" if data is None else "both were"
        raise UserError(f"give either --data (perplexity) or --tasks (the lm-evaluation-harness); {given} given.")
    if any(word is not None for word in ((task_path, limit) if tasks is None else (sequence_length, sequences, bos))):
        raise UserError(
            "--sequence-length, --sequences and --bos go with --data, --task-path and --limit with --tasks."
        )
    if batch_tokens < 1 or (limit is not None and limit < 1):
        raise UserError("--batch-tokens and --limit must be at least 1: give positive numbers.")
    check_json_place(json, "spap eval")
    fetch_data(data)
    fetch_models(model)
    loaded = checkpoint.load(model, checkpoint.as_stored)
    with use_mesh(devices, model_devices, bytes_of(loaded.params)):

        def placed_model() -> "Model":
            with console.waiting(f"reading {model}"):
                return loaded.replace(params=shard_params(loaded.config, loaded.params))

        if data is not None:
            result = _measure_perplexity(model, placed_model(), data, sequence_length, sequences, bos, batch_tokens)
        else:
            from spap_jax.cli.tasks import measure_tasks

            result = measure_tasks(model, placed_model, str(tasks), task_path, limit, batch_tokens)
    if json is not None:
        write_json(json, "spap eval", result)


def _measure_perplexity(
    model: str,
    loaded: "Model",
    data: str,
    sequence_length: int | None,
    sequences: int | None,
    bos: bool | None,
    batch_tokens: int,
) -> dict[str, Any]:
    from spap_jax.cli.texts import chosen_length
    from spap_jax.data.sources import data_name
    from spap_jax.data.tokens import load_tokens
    from spap_jax.evaluation.perplexity import check_finite, perplexity
    from spap_jax.storage.location import public_name

    length = chosen_length(sequence_length, loaded.config)
    with console.waiting(f"tokenising {data}"):
        blocks = load_tokens(
            data,
            tokenizer=loaded.source.folder,
            sequence_length=length,
            sequences=sequences,
            role="evaluation",
            vocabulary=loaded.config.vocabulary,
            bos=bos,
        )
    start = time.perf_counter()
    what = f"measuring perplexity on {count_text(blocks.tokens.size)} tokens"
    with console.counting() as watch:
        value = perplexity(loaded, blocks.tokens, batch_tokens, functools.partial(watch, what), blocks.mask)
    check_finite(value, model)
    seconds = time.perf_counter() - start
    console.out.print(f"perplexity {value:.4f}  ({blocks.description}; {seconds:.1f} s)")
    return {
        "model": public_name(model),
        "perplexity": value,
        "data": data_name(data),
        "description": blocks.description,
        "sha256": blocks.sha256,
        "windows": len(blocks.tokens),
        "sequence_length": length,
        "seconds": seconds,
    }
