"""Folders on a disk, with the methods of `Folder`, which is one at an address.

Names are relative to the folder. A file is complete or absent, however the process ends.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from spap_jax.errors import UserError
from spap_jax.storage.files import Folder
from spap_jax.storage.location import is_address

NEW = ".new"
"""Suffix of a file that is not completely written yet."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Error numbers of file systems that cannot sync a folder."""


class LocalFolder:
    """A folder on a disk."""

    def __init__(self, path: Path):
        """Names the folder, which does not have to exist."""
        self.path = path
        self.address = str(path)

    def sizes(self) -> dict[str, int]:
        """The size of every file at any depth by name, without following links; the name is empty if the place is a
        file. Files that another thread or process renames meanwhile may be left out.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            return {"": self.path.lstat().st_size}
        found = {}
        for parent, folders, files in os.walk(self.path, onerror=_raise_unless_absent):
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
            for path in (Path(parent, name) for name in [*files, *links]):
                with contextlib.suppress(FileNotFoundError):
                    found[path.relative_to(self.path).as_posix()] = path.lstat().st_size
        return found

    def read(self, name: str) -> bytes | None:
        """Reads a file; None if it does not exist."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Creates or replaces a file; when it returns, the file is on the disk.

        Raises:
            UserError: The disk is full.
        """
        path = self.path / name
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_name(f"{path.name}{NEW}")
            written.write_bytes(content)
            sync(written)
            written.rename(path)
            sync(path.parent)

    def entries(self) -> set[str]:
        """The names of the files and folders in the folder."""
        return {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()

    def remove(self, names: Iterable[str]) -> None:
        """Removes files and folders that exist."""
        for path in (self.path / name for name in names):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): name another place.") from error


def folder_at(place: str | Path) -> LocalFolder | Folder:
    """The folder at a path or an address."""
    return Folder(str(place)) if is_address(place) else LocalFolder(Path(place))


def sync(path: Path) -> None:
    """Waits until a file is on the disk, or a folder if its file system can tell."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the error of a full disk into a UserError; other errors pass."""
    try:
        yield
    except Exception as error:  # the writers of safetensors and Orbax say it only in their messages
        if getattr(error, "errno", None) in _FULL or any(os.strerror(code) in str(error) for code in _FULL):
            raise UserError(
                f"the disk of {path.parent} filled up, or a limit of it was reached, while {path.name} was written: "
                "free some space, and repeat the command."
            ) from error
        raise
