"""``spap write``."""

from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from spap_jax.cli.options import Data, Devices, ModelName
from spap_jax.errors import UserError
from spap_jax.settings import OWN, WriteSettings

if TYPE_CHECKING:
    from spap_jax.evaluation.writing import Writing
    from spap_jax.models.model import Model


def write(
    model: ModelName,
    /,
    *,
    output: Path,
    data: Data | None = None,
    prompts: Data | None = None,
    devices: Devices = None,
    model_devices: int | None = None,
    settings: Annotated[WriteSettings, Parameter(name="*")] = WriteSettings(),  # noqa: B008 (frozen)
) -> None:
    """Let a model write text to calibrate it on: what pruning is to keep is what the model says by itself.

    ```
    spap write ./model --output own.jsonl
    spap write ./chat-model --prompts prompts.jsonl --output own.jsonl
    spap prune ./model --data own.jsonl --output pruned
    ```

    The file grows batch by batch, and the same command goes on where an earlier one stopped.

    Args:
        model: Checkpoint that writes, usually the dense one: a folder, a hub id or an address.
        output: File for the texts or conversations, .jsonl.
        data: Text, as for spap prune, of which the model continues the first words of each paragraph. By default
            beginnings of many kinds, or its start token alone.
        prompts: Prompts for a chat model to answer, in a column "prompt" or "messages" of a file or a data set of the
            hub. What the assistant says last is left out.
        model_devices: Number of devices among which the weights are divided; it must divide the number of devices.
            By default as many as the weights need.
        settings: How to write.
    """
    from spap_jax import checkpoint
    from spap_jax.checkpoint.fingerprint import fingerprint
    from spap_jax.cli.console import out
    from spap_jax.cli.inputs import fetch
    from spap_jax.evaluation.writing import prepare

    if output.suffix != ".jsonl" or not output.parent.is_dir():
        raise UserError(f"{output} cannot be written: give a name that ends in .jsonl, in a folder that exists.")
    fetch([model], [data, prompts])
    loaded = checkpoint.load(model, checkpoint.as_stored)
    writing = prepare(loaded, settings, data, prompts)
    run = writing.digest(fingerprint(checkpoint.locate(model)))
    done = write_to(output, loaded, writing, run, devices, model_devices)
    out.print(f"{output} holds {done} {'conversations' if writing.conversations else 'texts'}")


def write_to(
    output: Path, model: "Model", writing: "Writing", run: str, devices: int | None, model_devices: int | None
) -> int:
    """Adds the rows that a file lacks, each with the hash ``run`` of ``Writing.digest``, and returns how many it holds.

    Raises:
        UserError: the file holds something else.
    """
    from spap_jax.cli.console import counting, waiting
    from spap_jax.evaluation.writing import write_batches
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.parallel.placement import bytes_of, shard_params

    with use_mesh(devices, model_devices, bytes_of(model.params)), open(output, "a+b") as file:
        done, total = rows_written(file, run), writing.sequences
        if done >= total:
            return done
        with waiting(f"reading {model.source.name}"):
            placed = model.replace(params=shard_params(model.config, model.params))
        try:
            with counting() as watch:
                watch("writing", done, total)
                for rows in write_batches(placed, writing, done):
                    file.write(b"".join(msgspec.json.encode({"run": run} | row, enc_hook=str) + b"\n" for row in rows))
                    file.flush()
                    done += len(rows)
                    watch("writing", done, total)
        except KeyboardInterrupt as error:
            said = f"interrupted; {done} of {total} are in {output}, and the same command goes on from there."
            raise KeyboardInterrupt(said) from error
    return done


def with_own_text(
    data: str,
    model: "Model",
    weights: str,
    sequences: int,
    length: int,
    devices: int | None,
    model_devices: int | None,
) -> str:
    """Returns data in which the file of what the model has written takes the place of "own"; it is written first.

    The file is kept in the cache, where later runs find it and add to it.

    Args:
        weights: What identifies the model's weights.
        sequences: Number of sequences, of ``length`` tokens, that are drawn from all the data.

    Raises:
        UserError: the run has several processes, the model cannot write, or a part of a mixture is too small.
    """
    import jax

    from spap_jax.cli.console import err
    from spap_jax.data.sources import sequence_counts, shares_of
    from spap_jax.evaluation.writing import prepare, settings_for
    from spap_jax.storage.location import cache, public_name

    parts = shares_of(data)
    own = dict(zip((part.data for part in parts), sequence_counts(parts, sequences), strict=True)).get(OWN)
    if own is None:
        return data
    if jax.process_count() > 1:
        raise UserError(
            "several processes cannot write text together: let one do it with spap write MODEL --output own.jsonl, and "
            "give --data own.jsonl."
        )
    wanted = settings_for(model, own, length)
    writing = prepare(model, wanted, None, None)
    run = writing.digest(weights)
    file = cache() / "own" / f"{public_name(model.source.name).replace('/', '--')}-{run}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    err.print(
        f"calibrating on {wanted.sequences} texts that the model writes itself, of {wanted.length} tokens: {file}"
    )
    write_to(file, model, writing, run, devices, model_devices)
    named = [(str(file) if part.data == OWN else part.data, part.weight) for part in parts]
    return named[0][0] if len(named) == 1 else ",".join(f"{name}:{weight:g}" for name, weight in named)


def rows_written(file: IO[bytes], run: str) -> int:
    """Returns the number of rows that a run has written to its file, and cuts off a half-written last one.

    Raises:
        UserError: the file holds something else.
    """
    file.seek(0)
    content, beginning = file.read(), f'{{"run":"{run}"'.encode()
    if not beginning.startswith(content[: len(beginning)]):
        raise UserError(f"{file.name} exists, and another model, command or version wrote it: name another file.")
    file.truncate(content.rfind(b"\n") + 1)
    return content.count(b"\n")
