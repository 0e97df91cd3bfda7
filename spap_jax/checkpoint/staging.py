"""Makes the output of a run from its shards: written beside its place, listed, then put there.

A plan says which files the output has, with their sizes, and which of them are shards that only get another name. Once
it is stored, a process that is killed can be followed by another one, which goes on from wherever the first one was.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spap_jax.checkpoint import weight_files
from spap_jax.checkpoint.beside import Beside
from spap_jax.checkpoint.folders import LocalFolder, folder_at, sync
from spap_jax.checkpoint.output import MANIFEST, RUN, fill, manifest_text, parse_manifest, put_in_place
from spap_jax.checkpoint.shards import Shards
from spap_jax.errors import UserError
from spap_jax.storage.files import Folder

STAGED = "output"
"""Name of the folder, among what is kept of a run, in which the output is made."""

Plan = dict[str, Any]


def stage(
    folder: LocalFolder | Folder,
    shards: Shards,
    parts: Sequence[str],
    beside: Beside,
    files: Mapping[str, str | bytes],
) -> Plan:
    """Writes all files of the output that are not shards, and returns the plan.

    Args:
        parts: Names of the shards in ``folder``: the one outside of the blocks, then the blocks.
        beside: Tensors whose files are in ``folder``, too.
        files: All other files of the output by name.
    """
    there, parts = folder.sizes(), [*parts, *beside.files]
    if lost := [name for name in parts if name not in there]:
        raise ValueError(f"{len(lost)} parts of the model were not written, such as {lost[0]}")
    folder.remove([STAGED])
    moved: dict[str, str] = {}
    weights: dict[str, str | bytes] = {}
    total = shards.total_bytes() + beside.bytes
    if total > weight_files.JOINED_BYTES:
        count = len(parts)
        moved = {f"model-{number:05d}-of-{count:05d}.safetensors": part for number, part in enumerate(parts, 1)}
        copied = {name: new for new, part in moved.items() for name in beside.files.get(part, ())}
        weights = {weight_files.INDEX: shards.index_text(list(moved), copied, total)}
    else:
        weights = {weight_files.JOINED: _joined(folder, parts)}
    for name, content in {**files, **weights}.items():
        folder.write(f"{STAGED}/{name}", content if isinstance(content, bytes) else content.encode())
    sizes = {name: there[source] for name, source in moved.items()}
    for name, size in folder.sizes().items():
        if name.startswith(f"{STAGED}/"):
            sizes[name.removeprefix(f"{STAGED}/")] = size
    folder.write(f"{STAGED}/{MANIFEST}", manifest_text(sizes).encode())
    return {"files": sizes, "moved": moved}


def place(folder: LocalFolder | Folder, plan: Plan, output: str | Path, overwrite: bool) -> None:
    """Puts a staged output in its place, and removes all else that was kept, except the file with the plan.

    Raises:
        UserError: Something is there that may not be replaced.
    """
    if isinstance(folder, Folder):
        names = {name: plan["moved"].get(name, f"{STAGED}/{name}") for name in plan["files"]}
        fill(str(output), plan["files"], lambda name, target: folder.copy(names[name], target, name), overwrite)
    else:
        path = folder.path
        for name, source in plan["moved"].items():
            if (path / source).exists():
                (path / source).rename(path / STAGED / name)
        sync(path / STAGED)
        put_in_place(path / STAGED, Path(output), path / "replaced", overwrite)
    tidy(folder)


def tidy(folder: LocalFolder | Folder) -> None:
    """Removes all that was kept of a run, except the file with its identity and the plan."""
    folder.remove(folder.entries() - {RUN})


def is_staged(folder: LocalFolder | Folder, plan: Plan) -> bool:
    """Whether all files of the output are still where they were made."""
    there = folder.sizes()
    return all(f"{STAGED}/{name}" in there or plan["moved"].get(name) in there for name in plan["files"])


def is_in_place(plan: Plan, output: str | Path) -> bool:
    """Whether the output of a plan is in its place."""
    target = folder_at(output)
    return parse_manifest(target.read(MANIFEST)) == plan["files"] and target.read("config.json") is not None


def _joined(folder: LocalFolder | Folder, parts: Sequence[str]) -> bytes:
    """The tensors of all shards in one file."""
    tensors: dict[str, np.ndarray] = {}
    for name in parts:
        shard = weight_files.decode(folder.read(name))
        if shard is None:
            raise UserError(f"{name} in {folder.address} was damaged meanwhile: repeat the command.")
        tensors |= shard[0]
    return weight_files.encode(tensors)
