"""``spap convert``."""

from contextlib import nullcontext
from typing import Literal

from spap_jax.cli.switches import ModelName, Place


def convert(
    model: ModelName,
    /,
    *,
    output: Place,
    to: Literal["orbax", "huggingface"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Rewrite a checkpoint: Hugging Face folders to Orbax and back, bit for bit, with its card and reports.

    Example: spap convert pruned --to orbax --output pruned-orbax

    Args:
        model: Folder, hub id or address of the checkpoint.
        output: Folder to write, complete or absent; or an address to send it to, such as gs://bucket/model.
        to: Format to write.
        dtype: Data type of the weights; the source's where absent. Orbax keeps the source's.
        overwrite: Replace the output folder if it is a checkpoint.
    """
    from spap_jax import checkpoint
    from spap_jax.checkpoint.side_files import accounts
    from spap_jax.cli.console import err, waiting
    from spap_jax.cli.downloads import fetch_models
    from spap_jax.errors import UserError
    from spap_jax.remote import hub_id, is_address

    if to == "orbax" and dtype is not None:
        raise UserError("--dtype goes with --to huggingface; an Orbax folder keeps the source's data type.")
    if hub_id(output):
        raise UserError(
            "spap convert makes no model card, which a model on the hub should have: name a folder for --output."
        )
    checkpoint.check_output(output, overwrite)
    fetch_models(model)
    with waiting(f"reading {model}"):
        loaded = checkpoint.load(model)
    kept = accounts(loaded.source.folder)
    with nullcontext() if is_address(output) else waiting(f"writing {output}"):  # sending has a bar of its own
        if to == "orbax":
            checkpoint.save_orbax(loaded, output, overwrite=overwrite, files=kept)
        else:
            checkpoint.save(loaded, output, dtype=dtype, overwrite=overwrite, files=kept)
    err.print(f"wrote {output}")
