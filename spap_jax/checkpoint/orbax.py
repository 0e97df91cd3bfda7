"""Orbax folders: the parameter tree as it is in memory, for use in JAX, with the same config and side files.

They are written by the stable interface of Orbax 0.12; `load` of its `experimental.v1` reads params/ too.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spap_jax.checkpoint.config_text import read_config_text, understood, written_config_text
from spap_jax.checkpoint.output import new_folder
from spap_jax.checkpoint.reader import PlaceParams
from spap_jax.checkpoint.side_files import PARAMS, SOURCE, side_files
from spap_jax.checkpoint.tensors import DTYPES
from spap_jax.errors import UserError, first_line
from spap_jax.models import DecoderConfig, Params, decoder
from spap_jax.models.model import Model, Source
from spap_jax.storage.location import public_name

_COMMITTED = "commit_success.txt"


def save_orbax(
    model: Model, folder: str | Path, overwrite: bool = False, files: Mapping[str, bytes] | None = None
) -> None:
    """Writes config.json, the side files, and the parameters under params/.

    Args:
        overwrite: Whether to replace a folder whose manifest names all files in it.

    Raises:
        UserError: The folder cannot be replaced, its path has brackets, the disk is full, or config.json has no field;
            or the model has more parts than a decoder.
    """
    from orbax.checkpoint import StandardCheckpointer

    if model.config.in_tower:
        raise UserError(
            f"an Orbax folder holds a decoder alone, and {model.source.name} has other parts, which would be lost: "
            "write it in the format of Hugging Face."
        )
    needed = sum(array.nbytes for array in jax.tree.leaves(model.params))
    with new_folder(folder, overwrite, needed, model.source.folder) as partial:
        if re.search(r"\[.+\]", str(partial)):  # it takes them for a pattern, and leaves most files out
            raise UserError(
                f"Orbax cannot write {folder} by way of {partial}, with brackets in the path: name another folder."
            )
        for name, file in side_files(model.source.folder).items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / name)
        (partial / "config.json").write_bytes(written_config_text(model.source, model.config).encode("utf-8"))
        facts = {"name": public_name(model.source.name), "head_stored": model.source.head_stored}
        (partial / SOURCE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        with StandardCheckpointer() as checkpointer:  # it writes in the background
            checkpointer.save(partial / PARAMS, model.params)
            checkpointer.wait_until_finished()
        committed = partial / PARAMS / _COMMITTED
        if committed.is_file():  # Orbax only needs it to exist, and it contains a path of this machine
            committed.write_text("Checkpoint commit was successful\n", encoding="utf-8")


def load_orbax(folder: Path, place: PlaceParams) -> Model:
    """Reads a model that `save_orbax` wrote; ``place`` puts it on devices, from the memory of the host.

    Raises:
        UserError: The folder is damaged.
    """
    folder = folder.absolute()
    text = read_config_text(folder / "config.json")
    _, config = understood(text, str(folder))
    params = _restored(folder, config)
    _check_finite(folder, params)
    facts = _facts(folder)
    return Model(config, place(config, params), Source(facts["name"], folder, text, facts["head_stored"]))


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / SOURCE).read_bytes())
        return {"name": str(facts["name"]), "head_stored": bool(facts["head_stored"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / SOURCE, error) from error


def _restored(folder: Path, config: DecoderConfig) -> Params:
    """Restores the parameters to the host, with the config's shapes and the checkpoint's dtypes."""
    from orbax.checkpoint import StandardCheckpointer

    with StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(folder / PARAMS).item_metadata.tree
            target = _target(folder, decoder.shapes(config), stored)
            return checkpointer.restore(folder / PARAMS, target)
        except UserError:
            raise
        except Exception as error:  # Orbax raises all kinds of exceptions for a damaged checkpoint
            raise _damaged(folder / PARAMS, error) from error


def _target(folder: Path, shapes: Params, stored: Params) -> Params:
    """Arrays like those to restore, after a check that they match the stored ones."""
    if jax.tree.structure(shapes) != jax.tree.structure(stored):
        raise UserError(f"{folder / PARAMS} holds other weights than its config.json describes: save it again.")

    def one(name: str, ours: jax.ShapeDtypeStruct, theirs: Any) -> np.ndarray:
        if tuple(theirs.shape) != ours.shape or np.dtype(theirs.dtype) not in DTYPES.values():
            raise UserError(
                f"{name} in {folder / PARAMS} is {theirs.dtype} {list(theirs.shape)}, where config.json gives "
                f"{list(ours.shape)}: save the checkpoint again."
            )
        return np.empty(ours.shape, theirs.dtype)  # Orbax restores numpy arrays in place of such

    return decoder.map_named(one, shapes, stored)


def _check_finite(folder: Path, params: Params) -> None:
    paths = jax.tree_util.tree_leaves_with_path(params)
    damaged = (path for path, array in paths if not np.isfinite(array).all())
    if path := next(damaged, None):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise UserError(
            f"the weight {name} in {folder} holds NaN or infinity: the checkpoint is damaged, so convert it again."
        )


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({first_line(error)}): it is damaged or incomplete, so write it again.")
