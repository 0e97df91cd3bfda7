"""``spap convert``."""

from pathlib import Path
from typing import Literal


def convert(
    model: str,
    /,
    *,
    output: Path,
    to: Literal["orbax", "huggingface"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Rewrite a checkpoint: Hugging Face folders to Orbax and back, bit for bit.

    Args:
        model: Folder or hub id of the checkpoint.
        output: Folder to write; complete or absent.
        to: Format to write.
        dtype: Data type of the weights; the source's where absent. Orbax keeps the source's.
        overwrite: Replace the output folder if it is a checkpoint.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.console import err, waiting
    from spap_jax.errors import UserError

    if to == "orbax" and dtype is not None:
        raise UserError("--dtype goes with --to huggingface; an Orbax folder keeps the source's data type.")
    checkpoint.check_output(output, overwrite)
    with waiting(f"reading {model}"):
        loaded = checkpoint.load(model)
    with waiting(f"writing {output}"):
        if to == "orbax":
            checkpoint.save_orbax(loaded, output, overwrite=overwrite)
        else:
            checkpoint.save(loaded, output, dtype=dtype, overwrite=overwrite)
    err.print(f"wrote {output}")
