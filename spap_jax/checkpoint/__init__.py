"""Reads and writes checkpoints: Hugging Face folders and Orbax folders."""

from pathlib import Path

from spap_jax.checkpoint.config_text import check_describable, read_config
from spap_jax.checkpoint.locate import fetch_side_files, locate, locate_config
from spap_jax.checkpoint.orbax import load_orbax, save_orbax
from spap_jax.checkpoint.output import check_output, check_room
from spap_jax.checkpoint.reader import PlaceParams, Reader, as_stored, on_host
from spap_jax.checkpoint.side_files import is_orbax
from spap_jax.checkpoint.writer import save, weight_bytes
from spap_jax.models.model import Model
from spap_jax.parallel.placement import shard_params

__all__ = [
    "Reader",
    "as_stored",
    "check_describable",
    "check_output",
    "check_room",
    "fetch_side_files",
    "is_orbax",
    "load",
    "locate",
    "locate_config",
    "on_host",
    "read_config",
    "save",
    "save_orbax",
    "weight_bytes",
]


def load(name: str | Path, place: PlaceParams = shard_params) -> Model:
    """Reads a model from a local Hugging Face or Orbax folder, or from the hub; a `Notice` names ignored config fields.

    Args:
        name: The folder, or a hub id of the form owner/name.
        place: Places the weights on devices; by default, on those of the mesh.

    Raises:
        UserError: There is no such model, it is not supported, or its files are damaged or change meanwhile.
    """
    folder = locate(name)
    if is_orbax(folder):
        return load_orbax(folder, place)
    reader = Reader(folder, str(name))
    model = reader.model(place)
    reader.check_unchanged()
    return model
