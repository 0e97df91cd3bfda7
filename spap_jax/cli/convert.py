"""``spap convert``."""

from typing import Literal

from spap_jax.cli.options import ModelName, OutputPath, Overwrite


def convert(
    model: ModelName,
    /,
    *,
    output: OutputPath,
    to: Literal["orbax", "huggingface"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint from the Hugging Face format to Orbax (0.12, read by v1 too) or back, bit for bit.

    ```
    spap convert pruned --to orbax --output pruned-orbax
    spap convert pruned-orbax --to huggingface --dtype bfloat16 --output half
    ```

    Args:
        model: Checkpoint to convert: a folder, a hub id or an address.
        output: Folder to write, or an address to send it to, such as gs://bucket/model. It is complete or absent.
        to: Format to write.
        dtype: Data type of the weights, with --to huggingface. By default that of the source, which Orbax always keeps.
    """
    import jax

    from spap_jax import checkpoint
    from spap_jax.checkpoint.side_files import accounts
    from spap_jax.cli.console import err, waiting
    from spap_jax.cli.inputs import fetch, inputs
    from spap_jax.errors import UserError
    from spap_jax.report.card import converted_files

    if to == "orbax" and dtype is not None:
        raise UserError("--dtype goes with --to huggingface; an Orbax folder keeps the source's data type.")
    checkpoint.check_output(output, overwrite, inputs=inputs(model))
    fetch([model])
    checkpoint.fetch_side_files(model)
    # No weight goes through a device, so none has to be started, of which others may have all memory. To Hugging Face's
    # format, weights are read when their turn comes to be written.
    jax.config.update("jax_platforms", "cpu")
    with waiting(f"reading {model}"):
        loaded = checkpoint.load(model, checkpoint.on_host if to == "orbax" else checkpoint.as_stored)
    size = checkpoint.weight_bytes(loaded, dtype) if dtype else None
    kept = converted_files(accounts(loaded.source), size, stock=to != "orbax")
    with waiting(f"writing {output}"):
        if to == "orbax":
            checkpoint.save_orbax(loaded, output, overwrite=overwrite, files=kept)
        else:
            checkpoint.save(loaded, output, dtype=dtype, overwrite=overwrite, files=kept)
    err.print(f"wrote {output}")
