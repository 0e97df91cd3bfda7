"""One step of an unfinished run as a safetensors file: arrays, reports, and a hash of the arrays."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spap_jax.checkpoint.output import is_full, sync
from spap_jax.errors import UserError
from spap_jax.models import Params

Json = dict[str, Any]

NEW = ".new"
"""Suffix of a file that is not completely written yet."""

SUFFIX = ".safetensors"
"""Suffix of the name of a file of this kind, after the number of the step."""


def write_step(path: Path, kept: Params, told: list[Json]) -> None:
    """Writes a file that is complete or absent.

    Args:
        path: The file.
        kept: Nested dicts of numpy arrays.
        told: Reports, as JSON values.

    Raises:
        UserError: The disk is full.
    """
    flat = {name: np.asarray(array, order="C") for name, array in flatten_dict(kept, sep="/").items()}
    about = {"told": json.dumps(told), "sha256": _digest(sorted(flat.items()))}
    with renamed(path) as written:
        save_file(flat, written, metadata=about)


def read_step(path: Path) -> Params:
    """Returns the arrays of a file that is intact."""
    return unflatten_dict(dict(_arrays(path)), sep="/")


def told_if_intact(path: Path) -> list[Json] | None:
    """Returns the reports of a file; None if it is damaged.

    Raises:
        OSError: It cannot be read for another reason, which says nothing of what is in it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
        return json.loads(about["told"]) if _digest(_arrays(path)) == about["sha256"] else None
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """Yields another name for a file, which takes its own once it is complete and on the disk.

    Raises:
        UserError: The disk is full.
    """
    written = path.with_name(f"{path.name}{NEW}")
    try:
        yield written
        sync(written)
        written.rename(path)
        sync(path.parent)
    except Exception as error:
        written.unlink(missing_ok=True)
        if is_full(error):
            raise UserError(
                f"the disk of {path.parent} filled up, or a limit of it was reached, while the progress of the run was "
                "kept there: free some space, and repeat the command."
            ) from error
        raise


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the arrays of a file by name; opens it for each, since what was read of an open file stays in memory."""
    with safe_open(path, framework="numpy") as file:
        names = sorted(file.keys())
    for name in names:
        with safe_open(path, framework="numpy") as file:
            array = file.get_tensor(name)
        yield name, array


def _digest(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    total = hashlib.sha256()
    for name, array in arrays:
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
