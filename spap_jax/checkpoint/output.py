"""Output folders that are complete or absent: written beside their place under a hidden name, then renamed.

What is to be at an address is made in a working folder on this machine first, in the same way, and then sent there.
A process that is killed leaves its hidden folder `.NAME.partial-XXXXXXXX` behind; nothing reads it and it may
be deleted. Where pruning can go on later (`resume.py`), the hidden folder is in that of what it goes on from.
"""

import contextlib
import errno
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from spap_jax.checkpoint.publish import check_place, check_replaceable, describes_model, publish
from spap_jax.errors import UserError
from spap_jax.hub import first_line
from spap_jax.remote import hub_id, is_address, working_folder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: str | Path, overwrite: bool = False, needed: int = 0) -> Path:
    """The absolute path of an output folder, after checks that are worth making before hours of work.

    Args:
        path: Where the folder is to be: a path, or an address, whose folder is made on this machine first.
        overwrite: Whether a checkpoint that is there may be replaced.
        needed: Bytes that will be written, if known.

    Raises:
        UserError: Something is there that may not be replaced, the folder cannot be made, or the disk has no room.
    """
    if is_address(path):
        check_place(str(path), overwrite)
        path, overwrite = working_folder(str(path)), True
    target = Path(path).expanduser().resolve()
    if target.exists():
        _check_replaceable(target, overwrite)
    _check_parent(target)
    _check_room(target, needed)
    return target


@contextlib.contextmanager
def new_folder(
    path: str | Path, overwrite: bool = False, needed: int = 0, partial: Path | None = None
) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` if the block ends well, and is removed if it raises.

    Args:
        path: Where the folder is to be: a path, or an address.
        overwrite: Whether a checkpoint that is there may be replaced.
        needed: Bytes that will be written, if known.
        partial: Its name until then, on the same disk, which nobody else uses; a new one beside it where absent.

    Raises:
        UserError: See `check_output`; or the disk filled up while the block was writing, or the folder, which is then
            complete in its working folder, could not be sent to its address.
    """
    target = check_output(path, overwrite, needed)
    partial = partial or _beside(target, "partial")
    with _disk_errors(target, partial, needed):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)  # of a process that was killed
            partial.mkdir()
            yield partial
            _flush(partial)
            _put_in_place(partial, target, overwrite or is_address(path))
        except BaseException:
            _remove(partial)
            raise
    if is_address(path):
        _send(target, str(path), overwrite)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder's config.json is that of a model."""
    try:
        return describes_model((folder / "config.json").read_bytes())
    except OSError:
        return False


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.is_dir():
        raise UserError(f"{target} is a file and the output is a folder: name another place.")
    check_replaceable(target, overwrite, lambda: not any(target.iterdir()) or is_checkpoint(target))


def _check_parent(target: Path) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{target} cannot be made because {parent} is a file: name another place.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{target} cannot be made because {parent} is not writable: name another place.")


def _check_room(target: Path, needed: int) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    disk = shutil.disk_usage(parent)
    if disk.total and disk.free < needed:  # some network file systems report a size of 0
        raise UserError(
            f"the disk of {parent} has {_size(disk.free)} free and {target.name} needs {_size(needed)}: "
            "free some space, or name a place on another disk."
        )


@contextlib.contextmanager
def _disk_errors(target: Path, partial: Path, needed: int) -> Iterator[None]:
    """Turns what a full or failing disk raises into one sentence; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        need = f" (it needs {_size(needed)})" if needed else ""
        if _is_full(error):
            raise UserError(
                f"the disk of {target.parent} filled up, or a limit of it was reached, while {target.name} was written"
                f"{need}: free some space, or name a place on another disk; nothing unfinished was left behind."
            ) from error
        file = str(getattr(error, "filename", None) or "")
        if file.startswith((str(partial), str(target))) or (file and Path(file) in target.parents):
            raise UserError(f"{target} cannot be written ({first_line(error)}): name another place.") from error
        raise


def _is_full(error: Exception) -> bool:
    """Whether the disk is full; the writers of safetensors and Orbax say so in words of their own."""
    text = str(error)
    return getattr(error, "errno", None) in _FULL or any(os.strerror(code) in text for code in _FULL)


def _beside(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{secrets.token_hex(4)}")


def _remove(folder: Path) -> None:
    """Removes a folder that writers may still fill: when one of Orbax's fails, the others go on for a while."""
    for _ in range(100):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def _flush(folder: Path) -> None:
    """Has the disk hold every file and folder before the rename makes them visible."""
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _send(made: Path, address: str, overwrite: bool) -> None:
    """Sends a finished folder to its address, after which it is there alone."""
    try:
        publish(made, address)
    except UserError as error:
        place = hub_id(address) or address
        words = ["spap", "push", str(made), place, *["--overwrite"] * (overwrite and place == address)]
        raise UserError(
            f"{str(error).rstrip('.')}; the checkpoint is complete on this machine, and `{shlex.join(words)}` goes on "
            "from there."
        ) from error
    shutil.rmtree(made)


def _put_in_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Renames the finished folder onto its place; what was there is moved aside first and removed afterwards."""
    old = _beside(target, "replaced")
    if target.exists():
        _check_replaceable(target, overwrite)  # something may have appeared there meanwhile
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
