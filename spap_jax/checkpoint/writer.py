"""Writes a model that is in memory, or lies in other files, as a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path

import jax

from spap_jax.checkpoint import inventory
from spap_jax.checkpoint.shards import Shards
from spap_jax.checkpoint.store import FolderStore
from spap_jax.models.model import Model


def save(
    model: Model,
    folder: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Writes a model as a Hugging Face folder, at a path or an address, that stock loaders read; complete or absent.

    Args:
        model: Its parameters are arrays, or `Stored`.
        dtype: "float32", "bfloat16" or "float16"; by default the dtypes of the arrays.
        overwrite: Whether to replace a folder whose manifest names all files in it.
        files: Additional text files by name.

    Raises:
        UserError: The folder may not be replaced or is in the model's, there is no room, or a weight exceeds the dtype.
    """
    dtypes = inventory.array_dtypes(model.params, model.config)
    with FolderStore(folder, None, model.config, model.source, dtypes, dtype=dtype, overwrite=overwrite) as store:
        put_model(store, model)
        store.finish(files or {})


def put_model(store: FolderStore, model: Model) -> None:
    """Puts all weights of a model into a store."""
    store.outer(model.params)
    for index in range(model.config.layers):
        store.put(index, jax.tree.map(lambda stack, i=index: stack[i], model.params["layers"]), {})


def weight_bytes(model: Model, dtype: str | None = None) -> int:
    """The number of bytes of the weights that `save` writes for a model."""
    dtypes = inventory.array_dtypes(model.params, model.config)
    return Shards(model.config, model.source.head_stored, dtypes, dtype).total_bytes()
