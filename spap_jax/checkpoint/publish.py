"""Uploads a finished checkpoint to the Hugging Face Hub in one commit, or into a folder at an address.

Stores have no rename, so config.json is uploaded last, and removed first if a checkpoint is replaced: a folder that has
one is complete. The manifest is uploaded before any other file; files that are not in it are never removed.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from spap_jax.checkpoint.folders import LocalFolder
from spap_jax.checkpoint.manifest import MANIFEST, check_replaceable, parse_manifest
from spap_jax.checkpoint.side_files import ACCOUNTS, SIDE_FILES, matching
from spap_jax.errors import UserError
from spap_jax.storage.files import About, Folder, upload

_CONFIG = "config.json"

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_config.json")
"""Weight files, which are removed from a repository with another model: loaders would mix them with the new ones."""

_OURS = (_CONFIG, "model*.safetensors", "model.safetensors.index.json", "spap_source.json", *SIDE_FILES, *ACCOUNTS)
_ORBAX = "params/"
"""Files that the commands write into a checkpoint folder (`_OURS` and `_ORBAX`): only these are uploaded."""

_PAGE = ("spap_report.html", "spap_report-*.png")
"""Files that spap report adds."""


def publish(folder: Path, address: str, overwrite: bool, *, with_page: bool = False) -> None:
    """Uploads a checkpoint into a folder at an address; files that do not belong to a checkpoint are left out.

    Args:
        overwrite: Whether a checkpoint in that folder may be replaced.
        with_page: Whether the page of spap report and its plots are uploaded too.

    Raises:
        UserError: The store fails, or something exists there that may not be replaced.
    """
    files = files_of(folder, with_page)
    place = Folder(address)
    present = _replaceable(place, overwrite)
    place.remove({_CONFIG} & present.keys())
    sizes = {name: file.stat().st_size for name, file in files.items()}
    _write_manifest(place, {name: about["size"] for name, about in present.items()} | sizes)
    place.remove(present.keys() - files.keys() - {_CONFIG, MANIFEST})
    place.put({name: file for name, file in files.items() if name != _CONFIG})
    _write_manifest(place, sizes)
    place.put({_CONFIG: files[_CONFIG]})


def push_to_hub(folder: Path, repo: str, overwrite: bool, *, private: bool, with_page: bool = False) -> str:
    """Uploads a checkpoint to a repository of the hub in one commit, and returns the address at which it can be found.

    Files that do not belong to a checkpoint are left out.

    Args:
        repo: Id of the repository, owner/name.
        overwrite: Whether the model in a repository that is not empty may be replaced.
        private: Whether a new repository is private; an existing one has to be.
        with_page: Whether the page of spap report and its plots are uploaded too.

    Raises:
        UserError: The hub fails or refuses, or something exists there that may not be replaced.
    """
    files: dict[str, Path | bytes] = {**files_of(folder, with_page)}
    files["README.md"] = (folder / "README.md").read_bytes().replace(b'("PATH")', f'("{repo}")'.encode())
    return upload(repo, files, "Pruned with SPAP-JAX", overwrite=overwrite, private=private, replaced=_of_a_model)


def files_of(folder: Path, with_page: bool = False) -> dict[str, Path]:
    """The files of a checkpoint that are uploaded, by their names relative to it."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    recorded = parse_manifest(LocalFolder(folder).read(MANIFEST))
    ours = matching(names, _OURS + (_PAGE if with_page else ()))
    sent = {*ours, *(name for name in names if name.startswith(_ORBAX) or name in recorded)}
    return {name: folder / name for name in sorted(sent)}


def _of_a_model(names: Iterable[str]) -> list[str]:
    """Those of the files on the hub that belong to a model."""
    names = list(names)
    return [*matching(names, _OURS + _WEIGHTS), *(name for name in names if name.startswith(_ORBAX))]


def holds_weights(files: Mapping[str, Path]) -> bool:
    """Whether weights are among the files that are uploaded."""
    return any(name.startswith(_ORBAX) for name in files) or bool(matching(files, ("model*.safetensors",)))


def left_out(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """The top-level files and folders of a checkpoint of which nothing is uploaded; folders end in a slash."""
    sent = {name.partition("/")[0] for name in files} | {MANIFEST}
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in sent)


def _replaceable(place: Folder, overwrite: bool) -> dict[str, About]:
    """Returns the existing files, after a check that all may be replaced; an unfinished upload may have left parts."""
    present = place.files()
    if "" in present:
        raise UserError(f"{place.address} is a file and the output is a folder: name another place.")
    recorded = parse_manifest(place.read(MANIFEST)) if MANIFEST in present else {}
    complete = _CONFIG in present
    ours = {name for name in recorded if name in present and (not complete or recorded[name] == present[name]["size"])}
    others = sorted(present.keys() - ours - ({MANIFEST} if recorded else set()))
    if complete or others:  # otherwise there is nothing, or the rest of an unfinished upload
        check_replaceable(place.address, overwrite, others)
    return present


def _write_manifest(place: Folder, sizes: Mapping[str, int]) -> None:
    place.write(
        MANIFEST, json.dumps({name: sizes[name] for name in sorted(sizes) if name != MANIFEST}, indent=1).encode()
    )
