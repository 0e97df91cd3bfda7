"""Where a finished checkpoint is sent: to the Hugging Face Hub, or into a folder at an address.

Stores rename nothing, so config.json goes there last, and first of all it is removed where a checkpoint is replaced: a
folder that has one is complete. A folder that is not complete yet says so by a file of its own.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from spap_jax.checkpoint.side_files import ACCOUNTS, SIDE_FILES, matching
from spap_jax.errors import UserError
from spap_jax.hub import check_upload, upload
from spap_jax.remote import Folder, hub_id, is_address

_CONFIG, _INCOMPLETE = "config.json", "incomplete"

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
"""Of another model, or in other shards, loaders would take them for the new ones."""


_OURS = (_CONFIG, "model*.safetensors", "model.safetensors.index.json", "spap_source.json", *SIDE_FILES, *ACCOUNTS)
_ORBAX = "params/"
"""What the commands write into a checkpoint folder: this, and no other file of it, is sent."""

_PAGE = ("spap_report.html", "spap_report-*.png")
"""What spap report adds."""

_MANIFEST = "spap_files.json"
"""Tells --overwrite on this machine what may go; it says nothing to others."""


def check_place(address: str, overwrite: bool) -> None:
    """Checks that are worth making before hours of work.

    Args:
        address: Where a checkpoint is to be sent.
        overwrite: Whether one that is there may be replaced.

    Raises:
        UserError: Something is there that may not be replaced, or nothing can be written there.
    """
    repo = hub_id(address)
    if repo is not None:
        check_upload(repo, overwrite)
        return
    parent, _, name = address.rstrip("/").rpartition("/")
    if parent.endswith(("/", ":")):
        raise UserError(f"{address} names no folder in a bucket: add one, as in {address.rstrip('/')}/pruned.")
    place = Folder(address)
    there = place.files()
    if "" in there:
        raise UserError(f"{address} is a file and the output is a folder: name another place.")
    if _CONFIG in there or (there and _INCOMPLETE not in there):
        check_replaceable(address, overwrite, lambda: describes_model(place.read(_CONFIG)))
    beside, probe = Folder(parent), f".{name}.{secrets.token_hex(4)}"
    beside.write(probe, b"")
    beside.remove([probe])


def check_replaceable(place: str | Path, overwrite: bool, is_model: Callable[[], bool]) -> None:
    """Refuses to replace what is there unless it is a checkpoint, and that is asked for.

    Raises:
        UserError: It may not be replaced.
    """
    if not overwrite:
        raise UserError(f"{place} exists: name another folder, or pass --overwrite to replace it.")
    if not is_model():
        raise UserError(
            f"{place} is not a model checkpoint (it has no config.json of a model), so it is not overwritten: "
            "name another folder, or delete it yourself."
        )


def describes_model(content: bytes | None) -> bool:
    """Whether the content of a config.json, if there is one, is that of a model."""
    try:
        config = json.loads(content or b"")
    except ValueError:
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def publish(folder: Path, address: str, *, private: bool = False, with_page: bool = False) -> str:
    """Sends a checkpoint, in place of what is there.

    Args:
        folder: The checkpoint; files in it that are none of a checkpoint stay.
        address: hf://owner/name, or that of a folder.
        private: Whether a new repository of the hub is shown to nobody else.
        with_page: Whether the page of spap report and its plots are sent too.

    Returns:
        Where it can be found.

    Raises:
        UserError: The hub or the store fails.
    """
    files = files_of(folder, with_page)
    repo = hub_id(address)
    if repo is None:
        _replace(Folder(address), files)
        return address
    card = files["README.md"].read_text(encoding="utf-8")
    card = card.replace('from_pretrained("PATH")', f'from_pretrained("{repo}")')
    files_there = files | {"README.md": card.encode()}
    return upload(repo, files_there, "Pruned with SPAP-JAX", private=private, replaced=_WEIGHTS)


def files_of(folder: Path, with_page: bool = False) -> dict[str, Path]:
    """What is sent of a checkpoint, under the names relative to it."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    sent = matching(names, _OURS + (_PAGE if with_page else ())) + [n for n in names if n.startswith(_ORBAX)]
    return {name: folder / name for name in sorted(sent)}


def left_out(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """The files and folders directly in a checkpoint of which nothing is sent; folders end in a slash."""
    sent = {name.partition("/")[0] for name in files} | {_MANIFEST}
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in sent)


def read_made(output: str | Path, name: str) -> bytes | None:
    """A file of an output, which may be at an address; None where there is no such file yet."""
    if is_address(output):
        return None if hub_id(output) else Folder(str(output)).read(name)
    try:
        return (Path(output).expanduser() / name).read_bytes()
    except OSError:
        return None


def _replace(place: Folder, files: dict[str, Path]) -> None:
    there = place.files()
    place.write(_INCOMPLETE, b"")
    place.remove({_CONFIG} & there.keys())
    place.remove(there.keys() - files.keys() - {_CONFIG, _INCOMPLETE})
    place.put({name: file for name, file in files.items() if name != _CONFIG})
    place.put({_CONFIG: files[_CONFIG]})
    place.remove([_INCOMPLETE])
