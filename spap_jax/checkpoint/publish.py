"""Uploads a finished checkpoint to the Hugging Face Hub, or into a folder at an address.

Stores have no rename, so config.json is uploaded last, and removed first if a checkpoint is replaced: a folder that has
one is complete. Before anything else the folder gets a manifest of its own: the size of each file that will be
uploaded, and for each file that exists, or has arrived, a hash of the store's information on it. So it is known at
every moment what a later upload may replace, and files that are not in the manifest are never removed.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spap_jax.checkpoint.manifest import MANIFEST, check_replaceable, parse_manifest, read_manifest
from spap_jax.checkpoint.side_files import ACCOUNTS, SIDE_FILES, matching
from spap_jax.errors import UserError
from spap_jax.storage.files import About, Folder, hub_id, is_address
from spap_jax.storage.hub import check_upload, upload

_CONFIG = "config.json"

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_config.json")
"""Files of another model on the hub: loaders would take its weights, or other shards, for the new ones."""

_OURS = (_CONFIG, "model*.safetensors", "model.safetensors.index.json", "spap_source.json", *SIDE_FILES, *ACCOUNTS)
_ORBAX = "params/"
"""Files that the commands write into a checkpoint folder (`_OURS` and `_ORBAX`): only these are uploaded."""

_PAGE = ("spap_report.html", "spap_report-*.png")
"""Files that spap report adds."""


def check_place(address: str, overwrite: bool, *, private: bool = False) -> None:
    """Checks before hours of work that a checkpoint can be uploaded.

    Args:
        address: Address that a checkpoint will be uploaded to.
        overwrite: Whether an existing checkpoint may be replaced.
        private: Whether a repository of the hub has to be private.

    Raises:
        UserError: Something exists there that may not be replaced, or nothing can be written there.
    """
    repo = hub_id(address)
    if repo is not None:
        check_upload(repo, overwrite, private)
        return
    parent, _, name = address.rstrip("/").rpartition("/")
    if parent.endswith(("/", ":")):
        raise UserError(f"{address} names no folder in a bucket: add one, as in {address.rstrip('/')}/pruned.")
    _replaceable(Folder(address), overwrite)
    beside, probe = Folder(parent), f".{name}.{secrets.token_hex(4)}"
    beside.write(probe, b"")
    beside.remove([probe])


def publish(folder: Path, address: str, overwrite: bool, *, private: bool = False, with_page: bool = False) -> str:
    """Uploads a checkpoint, in place of an existing one.

    Args:
        folder: The checkpoint; files in it that do not belong to a checkpoint are not uploaded.
        address: hf://owner/name, or the address of a folder.
        overwrite: Whether a checkpoint in that folder may be replaced.
        private: Whether a new repository of the hub is private; an existing one has to be.
        with_page: Whether the page of spap report and its plots are uploaded too.

    Returns:
        The address at which it can be found.

    Raises:
        UserError: The hub or the store fails, or something exists there that may not be replaced.
    """
    files = files_of(folder, with_page)
    repo = hub_id(address)
    if repo is None:
        _replace(Folder(address), files, overwrite)
        return address
    check_upload(repo, overwrite, private)
    card = files["README.md"].read_bytes().replace(b'("PATH")', f'("{repo}")'.encode())
    files_there = files | {"README.md": card}
    return upload(repo, files_there, "Pruned with SPAP-JAX", private=private, replaced=_of_a_model)


def files_of(folder: Path, with_page: bool = False) -> dict[str, Path]:
    """The files of a checkpoint that are uploaded, by their names relative to it."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    recorded = read_manifest(folder)
    ours = matching(names, _OURS + (_PAGE if with_page else ()))
    sent = {*ours, *(name for name in names if name.startswith(_ORBAX) or name in recorded)}
    return {name: folder / name for name in sorted(sent)}


def _of_a_model(names: Iterable[str]) -> list[str]:
    """Those of the files on the hub that belong to a model, whoever made it."""
    names = list(names)
    return [*matching(names, _OURS + _WEIGHTS), *(name for name in names if name.startswith(_ORBAX))]


def holds_weights(files: Mapping[str, Path]) -> bool:
    """Whether weights are among the files that are uploaded."""
    return any(name.startswith(_ORBAX) for name in files) or bool(matching(files, ("model*.safetensors",)))


def left_out(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """The top-level files and folders of a checkpoint of which nothing is uploaded; folders end in a slash."""
    sent = {name.partition("/")[0] for name in files} | {MANIFEST}
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in sent)


def read_made(output: str | Path, name: str) -> bytes | None:
    """Reads a file of a complete output, which may be at an address; None if it does not exist yet."""
    if is_address(output):
        place = None if hub_id(output) else Folder(str(output))
        return place.read(name) if place and place.read(_CONFIG) is not None else None  # which arrives last
    try:
        return Path(os.path.expanduser(output), name).read_bytes()
    except OSError:
        return None


def _replaceable(place: Folder, overwrite: bool) -> dict[str, About]:
    """Returns the existing files, after a check that all of them may be replaced.

    Raises:
        UserError: One of them may not be replaced.
    """
    there = place.files()
    if "" in there:
        raise UserError(f"{place.address} is a file and the output is a folder: name another place.")
    recorded = parse_manifest(place.read(MANIFEST)) if MANIFEST in there else {}
    if recorded:
        recorded[MANIFEST] = _told(there[MANIFEST])
    others = sorted(name for name, about in there.items() if not _is_ours(about, recorded.get(name)))
    if _CONFIG in there or others:  # otherwise there is nothing, or the rest of an unfinished upload
        check_replaceable(place.address, overwrite, others)
    return there


def _is_ours(about: About, recorded: Any) -> bool:
    """Whether a file is one that was uploaded, or a part of one."""
    known = recorded if isinstance(recorded, list) else [recorded]
    return _told(about) in known or any(isinstance(size, int) and about["size"] <= size for size in known)


def _told(about: About) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _replace(place: Folder, files: dict[str, Path], overwrite: bool) -> None:
    there = _replaceable(place, overwrite)
    known: dict[str, list[Any]] = {name: [_told(about)] for name, about in there.items() if name != MANIFEST}
    for name, file in files.items():
        known.setdefault(name, []).append(file.stat().st_size)
    _record(place, known)
    place.remove({_CONFIG} & there.keys())
    place.remove(there.keys() - files.keys() - {_CONFIG, MANIFEST})
    place.put({name: file for name, file in files.items() if name != _CONFIG})
    place.put({_CONFIG: files[_CONFIG]})
    arrived = place.files()
    if lost := sorted(files.keys() - arrived.keys()):
        place.remove([_CONFIG])
        raise UserError(f"{place.address}/{lost[0]} was removed while it was uploaded: try again.")
    _record(place, {name: _told(arrived[name]) for name in files})


def _record(place: Folder, files: dict[str, Any]) -> None:
    place.write(MANIFEST, json.dumps(files, indent=1).encode())
