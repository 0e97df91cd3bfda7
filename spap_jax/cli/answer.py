"""``spap answer``."""

import functools
import os
from pathlib import Path

from spap_jax.cli.switches import Data, ModelName

COMMAND = "spap answer"


def answer(
    model: ModelName,
    /,
    *,
    data: Data,
    output: Path,
    answers: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 16384,
    devices: int | None = None,
    model_devices: int | None = None,
) -> None:
    """Let a chat model answer prompts, and write the conversations to calibrate it on.

    ```
    spap answer ./chat-model --data prompts.jsonl --output answered.jsonl
    spap prune ./chat-model --data answered.jsonl --output pruned
    ```

    For those who have the questions that their model is asked, but no answers to calibrate on. The answers are sampled
    from the model's own predictions, which are what pruning tries to keep.

    Args:
        model: Checkpoint that answers, usually the dense one: a folder, a hub id or an address.
        data: Prompts: a .jsonl, .json or .parquet file by its path or address, or a data set of the hub, with a column
            "prompt" or "messages". What the assistant says at the end of a conversation is left out.
        output: File for the conversations, .jsonl; it must not exist.
        answers: Number of answers to each prompt.
        max_new_tokens: Tokens after which an answer is cut off.
        temperature: Divides the logits; 1 samples from the model's own predictions, 0 takes the likeliest token.
        top_p: Sample from the smallest set of the likeliest tokens whose total probability reaches this value.
        seed: Random seed.
        batch_tokens: Tokens that a device processes at once; fewer need less memory.
        devices: Number of devices to use. By default all, but only one of a CPU's.
        model_devices: Number of devices among which the weights are divided; it must divide the number of devices.
            By default as many as the weights need.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.console import counting, out, waiting
    from spap_jax.cli.downloads import fetch_data, fetch_models
    from spap_jax.cli.json_file import check_json_place, write_json_lines
    from spap_jax.errors import UserError
    from spap_jax.evaluation.answers import answer as written
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.parallel.placement import bytes_of, shard_params

    if output.suffix != ".jsonl":
        raise UserError(f"{output} is to hold conversations as JSON lines: give it a name that ends in .jsonl.")
    if os.path.isfile(output):
        raise UserError(f"{output} exists: name another file.")
    check_json_place(output, COMMAND)
    fetch_data(data)
    fetch_models(model)
    loaded = checkpoint.load(model, checkpoint.as_stored)
    with use_mesh(devices, model_devices, bytes_of(loaded.params)):
        with waiting(f"reading {model}"):
            placed = loaded.replace(params=shard_params(loaded.config, loaded.params))
        with counting() as watch:
            rows = written(
                placed,
                data,
                answers=answers,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                batch_tokens=batch_tokens,
                watch=functools.partial(watch, "writing answers"),
            )
    write_json_lines(output, COMMAND, rows)
    out.print(f"{len(rows)} conversations written to {output}")
