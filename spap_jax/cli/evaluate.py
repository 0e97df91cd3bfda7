"""``spap eval``."""

import functools
import json as json_format
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spap_jax.cli import console
from spap_jax.cli.options import Bos, Count, Data, Devices, JsonFile, ModelName
from spap_jax.errors import UserError
from spap_jax.quantities import count_text, percent_text

if TYPE_CHECKING:
    from spap_jax.models.model import Model


def eval_(
    model: ModelName,
    /,
    *,
    data: Data | None = None,
    dense: ModelName | None = None,
    sequence_length: Count | None = None,
    sequences: Count | None = None,
    bos: Bos = None,
    tasks: str | None = None,
    task_path: Path | None = None,
    task_data: Path | None = None,
    limit: Count | None = None,
    batch_tokens: Count = 4096,
    devices: Devices = None,
    model_devices: int | None = None,
    json: JsonFile = None,
) -> None:
    """Measure perplexity on --data, or run --tasks of the lm-evaluation-harness.

    ```
    spap eval pruned --data wikitext2 --dense HuggingFaceTB/SmolLM2-135M-Instruct
    spap eval pruned --tasks arc_easy,hellaswag,piqa --dense models/dense
    ```

    The text is cut into windows that do not overlap. Perplexity is exp of the mean negative log-likelihood of all their
    tokens but the first of each.

    Args:
        model: Checkpoint to evaluate: a folder, a hub id, or an address such as gs://bucket/model.
        data: Text to measure perplexity on: wikitext2, c4, a data set of the hub, or a .txt, .jsonl, .parquet or .npy
            file. Of chats, what the assistant wrote counts.
        dense: The model that it was made of, to measure how far the predictions of the two are apart as well, or how
            many answers to the tasks stayed the same.
        sequence_length: Tokens in each window. By default as in the run that pruned the model, or as many as its
            positions allow, at most 2048.
        sequences: Number of windows, from the start of the text. By default all.
        tasks: Names of tasks, separated by commas.
        task_path: Folder with further tasks (YAML files). Code that they refer to is run.
        task_data: Folder with the data sets of tasks, [OWNER/]NAME/[CONFIG/]SPLIT. By default the cache or the hub.
        limit: Number of examples of each task, from its start. By default all.
        batch_tokens: Tokens that a device processes at once; fewer need less memory.
        model_devices: Number of devices among which the weights are divided. By default as many as the weights need.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.inputs import fetch
    from spap_jax.cli.options import check_json_place, write_json
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.parallel.placement import bytes_of, shard_params

    if (data is None) == (tasks is None):
        given = "neither was" if data is None else "both were"
        raise UserError(f"give either --data (perplexity) or --tasks (the lm-evaluation-harness); {given} given.")
    unused = (task_path, task_data, limit) if tasks is None else (sequence_length, sequences, bos)
    if any(value is not None for value in unused):
        raise UserError(
            "--sequence-length, --sequences and --bos go with --data; --task-path, --task-data and --limit go with "
            "--tasks."
        )
    check_json_place(json)
    fetch([model, dense], [data])
    loaded = checkpoint.load(model, checkpoint.as_stored)
    original = checkpoint.load(dense, checkpoint.as_stored) if dense else None
    with use_mesh(devices, model_devices, bytes_of((loaded.params, original and original.params))):

        def placed_model(one: "Model") -> "Model":
            with console.waiting(f"reading {one.source.name}"):
                return one.replace(params=shard_params(one.config, one.params))

        if data is not None:
            length = sequence_length or _length_of_run(loaded)
            models = placed_model(loaded), original and placed_model(original)
            result = _measure_perplexity(model, *models, data, length, sequences, bos, batch_tokens)
        else:
            read = functools.partial(placed_model, loaded), original and functools.partial(placed_model, original)
            result = _measure_tasks(model, *read, str(tasks), task_path, task_data, limit, batch_tokens)
    if json is not None:
        write_json(json, "spap eval", result)


def _length_of_run(model: "Model") -> int | None:
    """Returns the tokens per sequence of the run that pruned a model, and says so; None if there was no such run."""
    from spap_jax.checkpoint.side_files import accounts

    try:
        length = json_format.loads(accounts(model.source)["spap_report.json"])["calibration"]["sequence_length"]
    except (KeyError, ValueError, TypeError, RecursionError):  # none, or of another version
        return None
    if not isinstance(length, int) or not 0 < length <= model.config.positions:
        return None
    console.err.print(f"windows of {length} tokens, as in the run that pruned it (--sequence-length for others)")
    return length


def _measure_perplexity(
    model: str,
    loaded: "Model",
    dense: "Model | None",
    data: str,
    sequence_length: int | None,
    sequences: int | None,
    bos: bool | None,
    batch_tokens: int,
) -> dict[str, Any]:
    from spap_jax.cli.texts import chosen_length
    from spap_jax.data.sources import data_name
    from spap_jax.data.tokens import load_tokens
    from spap_jax.evaluation.perplexity import check_finite, compare, perplexity
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
    work = f"measuring perplexity on {count_text(blocks.tokens.size)} tokens"
    with console.counting() as watch:
        how: Any = {"batch_tokens": batch_tokens, "watch": functools.partial(watch, work), "mask": blocks.mask}
        both = compare(dense, loaded, blocks.tokens, **how) if dense else None
        value = both.pruned if both else perplexity(loaded, blocks.tokens, **how)
    check_finite(value, model)
    seconds = time.perf_counter() - start
    console.out.print(f"perplexity {value:.4f}  ({blocks.description}; {seconds:.1f} s)")
    against = {}
    if dense and both:
        against = {"dense": public_name(dense.source.name), "dense_perplexity": both.dense}
        against |= {"divergence": both.divergence, "agreement": both.agreement}
        console.out.print(
            f"dense perplexity {both.dense:.4f}, divergence {both.divergence:.4f} nats, "
            f"same top token {percent_text(both.agreement)}"
        )
    return {
        "model": public_name(model),
        "perplexity": value,
        **against,
        "data": data_name(data),
        "description": blocks.description,
        "sha256": blocks.sha256,
        "windows": len(blocks.tokens),
        "sequence_length": length,
        "seconds": seconds,
    }


def _measure_tasks(
    model: str,
    read: "Callable[[], Model]",
    read_dense: "Callable[[], Model] | None",
    listed: str,
    task_path: Path | None,
    task_data: Path | None,
    limit: int | None,
    batch_tokens: int,
) -> dict[str, Any]:
    """Runs tasks and prints their tables -> values for a JSON file; models are read once the tasks are known."""
    try:
        from spap_jax.evaluation import harness, tasks
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UserError(
            "--tasks needs lm_eval, which is not installed: install it with pip install 'spap-jax[eval]'."
        ) from error
    from spap_jax.report.account import versions
    from spap_jax.storage.location import public_name

    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task: give names with commas between them, for example arc_easy,piqa.")
    with console.waiting(f"looking up {', '.join(names)}"):
        chosen = tasks.choose_tasks(names, task_path, task_data)

    def asked(one: "Model") -> dict[str, Any]:
        with console.counting() as watch:
            adapted = harness.HarnessModel(one, batch_tokens=batch_tokens, watch=watch)
            return tasks.run_tasks(adapted, chosen, limit, samples=read_dense is not None)

    loaded, start = read(), time.perf_counter()
    results = asked(loaded)
    seconds = time.perf_counter() - start
    examples = "" if limit is None else f", the first {limit} examples of each"
    columns = ("task", "split", "examples", "metric", "value", "stderr")
    console.table(f"{model}{examples}; {seconds:.1f} s", columns, _task_rows(results))
    against = {}
    if read_dense is not None:
        dense = read_dense()
        against = _compare_answers(dense.source.name, results, asked(dense))
    ours = {
        "model": public_name(model),
        "tasks": names,
        "task_path": task_path and public_name(task_path),
        "task_data": task_data and public_name(task_data),
        "limit": limit,
        "seconds": seconds,
    }
    of_machine = ("pretty_env_info", "git_hash", "upper_git_hash", "samples")  # which belongs in no published file
    published = {name: value for name, value in results.items() if name not in of_machine}
    return published | {"spap": ours | {"versions": versions()} | against}


def _compare_answers(dense: str, results: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Prints how many answers are those of the dense model -> values for a JSON file."""
    from spap_jax.evaluation.flips import Kept, answers, kept
    from spap_jax.storage.location import public_name

    found = kept(answers(results), answers(theirs))
    if len(found) > 1:
        found["all"] = Kept(*map(sum, zip(*found.values(), strict=True)))
    rows = [
        (task, str(each.examples), percent_text(each.share), " to ".join(map(percent_text, each.interval)))
        for task, each in found.items()
    ]
    console.table(f"answers that are those of {dense}", ("task", "examples", "the same", "95 % interval"), rows)
    shares = {
        task: {"examples": each.examples, "share": each.share, "interval": each.interval}
        for task, each in found.items()
    }
    return {"dense": public_name(dense), "dense_results": theirs["results"], "same_answers": shares}


def _task_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    from spap_jax.evaluation.tasks import split_of

    rows = []
    for task, values in results["results"].items():
        examples = str(results["n-samples"].get(task, {}).get("effective", ""))  # a group of tasks has none of its own
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                error = _number(values.get(f"{metric}_stderr,{filtered}"))
                rows.append((task, split_of(results, task), examples, name, _number(value), error))
    return rows


def _number(value: Any) -> str:
    """Formats a number with four decimals, or in scientific notation if huge; empty for a missing standard error."""
    if not isinstance(value, float):
        return "" if value in (None, "N/A") else str(value)
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"
