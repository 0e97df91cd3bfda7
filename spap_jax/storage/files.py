"""Files at an address, such as gs://bucket/folder; the only module that uses fsspec.

Most files are downloaded before they are read, into a cache folder that is complete or absent and is reused as long as
the store reports the same of the files. Of large files, ranges of bytes can be read. Stores have no rename: code that
makes a folder there has to choose which file comes last.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spap_jax.errors import UserError, without_password
from spap_jax.memory import free_disk
from spap_jax.quantities import bytes_text
from spap_jax.storage.hub import first_line

_HUB = "hf://"

_ATTEMPTS = 3
"""How often a range is asked for; the clients of stores also repeat single requests, and wait in between."""

_PATIENCE = 600
"""Seconds after which a request to Google's store, of at most 50 MB, counts as failed."""

_DISKS = ("file", "local")
"""Kinds of addresses that are folders on a disk."""

About = dict[str, Any]
"""A store's information on a file: its size, and what distinguishes it from an older version."""


def _lasting(about: About) -> About:
    """Leaves out what a store changes by itself, such as the class of storage, to which reading a file may move it.

    On Google's, all but the file's generation changes with it. An address that leads to another one may lead to one
    that holds the time of day.
    """
    if "generation" in about:
        return {key: about[key] for key in ("name", "size", "type", "generation")}
    return {key: value for key, value in about.items() if key not in ("StorageClass", "url")}


class Span(NamedTuple):
    """A range of bytes of a file, which is not empty."""

    name: str
    start: int
    stop: int


def is_address(name: str | Path) -> bool:
    """Whether a name is an address rather than a path or a hub id: it begins like gs:// or hf://."""
    return isinstance(name, str) and re.match(r"[a-zA-Z][\w+.-]*://", name) is not None


def hub_id(name: str | Path) -> str | None:
    """The part after hf:// in an address of the Hugging Face Hub; None for every other name."""
    return name.removeprefix(_HUB).rstrip("/") if isinstance(name, str) and name.startswith(_HUB) else None


def base_name(place: str | Path) -> str:
    """The public name of a path or an address: its last part, without the folders above it."""
    if is_address(place):
        return without_password(str(place)).rstrip("/").rpartition("/")[2]
    return os.path.basename(os.path.abspath(os.path.expanduser(place)))  # of "." too; a link keeps its own name


def working_folder(address: str) -> Path:
    """The local folder in which the output for an address is made; its name is the last part of the address."""
    address = address.rstrip("/")
    return _cache() / "outputs" / _hash(address) / address.rpartition("/")[2]


def read_note(folder: Path, name: str) -> str | None:
    """A note in a cache folder; None if there is none, or for other folders, whose files come from anywhere."""
    place = Path(os.path.realpath(folder))
    is_ours = place.parent == Path(os.path.realpath(_downloads())) and (place / name).is_file()
    return (place / name).read_text(encoding="utf-8") if is_ours else None


def fetch_file(address: str) -> Path:
    """A local copy of a file, downloaded if it is not in the cache.

    Raises:
        UserError: The file does not exist, or the store or the disk fails.
    """
    parent, _, name = address.rpartition("/")
    folder = Folder(parent)
    return folder.fetch({name: folder.about(name)}) / name


class Folder:
    """A folder at an address; names of files are relative to it.

    Every method, except the constructor, raises UserError if the store fails.

    Attributes:
        address: The address, without a trailing slash.
    """

    def __init__(self, address: str):
        """Opens the file system of the address; does not access the store.

        Raises:
            UserError: The address cannot be opened, or a package for it is not installed.
        """
        from fsspec.core import url_to_fs

        self.address = without_password(address.rstrip("/"))
        kind = self.address.partition(":")[0].lower()
        try:
            self._store, self._root = url_to_fs(address.rstrip("/"), **_options(kind))
        except ImportError as error:
            raise UserError(
                f"{address} needs a package that is not installed ({first_line(error)}): "
                "pip install 'spap-jax[remote]' installs those for gs:// and s3://."
            ) from error
        except Exception as error:  # an unknown kind of address, or no login
            raise UserError(
                f"{address} cannot be opened ({first_line(error)}): check the address and the login."
            ) from error

    def files(self) -> dict[str, About]:
        """All files in the folder, at any depth; if the address is a file, one with an empty name."""
        found = {}
        with self._failing("read"), contextlib.suppress(FileNotFoundError):
            self._store.invalidate_cache()
            found = self._store.find(self._root, detail=True, **_how_to_list(self._store))
        # Some stores represent an empty folder by a name that ends in a slash, which is not a file.
        there = [path for path in found if not path.endswith("/")]
        return {path.removeprefix(self._root).lstrip("/"): _lasting(found[path]) for path in there}

    def about(self, name: str) -> About:
        """The store's information on one file."""
        with self._failing("read", name):
            self._store.invalidate_cache()
            return _lasting(self._store.info(self._path(name)))

    def read(self, name: str) -> bytes | None:
        """Reads a file; None if it does not exist."""
        with self._failing("read", name):
            try:
                return self._store.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def ranges(self, spans: Sequence[Span]) -> list[bytes]:
        """Reads ranges of bytes, several at once if the store's client can; what fails is asked for again.

        Raises:
            UserError: The store fails repeatedly, or a file is shorter.
        """
        found: dict[Span, bytes] = {}
        failed: dict[Span, Exception] = {}
        for _ in range(_ATTEMPTS):
            left = [span for span in spans if span not in found]
            contents = self._asked(left)
            found |= {span: each for span, each in zip(left, contents, strict=True) if isinstance(each, bytes)}
            failed = {span: each for span, each in zip(left, contents, strict=True) if isinstance(each, Exception)}
            if not failed:
                break
        for span, error in failed.items():
            with self._failing("read", span.name):
                raise error
        return [found[span] for span in spans]

    def _asked(self, spans: Sequence[Span]) -> list[bytes | Exception]:
        """Asks for ranges once: the bytes of each, or what went wrong."""
        paths = [self._path(span.name) for span in spans]
        try:
            contents = self._store.cat_ranges(paths, [span.start for span in spans], [span.stop for span in spans])
        except Exception as error:
            return [error] * len(spans)
        return [_complete(span, content) for span, content in zip(spans, contents, strict=True)]

    def write(self, name: str, content: bytes) -> None:
        """Creates or replaces a file."""
        with self._failing("written", name):
            self._store.pipe_file(self._path(name), content)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files that exist; one that is gone meanwhile is no error."""
        if paths := [self._path(name) for name in names]:
            with self._failing("written"):
                try:
                    self._store.rm(paths)
                except FileNotFoundError:  # one of them, after which others may be left
                    for path in paths:
                        with contextlib.suppress(FileNotFoundError):
                            self._store.rm(path)

    def clear(self) -> None:
        """Removes everything in the folder, if there is anything."""
        with self._failing("written"), contextlib.suppress(FileNotFoundError):
            self._store.invalidate_cache()
            self._store.rm(self._root, recursive=True)

    def put(self, files: Mapping[str, Path], quietly: bool = False) -> None:
        """Uploads files under the given names, with a progress bar on a terminal unless ``quietly``."""
        size = sum(file.stat().st_size for file in files.values())
        with self._failing("written"), _bar(f"to {self.address}", size, quietly) as callback:
            self._store.put([str(file) for file in files.values()], list(map(self._path, files)), callback=callback)

    def get(self, sizes: Mapping[str, int | None], into: Path) -> None:
        """Downloads files into a local folder, with a progress bar on a terminal if their sizes are known.

        Args:
            sizes: Bytes of each file by name; None if they are not known.
            into: The folder.

        Raises:
            UserError: A name points outside of the local folder, or a file arrived in another size.
        """
        local, size = {name: into / name for name in sizes}, sum(each or 0 for each in sizes.values())
        for name, file in local.items():
            if ".." in Path(name).parts:
                raise UserError(f"{self.address} holds a file {name}, whose name leads out of its folder: remove it.")
            file.parent.mkdir(parents=True, exist_ok=True)
        with self._failing("read"), _bar(f"from {self.address}", size, not size) as callback:
            self._store.get(list(map(self._path, local)), list(map(str, local.values())), callback=callback)
        for name, size in sizes.items():
            if size not in (None, local[name].stat().st_size):
                raise UserError(f"{self.address}/{name} was not downloaded completely: try again.")

    def fetch(self, files: Mapping[str, About], notes: Mapping[str, str] | None = None) -> Path:
        """Returns the cache folder with these files, which are downloaded if it does not exist.

        Args:
            files: What the store says of each file, by name.
            notes: Texts of further files, which this program writes into the folder.
        """
        told = json.dumps({"": self.address, **files, **(notes or {})}, sort_keys=True, default=str)
        target = _downloads() / _hash(told)
        if target.is_dir():
            if _is_whole(target, files, notes or {}):
                return target
            shutil.rmtree(target)  # whoever cleaned up old files left a part of it
        partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.mkdir(0o700, parents=True)  # a note may need the password in an address
            size = sum(about["size"] or 0 for about in files.values())
            free = free_disk(partial)
            if free < size:
                raise UserError(
                    f"{self.address} holds {bytes_text(size)} and the disk of {target.parent} has "
                    f"{bytes_text(free)} free: free some space, or name a folder on another disk in SPAP_CACHE."
                )
            self.get({name: about["size"] for name, about in files.items()}, partial)
            for name, text in (notes or {}).items():
                (partial / name).write_text(text, encoding="utf-8")
            _take_place(partial, target)
        except OSError as error:
            raise UserError(
                f"{target.parent} cannot be written ({first_line(error)}): name another in SPAP_CACHE."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _failing(self, done: str, name: str = "") -> Iterator[None]:
        """Turns whatever the client of a store raises into a `UserError` of one sentence."""
        try:
            yield
        except Exception as error:
            what = f"{self.address}/{name}".rstrip("/")
            said = "it is not there" if isinstance(error, FileNotFoundError) else first_line(error)
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk filled up while {what} was {done}: free some space, or name a folder on another disk in "
                    "SPAP_CACHE."
                ) from error
            raise UserError(
                f"{what} cannot be {done} ({said}): check the address, the login and the network."
            ) from error


def _options(kind: str) -> dict[str, Any]:
    """Options for the client of a kind of address: most would wait without end for a store that went silent."""
    if kind in _DISKS:
        return {"auto_mkdir": True}  # a store would take this for a request to make a bucket
    if kind in ("gs", "gcs"):
        return {"requests_timeout": _PATIENCE}
    if kind in ("http", "https"):
        from aiohttp import ClientTimeout

        # By default a file has to arrive within five minutes.
        return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
    return {}


def _how_to_list(store: Any) -> dict[str, Any]:
    """Options for the listing of files: fsspec's own way, which some clients have, leaves out what it fails to list."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    kind = type(store)
    takes = kind.find is AbstractFileSystem.find and getattr(kind, "_find", None) in (None, AsyncFileSystem._find)
    return {"on_error": "raise"} if takes else {}


def _is_whole(folder: Path, files: Mapping[str, About], notes: Mapping[str, str]) -> bool:
    """Whether a folder has all of these files, in the sizes that the store says."""
    sizes = {name: (folder / name).stat().st_size for name in [*files, *notes] if (folder / name).is_file()}
    return len(sizes) == len(files) + len(notes) and all(
        about["size"] in (None, sizes[name]) for name, about in files.items()
    )


def _complete(span: Span, content: Any) -> bytes | Exception:
    """The bytes of a range, or the error that came in their place, or that some are missing."""
    if isinstance(content, Exception) or len(content) == span.stop - span.start:
        return content
    return OSError(f"{len(content)} of {span.stop - span.start} bytes arrived")


def _take_place(partial: Path, target: Path) -> None:
    """Renames a finished folder, unless another process was faster."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextlib.contextmanager
def _bar(what: str, size: int, quietly: bool) -> Iterator[Any]:
    """A callback for fsspec that advances one bar by the bytes of all files; it is not shown without a terminal."""
    from fsspec.callbacks import Callback
    from tqdm import tqdm

    class Bytes(Callback):
        """Callback of one file; that of the whole transfer counts files and is not shown."""

        def call(self, *_: Any, **__: Any) -> None:
            bar.update(self.value - self.kw.get("told", 0))
            self.kw["told"] = self.value

    class Files(Callback):
        def branched(self, *_: Any, **__: Any) -> Callback:
            return Bytes()

    with tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=quietly or None) as bar:
        yield Files()
        bar.update(size - bar.n)  # not every store reports progress


def _cache() -> Path:
    """The folder for downloads and outputs in progress: SPAP_CACHE, or the user's cache."""
    named = os.environ.get("SPAP_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spap"
    return (Path(named) if named else usual).expanduser().absolute()


def _downloads() -> Path:
    return _cache() / "downloads"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
