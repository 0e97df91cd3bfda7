"""Output folders that are complete or absent: written next to their place under a hidden name, then renamed.

The output for an address is first made in a local working folder, in the same way, and then uploaded. A process that is
killed leaves its hidden folder `.NAME.partial-XXXXXXXX` behind; nothing reads it and it may be deleted. If pruning can
be resumed (`unfinished.py`), the hidden folder is inside the resume folder.

A folder that is replaced is first moved aside, to `.NAME.replaced-XXXXXXXX`. The next run into the same place moves it
back if the process was killed before the new one was in place, and otherwise removes what is left of it. Only files
that this program wrote are ever removed (`manifest.py`).
"""

import contextlib
import errno
import glob
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from spap_jax.checkpoint.lock import locked
from spap_jax.checkpoint.manifest import MANIFEST, check_replaceable, read_manifest, sort_files, write_manifest
from spap_jax.checkpoint.publish import check_place, publish
from spap_jax.errors import UserError, first_line, warn
from spap_jax.memory import free_disk
from spap_jax.storage.location import beside, check_apart, is_address, is_within, real_path, working_folder

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""What file systems say that cannot sync a folder."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(
    path: str | Path,
    overwrite: bool = False,
    needed: int = 0,
    *,
    inputs: Mapping[str, str | Path | None],
    begun: Callable[[], bool] | None = None,
) -> Path:
    """Checks an output before hours of work, and returns the absolute path of its folder.

    Args:
        path: Output folder: a path, or an address, for which a local folder is made first.
        overwrite: Whether an existing folder that holds only files that this program wrote may be replaced.
        needed: Number of bytes that will be written, if known.
        inputs: Inputs of the output, which it must not touch; see `check_apart`.
        begun: Returns whether an interrupted run is resumed, whose finished output may exist; it is called once the
            name is known to be usable.

    Raises:
        UserError: The output would touch an input, something exists there that may not be replaced, the folder cannot
            be made, or the disk has no room.
    """
    check_apart(path, inputs)
    target = real_path(working_folder(str(path)) if is_address(path) else path)
    _check_makeable(target)
    _check_room(target, needed)
    _put_back(target)
    if begun is None or not begun():
        if is_address(path):
            check_place(str(path), overwrite)
        _check_replaceable(target, overwrite or is_address(path))
    return target


@contextlib.contextmanager
def new_folder(
    path: str | Path,
    overwrite: bool = False,
    needed: int = 0,
    partial: Path | None = None,
    *,
    source: Path | None,
) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` if the block succeeds, and is removed if it raises.

    Args:
        path: Output folder: a path, or an address.
        overwrite: Whether an existing folder that holds only files that this program wrote may be replaced.
        needed: Number of bytes that will be written, if known.
        partial: Its path until then, on the same disk and not used by anything else; by default, a new one next to it.
        source: The checkpoint folder that its content comes from, if any.

    Raises:
        UserError: See `check_output`; or the disk filled up while the block was writing, or the folder could not be
            uploaded to its address and is complete in the working folder, or another process makes an output for the
            same address.
    """
    target = check_output(path, overwrite, needed, inputs={"the model": source})
    partial = partial or _beside(target, "partial")
    if not is_address(path):
        with _in_place(target, partial, overwrite, needed):
            yield partial
        return
    with locked(target.with_name(f".{target.name}.lock"), f"on this machine writes {path}"):
        with _in_place(target, partial, True, needed):
            yield partial
        _send(target, str(path), overwrite)


@contextlib.contextmanager
def _in_place(target: Path, partial: Path, overwrite: bool, needed: int) -> Iterator[None]:
    """Makes an empty folder, which is put in its place if the block succeeds, and removed if it raises."""
    with _disk_errors(target, partial, needed):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)  # left by a process that was killed
            partial.mkdir()
            yield
            write_manifest(partial)
            _flush(partial)
            _put_in_place(partial, target, overwrite)
        except BaseException:
            _remove(partial)
            raise


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuses to replace anything in an output's place, unless that was asked for and loses no other files."""
    if not os.path.lexists(target):
        return
    if target.is_symlink():  # links were resolved, so this one leads back to itself
        raise UserError(f"{target} is a link that leads nowhere: name another place.")
    if not target.is_dir():
        raise UserError(f"{target} is a file and the output is a folder: name another place.")
    if is_within(os.curdir, target):
        raise UserError(
            f"{target} is the folder that this command runs in, or contains it, so it cannot be replaced: name a new "
            "folder in it, or run the command from another folder."
        )
    if target.is_mount():
        raise UserError(f"{target} is a mounted disk, which cannot be replaced: name a new folder in it.")
    check_replaceable(target, overwrite, sort_files(target)[1])


def _check_makeable(target: Path) -> None:
    """Checks that folders with the needed names can be made and renamed, by doing so in a temporary folder.

    Some file systems rename no folder that holds files, as a bucket that is mounted.
    """
    parent = next(folder for folder in target.parents if os.path.exists(folder))
    if not parent.is_dir():
        raise UserError(f"{target} cannot be made because {parent} is a file: name another place.")
    try:
        with tempfile.TemporaryDirectory(prefix=".spap-", dir=parent) as probe:
            made = Path(probe, _beside(target, "replaced").relative_to(parent))
            made.mkdir(parents=True)
            (made / MANIFEST).touch()
            made.rename(made.with_name(target.name))
    except OSError as error:
        raise UserError(f"{target} cannot be made in {parent} ({error.strerror}): name another place.") from error


def _check_room(target: Path, needed: int) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    free = free_disk(parent)
    if free < needed:
        raise UserError(
            f"the disk of {parent} has {_size(free)} free and {target.name} needs {_size(needed)}: "
            "free some space, or name a place on another disk."
        )


@contextlib.contextmanager
def _disk_errors(target: Path, partial: Path, needed: int) -> Iterator[None]:
    """Turns errors of a full or failing disk into a `UserError` of one sentence; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        need = f" (it needs {_size(needed)})" if needed else ""
        if is_full(error):
            raise UserError(
                f"the disk of {target.parent} filled up, or a limit of it was reached, while {target.name} was written"
                f"{need}: free some space, or name a place on another disk."
            ) from error
        file = str(getattr(error, "filename", None) or "")
        if file.startswith((str(partial), str(target))) or (file and Path(file) in target.parents):
            raise UserError(f"{target} cannot be written ({first_line(error)}): name another place.") from error
        raise


def is_full(error: Exception) -> bool:
    """Whether the disk is full; the writers of safetensors and Orbax say so only in their messages."""
    text = str(error)
    return getattr(error, "errno", None) in _FULL or any(os.strerror(code) in text for code in _FULL)


def _beside(target: Path, role: str) -> Path:
    return Path(beside(target, f"{role}-{secrets.token_hex(4)}"))


def _remove(folder: Path) -> None:
    """Removes a folder that may still be written to: if one of Orbax's writers fails, the others go on for a while."""
    for _ in range(100):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def _flush(folder: Path) -> None:
    """Syncs every file and folder to disk before the rename makes them visible."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def sync(path: Path) -> None:
    """Waits until a file is on the disk, or a folder if its file system can tell."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def _send(made: Path, address: str, overwrite: bool) -> None:
    """Uploads a finished folder to its address, and then removes the local one."""
    try:
        publish(made, address, overwrite)
    except (UserError, KeyboardInterrupt) as error:
        words = ["spap", "push", str(made), address, *["--overwrite"] * overwrite]
        raise type(error)(
            f"{str(error).rstrip('.') or 'interrupted'}; the checkpoint is complete on this machine, and "
            f"`{shlex.join(words)}` goes on from there."
        ) from error
    shutil.rmtree(made)


def _put_in_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Renames the finished folder to its place; an existing one is moved aside first and removed afterwards."""
    old = _beside(target, "replaced")
    _check_replaceable(target, overwrite)  # something may have been created there meanwhile
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    for folder in _moved_aside(target):
        _clear(folder)


def _put_back(target: Path) -> None:
    """Moves a folder back that a process moved aside, if it was killed before the new one was in place.

    One from which files are gone counts as one that was being removed, when the new one was there.
    """
    aside = [] if os.path.lexists(target) else _moved_aside(target)
    if aside and all((aside[-1] / name).exists() for name in (MANIFEST, *read_manifest(aside[-1]))):
        aside[-1].rename(target)


def _moved_aside(target: Path) -> list[Path]:
    """The folders that were moved aside from a place, the latest last."""
    found = target.parent.glob(f"{glob.escape(beside(target.name, 'replaced-'))}*")
    return sorted(found, key=lambda folder: folder.stat().st_ctime_ns)


def _clear(folder: Path) -> None:
    """Removes the files that this program wrote, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):  # what could not be removed is reported below
        for name in sort_files(folder)[0]:
            (folder / name).unlink()
        for parent, _, _ in os.walk(folder, topdown=False):
            os.rmdir(parent)
    if folder.exists():
        warn(f"what was replaced could not be removed whole: delete {folder} if you do not need it.")


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
