"""Files at addresses, by fsspec, which no other module uses, and on the Hugging Face Hub.

Downloads are complete or absent, and are reused as long as the store reports the same of the files. Stores have no
rename: code that makes a folder there has to choose which file comes last. The hub's own clients retry for half a
minute without a network; here the cache is asked first, and then whether the hub answers at all.
"""

import contextlib
import errno
import hashlib
import json
import re
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from spap_jax.errors import UserError, first_line, without_password
from spap_jax.memory import free_disk
from spap_jax.quantities import bytes_text
from spap_jax.storage.location import cache

_ATTEMPTS = 3
"""How often a range is asked for; the clients of stores also repeat single requests, and wait in between."""

_PATIENCE = 600
"""Seconds after which a request to Google's store, of at most 50 MB, counts as failed."""

_HUB_SECONDS = 4.0
"""Timeout in seconds of an attempt to connect to the hub; with name resolution, it may take twice that."""

_FILES, _NOTE = "files", "note"
"""Names in the folder of a download: the folder of its files, and the note beside it, which may be empty."""

About = dict[str, Any]
"""A store's information on a file: its size, and what distinguishes it from an older version."""

Kind = Literal["dataset", "model"]
"""Type of a repository of the hub."""


class Span(NamedTuple):
    """A range of bytes of a file, which is not empty."""

    name: str
    start: int
    stop: int


def fetch_file(address: str) -> Path:
    """A local copy of a file, downloaded if it is not in the cache.

    Raises:
        UserError: The file does not exist, or the store or the disk fails.
    """
    parent, _, name = address.rpartition("/")
    folder = Folder(parent)
    return folder.fetch({name: folder.about(name)}) / name


def read_note(folder: Path) -> str | None:
    """The note that `Folder.fetch` kept beside the files that it downloaded; None for any other folder."""
    note = folder.parent / _NOTE
    is_ours = folder.name == _FILES and folder.parent.parent.resolve() == _downloads().resolve() and note.is_file()
    return (note.read_text(encoding="utf-8") or None) if is_ours else None


class Folder:
    """A folder at an address; names of files are relative to it.

    Every method, except the constructor, raises UserError if the store fails.

    Attributes:
        address: The address, without a trailing slash and without a password.
    """

    def __init__(self, address: str):
        """Opens the file system of the address; does not access the store.

        Raises:
            UserError: The address cannot be opened, or a package for it is not installed.
        """
        from fsspec.core import url_to_fs

        self.address = without_password(address.rstrip("/"))
        try:
            self._store, self._root = url_to_fs(address.rstrip("/"), **_options(self.address.partition(":")[0].lower()))
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
        """All files in the folder, at any depth; the name is empty if the address is a file."""
        found: dict[str, About] = {}
        with self._failing("read"), contextlib.suppress(FileNotFoundError):
            self._store.invalidate_cache()
            # Not `find`, which leaves out what cannot be listed.
            for parent, _, files in self._store.walk(self._root, detail=True, on_error="raise"):
                found |= {f"{parent}/{name}": about for name, about in files.items()}
        # Some stores represent an empty folder by a file whose name ends in a slash.
        return {
            path.removeprefix(self._root).lstrip("/"): _lasting(about)
            for path, about in found.items()
            if not about["name"].endswith("/")
        }

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
        answers: dict[Span, bytes | Exception] = dict.fromkeys(spans, EOFError())
        for _ in range(_ATTEMPTS):
            missing = [span for span, answer in answers.items() if isinstance(answer, Exception)]
            if not missing:
                break
            answers |= zip(missing, self._ask(missing), strict=True)
        for span, answer in answers.items():
            if isinstance(answer, Exception):
                with self._failing("read", span.name):
                    raise answer
        return cast(list[bytes], [answers[span] for span in spans])

    def _ask(self, spans: Sequence[Span]) -> list[bytes | Exception]:
        """Requests ranges once: the bytes of each, or its error."""
        paths = [self._path(span.name) for span in spans]
        try:
            contents = self._store.cat_ranges(paths, [span.start for span in spans], [span.stop for span in spans])
        except Exception as error:
            return [error] * len(spans)
        return [
            content
            if isinstance(content, Exception) or len(content) == span.stop - span.start
            else OSError(f"{len(content)} of {span.stop - span.start} bytes arrived")
            for span, content in zip(spans, contents, strict=True)
        ]

    def write(self, name: str, content: bytes) -> None:
        """Creates or replaces a file."""
        with self._failing("written", name):
            self._store.pipe_file(self._path(name), content)

    def sizes(self) -> dict[str, int]:
        """The size of every file, at any depth; the name is empty if the address is a file."""
        return {name: about["size"] for name, about in self.files().items()}

    def entries(self) -> set[str]:
        """The names of the files and folders in the folder."""
        return {name.partition("/")[0] for name in self.files()}

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, and folders of the first level, that exist."""
        gone = set(names)
        for name in self.files():
            if name in gone or name.partition("/")[0] in gone:
                with self._failing("written"), contextlib.suppress(FileNotFoundError):
                    self._store.rm_file(self._path(name))

    def clear(self) -> None:
        """Removes everything in the folder, if there is anything."""
        with self._failing("written"), contextlib.suppress(FileNotFoundError):
            self._store.invalidate_cache()
            self._store.rm(self._root, recursive=True)

    def put(self, name: str, file: Path) -> None:
        """Uploads a file."""
        with self._failing("written", name):
            self._store.put([str(file)], [self._path(name)])

    def copy(self, name: str, place: "Folder", final: str) -> None:
        """Copies a file to another folder of the same store, which no bytes have to leave for that."""
        with self._failing("copied", name):
            self._store.copy(self._path(name), place._path(final))

    def _get(self, sizes: Mapping[str, int | None], into: Path) -> None:
        """Downloads files, of these sizes if known, into a local folder, with a progress bar on a terminal."""
        local = {name: into / name for name in sizes}
        for name, file in local.items():
            if ".." in Path(name).parts:
                raise UserError(f"{self.address} holds a file {name}, whose name leads out of its folder: remove it.")
            file.parent.mkdir(parents=True, exist_ok=True)
        from fsspec.callbacks import TqdmCallback

        bar = TqdmCallback(tqdm_kwargs={"desc": f"from {self.address}", "unit": "file", "disable": None})
        with self._failing("read"), bar as callback:
            self._store.get(list(map(self._path, local)), list(map(str, local.values())), callback=callback)
        for name, size in sizes.items():
            if size not in (None, local[name].stat().st_size):
                raise UserError(f"{self.address}/{name} was not downloaded completely: try again.")

    def fetch(self, files: Mapping[str, About], note: str = "") -> Path:
        """Returns the cache folder with these files, which are downloaded if it does not exist.

        Args:
            files: What the store says of each file, by name.
            note: A text to keep beside that folder, where no file that a store offers can be, for `read_note`.

        Raises:
            UserError: The disk has no room, a name leads out of the folder, or a file arrived in another size.
        """
        identity = json.dumps([self.address, files, note], sort_keys=True, default=str)
        target = _downloads() / hashlib.sha256(identity.encode()).hexdigest()[:32]
        if target.is_dir():
            if (target / _NOTE).is_file() and all((target / _FILES / name).is_file() for name in files):
                return target / _FILES
            shutil.rmtree(target)  # whoever cleaned up old files left a part of it
        partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.mkdir(0o700, parents=True)  # a note may need the password in an address
            (partial / _FILES).mkdir()
            size = sum(about["size"] or 0 for about in files.values())
            if (free := free_disk(partial)) < size:
                raise UserError(
                    f"{self.address} holds {bytes_text(size)} and the disk of {target.parent} has "
                    f"{bytes_text(free)} free: free some space, or name a folder on another disk in SPAP_CACHE."
                )
            self._get({name: about["size"] for name, about in files.items()}, partial / _FILES)
            (partial / _NOTE).write_text(note, encoding="utf-8")
            try:
                partial.rename(target)
            except OSError:
                if not target.is_dir():  # another process was faster
                    raise
        except OSError as error:
            raise UserError(
                f"{target.parent} cannot be written ({first_line(error)}): name another in SPAP_CACHE."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target / _FILES

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
    """Options for the client of a kind of address: most would wait without end for a store that does not answer."""
    if kind in ("file", "local"):
        return {"auto_mkdir": True}  # a store would take this for a request to make a bucket
    if kind in ("gs", "gcs"):
        return {"requests_timeout": _PATIENCE}
    if kind in ("http", "https"):
        from aiohttp import ClientTimeout

        # By default a file has to arrive within five minutes.
        return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
    return {}


def _lasting(about: About) -> About:
    """Leaves out what may change although the file does not: the class of storage, and where its address leads to."""
    if "generation" in about:
        return {key: about[key] for key in ("name", "size", "type", "generation")}
    return {key: value for key, value in about.items() if key not in ("StorageClass", "url")}


def _downloads() -> Path:
    return cache() / "downloads"


def hub_problem() -> str | None:
    """The reason why the hub does not answer, or None if it does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    reasons: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
            reasons.append(None)
        except Exception as error:  # every failure to get an answer means the same here
            reasons.append("HF_HUB_OFFLINE is set" if constants.is_offline_mode() else first_line(error))

    thread = threading.Thread(target=ask, daemon=True)  # name resolution ignores timeouts
    thread.start()
    thread.join(2 * _HUB_SECONDS)
    return reasons[0] if reasons else f"no answer within {2 * _HUB_SECONDS:g} seconds"


def require_hub(what: str, remedy: str) -> None:
    """Checks that the hub answers, or raises within about eight seconds.

    Args:
        what: What is wanted from the hub, as the subject of the error's sentence.
        remedy: What the user can do instead, in the imperative.

    Raises:
        UserError: The hub does not answer, or `HF_HUB_OFFLINE=1` forbids asking it.
    """
    from huggingface_hub import constants

    if reason := hub_problem():
        raise UserError(
            f"{what} is not on this machine and the hub {constants.ENDPOINT} cannot be reached ({reason}): {remedy}"
        )


def check_repo_id(repo: str, typed: str, *, owned: bool = True) -> None:
    """Checks a repository id, which the user ``typed`` somehow, before any request to the hub.

    Raises:
        UserError: It is not valid, or has no owner although ``owned``; that of an old model, such as gpt2, has none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = "/" in repo or not owned
    except HFValidationError:
        valid = False
    if not valid:
        form = f"{typed.removesuffix(repo)}owner/name"
        raise UserError(
            f"{typed} names no repository of the hub: give {form}, of letters and digits with single -, _ or dots "
            "between them."
        )


def hub_file(repo: str, file: str, revision: str, *, remedy: str, kind: Kind = "dataset") -> Path:
    """The local copy of one file of a hub data set or model, downloaded if it is not cached.

    Raises:
        UserError: It is not cached and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    what = f"the file {file} of the hub {'data set' if kind == 'dataset' else 'model'} {repo}"
    cached = try_to_load_from_cache(repo, file, revision=revision, repo_type=kind)
    if isinstance(cached, str):
        return Path(cached)
    require_hub(what, remedy)
    try:
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=revision))
    except Exception as error:  # whatever the client raises: no network, no disk space, no access
        raise UserError(f"{what} cannot be downloaded ({first_line(error)}): {remedy}") from error


def hub_splits(repo: str, part: str | None, *, remedy: str) -> Mapping[str, Iterable[Any]]:
    """The splits of a hub data set, or of a part of it, as iterables of rows: those in the cache, or else streamed.

    Without a name of a part, the cache counts only if it has the one called "default": others may not be meant.

    Raises:
        UserError: It is not cached and cannot be read from the hub.
    """
    from datasets import load_dataset

    with contextlib.suppress(ValueError, OSError, KeyError), offline():  # not cached, or several parts and none named
        splits = cast(Mapping[str, Any], load_dataset(repo, part))
        if part or next(iter(splits.values())).config_name == "default":
            return splits
    require_hub(f"the hub data set {repo}", remedy)
    try:
        return cast(Mapping[str, Iterable[Any]], load_dataset(repo, part, streaming=True))
    except Exception as error:  # whatever the client raises: unknown, gated, a script
        if parts := re.match(r"Config name is missing.*\[(.+?)\]", str(error), re.DOTALL):
            several = parts[1].replace("'", "")
            raise UserError(f"the hub data set {repo} has the parts {several}: name one, as in {repo}:PART.") from error
        raise UserError(f"the hub data set {repo} cannot be read ({first_line(error)}): {remedy}") from error


def is_uncached(error: Exception) -> bool:
    """Whether an error raised inside `offline` means that a data set, or the part that was asked for, is not cached."""
    said = ("Couldn't find cache for ", "There are multiple ")
    return isinstance(error, ConnectionError) or str(error).startswith(said)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Restricts the hub's clients to the cache inside the block; other requests raise errors."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
