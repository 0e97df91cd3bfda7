"""Where an output may be written, and how it gets its place: a folder is complete or absent, and lists its files.

It is made beside its place, under a hidden name. A folder that it replaces is moved there before, and removed after.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from spap_jax.checkpoint.folders import NEW, LocalFolder, disk_errors, folder_at, sync
from spap_jax.errors import UserError, option
from spap_jax.memory import free_disk
from spap_jax.quantities import bytes_text
from spap_jax.storage.files import Folder
from spap_jax.storage.location import beside, check_apart, is_address, real_path

RUN = "run.json"
"""The file with the identity of an unfinished run."""

MANIFEST = "spap_files.json"
"""The list of the files that this program wrote into a folder, so that nothing else is ever replaced.

It is a JSON object with the size of each file, except itself, by its path below the folder.
"""

_SHOWN = 3
"""Number of files of another origin that an error names."""

_KEPT = re.compile(
    rf"({RUN}|decided\.json|outer\.safetensors|(block|joint|beside)-\d+\.safetensors)({re.escape(NEW)})?"
    r"|(state|output|replaced)/.*"
)
"""Matches the names of the files of an unfinished run; see `store`."""


def resume_folder(output: str | Path) -> LocalFolder | Folder:
    """The folder in which an unfinished run into an output is kept."""
    return folder_at(beside(output if is_address(output) else real_path(output), "resume"))


def check_output(
    output: str | Path,
    overwrite: bool = False,
    needed: int = 0,
    *,
    inputs: Mapping[str, str | Path | None],
    resume: bool = False,
) -> None:
    """Checks an output before any work.

    Args:
        needed: Bytes that will be written, if known.
        inputs: Inputs of the output, which it must not touch; see `check_apart`.
        resume: Whether an interrupted run is resumed, whose finished output may be there.

    Raises:
        UserError: The output touches an input, may not be replaced, or has no room; or its resume folder has other
            files.
    """
    check_apart(output, inputs)
    kept = resume_folder(output)
    if isinstance(kept, LocalFolder):
        check_room(output, needed)
    if others := [name for name in kept.sizes() if not _KEPT.fullmatch(name)]:
        raise UserError(
            f"{kept.address}, where an unfinished run is kept, holds {others[0]}, which no run left there: move it "
            "away, or name another output."
        )
    if not (resume and kept.read(RUN) is not None):
        check_place(output, overwrite)


def manifest_text(sizes: Mapping[str, int]) -> str:
    """The text of a manifest of files of these sizes."""
    return json.dumps({name: sizes[name] for name in sorted(sizes) if name != MANIFEST}, indent=1) + "\n"


def parse_manifest(content: bytes | None) -> dict[str, int]:
    """The sizes in a manifest by name; empty if it is not valid."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def check_place(output: str | Path, overwrite: bool) -> None:
    """Refuses to replace a file, or a folder unless that was asked for and its manifest names all files in it.

    Raises:
        UserError: The output is there and may not be replaced.
    """
    folder = folder_at(output if is_address(output) else real_path(output))
    sizes = folder.sizes()
    if "" in sizes:
        raise UserError(f"{output} is a file and the output is a folder: name another place.")
    if sizes and not overwrite:
        raise UserError(f"{output} exists: name another folder, or pass {option('overwrite', True)} to replace it.")
    listed = parse_manifest(folder.read(MANIFEST)) if sizes else {}
    if listed:
        sizes.pop(MANIFEST, None)
    if others := sorted(name for name, size in sizes.items() if listed.get(name) != size):
        shown = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
        raise UserError(
            f"{output} is not overwritten, because it holds files that spap did not write or that have another size "
            f"({shown}): name another folder, or move them out of it."
        )


def put_in_place(made: Path, output: Path, replaced: Path, overwrite: bool) -> None:
    """Renames a finished folder to its place; one that is there is first moved to ``replaced``, on the same disk.

    Raises:
        UserError: Something is there that may not be replaced.
    """
    check_place(output, overwrite)  # something may have come there meanwhile
    try:
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        try:
            made.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
    except OSError as error:  # a mounted disk, for example
        raise UserError(f"{output} cannot be written ({error.strerror}): name another place.") from error
    sync(output.parent)


def fill(address: str, sizes: Mapping[str, int], send: Callable[[str, Folder], None], overwrite: bool) -> None:
    """Fills a folder at an address, where nothing can be renamed: the manifest comes first and config.json last.

    So a folder with a config.json is complete, and files of an attempt that failed are known as ours.

    Args:
        send: Copies or uploads the file of a name to the folder.

    Raises:
        UserError: Something is there that may not be replaced, or the store fails.
    """
    target = Folder(address)
    listed = parse_manifest(target.read(MANIFEST)) == sizes  # an earlier process has begun
    if not listed:
        check_place(address, overwrite)
    target.remove(["config.json"])
    if not listed:
        target.remove(target.sizes().keys() - {MANIFEST})
        target.write(MANIFEST, manifest_text(sizes).encode())
    for name in sorted(sizes, key=lambda name: name == "config.json"):
        send(name, target)


@contextlib.contextmanager
def new_folder(output: str | Path, overwrite: bool, needed: int, source: Path | None) -> Iterator[Path]:
    """Yields an empty folder that becomes the output if the block succeeds, and is removed if it raises.

    Args:
        output: A path, or an address to which the folder is uploaded.
        source: The checkpoint folder that its content comes from, if any.

    Raises:
        UserError: See `check_output`.
    """
    check_output(output, overwrite, needed, inputs={"the model": source})
    if is_address(output):
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
            made = LocalFolder(Path(temporary))
            fill(str(output), made.sizes(), lambda name, place: place.put(name, made.path / name), overwrite)
        return
    target = real_path(output)
    hidden = Path(beside(target, f"partial-{secrets.token_hex(4)}"))
    made = hidden / "output"
    try:
        with disk_errors(target):
            made.mkdir(parents=True)
            yield made
            (made / MANIFEST).write_text(manifest_text(LocalFolder(made).sizes()))
            for parent, _, files in os.walk(made):
                for path in (Path(parent), *(Path(parent, name) for name in files)):
                    sync(path)
        put_in_place(made, target, hidden / "replaced", overwrite)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def check_room(output: str | Path, needed: int) -> None:
    """Checks that a folder can be made at a path and beside it, on a disk with room; nothing is made.

    Raises:
        UserError: It cannot.
    """
    target = real_path(output)
    parent = next(folder for folder in target.parents if os.path.exists(folder))
    if not os.access(parent, os.W_OK):
        raise UserError(f"{target} cannot be made in {parent} ({os.strerror(errno.EACCES)}): name another place.")
    free = free_disk(parent)
    if free < needed:
        raise UserError(
            f"the disk of {parent} has {bytes_text(free)} free and {target.name} needs {bytes_text(needed)}: free some "
            "space, or name a place on another disk."
        )
