"""What a name means: a path, an address of a store such as gs://bucket/folder, or the id of a repository of the hub.

Also whether two such places are the same, and which names an output may have.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from spap_jax.errors import UserError, without_password

_SCHEMES = {"gcs": "gs", "s3a": "s3", "local": "file"}
"""Other spellings of the same store."""


def is_address(name: str | Path) -> bool:
    """Whether a name is an address rather than a path or a hub id: it begins like gs:// or hf://."""
    return isinstance(name, str) and re.match(r"[a-zA-Z][\w+.-]*://", name) is not None


def hub_id(name: str | Path) -> str | None:
    """The id of the hub's repository that a name of a model refers to; None for paths and for other addresses.

    A name of the form owner/name is an id unless there is a local folder called owner.
    """
    if not isinstance(name, str):
        return None
    if name.startswith("hf://"):
        return name.removeprefix("hf://").rstrip("/")
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).parent.is_dir()
    return name if is_id else None


def public_name(name: str | Path) -> str:
    """The name of a model or a file for reports: its hub id, or its last part without the folders above it."""
    if repo := hub_id(name):
        return repo
    if is_address(name):
        return without_password(str(name)).rstrip("/").rpartition("/")[2]
    return os.path.basename(os.path.abspath(os.path.expanduser(name)))  # of "." too; a link keeps its own name


def model_place(name: str | Path) -> str | Path:
    """The path or address that a model's name refers to, for comparing places; nothing is read."""
    repo = hub_id(name)
    return f"hf://{repo}" if repo else name


def cache() -> Path:
    """The folder for downloads and for outputs in progress: SPAP_CACHE, or the user's cache."""
    named = os.environ.get("SPAP_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spap"
    return (Path(named) if named else usual).expanduser().absolute()


def beside(output: str | Path, role: str) -> str:
    """The hidden name, next to an output at a path or address, of a folder that belongs to it.

    Roles are "resume", of an unfinished run, and "partial-" or "replaced-" with eight hexadecimal digits, of a folder
    that is not yet, or no longer, in its place.
    """
    parent, slash, name = str(output).rstrip("/").rpartition("/")
    return f"{parent}{slash}.{name}.{role}"


def real_path(name: str | Path) -> Path:
    """The absolute path of a name, with all links resolved; it does not have to exist."""
    return Path(os.path.realpath(os.path.expanduser(name)))


def is_within(inner: str | Path, outer: str | Path) -> bool:
    """Whether a path or address is the same as another one or inside it.

    Existing folders are also compared by device and inode, for folders mounted twice and disks that ignore case.
    """
    return bool(_identities(outer)[0] & set().union(*_identities(inner)))


def check_apart(output: str | Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Rejects an output that has no usable name, or that would destroy an input of the command.

    Args:
        output: A path or an address; it does not have to exist yet.
        inputs: Paths or addresses that the command reads, by their roles, such as "the model"; None if it is no file.

    Raises:
        UserError: The name is not usable, or the output overlaps an input.
    """
    check_name(output)
    for role, name in inputs.items():
        if name is None:
            continue
        inside, around = is_within(output, name), is_within(name, output)
        if inside or around:
            how = f"is {role}" if inside and around else f"{'lies inside' if inside else 'contains'} {role}"
            raise UserError(f"the output {output} {how} {name}: name another place for the output.")


def check_name(output: str | Path) -> None:
    """Rejects an output without a usable name.

    Raises:
        UserError: It is empty, the root of a file system, on the hub, or has ".." or a pattern.
    """
    text = str(output)
    if not text.strip():
        raise UserError("the output has no name: name the folder to write.")
    if is_address(output):
        parts = text.rstrip("/").split("/")
        if text.lower().startswith("hf://"):
            raise UserError(f"{output} is on the hub: write a folder here, and publish it by `spap push`.")
        if parts[-1] in (".", "..") or {".", ".."} & set(parts[3:]):
            raise UserError(f"{output} has a part . or .., which no store resolves: write out the address.")
        if set("*?[") & set(text):
            raise UserError(f"{output} holds a *, ? or [, with which clients of stores mean many files: write another.")
        if len(parts) < 4:
            raise UserError(f"{output} names no folder in a bucket: add one, as in gs://bucket/pruned.")
    else:
        parts = real_path(output).parts
        if len(parts) == 1:
            raise UserError(f"the output {output} is the root of a file system: name a folder in it.")


def _identities(name: str | Path) -> list[set[object]]:
    """The identities of a place, followed by those of each folder that contains it."""
    if is_address(name):
        scheme, _, rest = str(name).partition("://")
        scheme = _SCHEMES.get(scheme.lower(), scheme.lower())
        if scheme != "file":
            # The hub ignores case in names; stores do not.
            parts = [part for part in (rest.lower() if scheme == "hf" else rest).split("/") if part]
            return [{(scheme, *parts[:end])} for end in range(len(parts), -1, -1)]
        name = rest
    path = real_path(name)
    return [_identity(each) for each in (path, *path.parents)]


def _identity(path: Path) -> set[object]:
    try:
        about = path.stat()
    except OSError:  # it does not exist, or is not accessible
        return {path}
    return {path, (about.st_dev, about.st_ino)}
