"""A store of files in this process's memory: a real fsspec filesystem that logs operations and can be made to fail."""

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from spap_jax.storage.files import Folder


class Frail(MemoryFileSystem):
    """An in-memory filesystem whose addresses begin with frail://.

    Attributes:
        store: The stored files, by path.
        done: Operations on files, in order: ("get", path), ("put", path) or ("rm", path).
        broken: Start of an operation and path, such as "put /bucket/out/model", that raises; "" for none.
        short: Whether a download delivers only half of a file.
        asked: Ranges of bytes that were read, in order: (path, start, stop).
        failures: Number of the next ranges that raise.
        killing: How many operations are done before all others raise, as after a kill; -1 for no limit.
    """

    protocol = "frail"
    store: dict[str, Any] = {}  # noqa: RUF012  (as in the class it extends, shared by all)
    pseudo_dirs = [""]  # noqa: RUF012
    done: list[tuple[str, str]] = []  # noqa: RUF012
    broken = ""
    short = False
    asked: list[tuple[str, int, int]] = []  # noqa: RUF012
    failures = 0
    killing = -1

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **others: Any) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        if start is not None and end is not None:
            self._do("range", path)
            if Frail.failures:
                Frail.failures -= 1
                raise OSError("the store is on fire")
            Frail.asked.append((self._strip_protocol(path), start, end))
        return super().cat_file(path, start, end, **others)

    def get_file(self, rpath: str, lpath: Any, *more: Any, **others: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._do("get", rpath)
        super().get_file(rpath, lpath, *more, **others)
        if self.short:
            content = Path(lpath).read_bytes()
            Path(lpath).write_bytes(content[: len(content) // 2])

    def put_file(self, lpath: str, rpath: str, *more: Any, **others: Any) -> None:
        self._do("put", rpath)
        super().put_file(lpath, rpath, *more, **others)

    def pipe_file(self, path: str, value: bytes, *more: Any, **others: Any) -> None:
        self._do("put", path)
        super().pipe_file(path, value, *more, **others)

    def cp_file(self, path1: str, path2: str, **others: Any) -> None:
        self._do("copy", path2)
        super().cp_file(path1, path2, **others)

    def rm_file(self, path: str) -> None:
        self._do("rm", path)
        super().rm_file(path)

    def _do(self, what: str, path: str) -> None:
        path = self._strip_protocol(path)
        if len(Frail.done) == Frail.killing:
            raise OSError("the process is dead")
        if Frail.broken and f"{what} {path}".startswith(Frail.broken):
            raise OSError("the store is on fire")
        Frail.done.append((what, path))

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, str) and path.startswith("frail://"):
            path = path.removeprefix("frail:/")
        return MemoryFileSystem._strip_protocol(path)


def begin() -> type[Frail]:
    """Register and return an empty store that does not fail."""
    fsspec.register_implementation("frail", Frail, clobber=True)
    for each in (Frail.store, Frail.done, Frail.asked):
        each.clear()
    Frail.pseudo_dirs[:] = [""]
    Frail.broken, Frail.short, Frail.failures, Frail.killing = "", False, 0, -1
    return Frail


def contents(folder: str) -> dict[str, bytes]:
    """Return the files under a path of the store."""
    return {
        path.removeprefix(f"{folder}/"): file.getvalue()
        for path, file in Frail.store.items()
        if path.startswith(f"{folder}/")
    }


def upload(folder: Path, address: str) -> None:
    """Put the files of a local folder at an address."""
    for file in folder.iterdir():
        Folder(address).put(file.name, file)
