"""The tensors of a checkpoint folder by name: shapes and dtypes from the files' headers, data only on demand."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from spap_jax.errors import UserError, first_line

if TYPE_CHECKING:
    from spap_jax.checkpoint.ranged import AtAddress

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes that weights may have, by the name that config.json gives them."""

DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The codes of these dtypes in the headers of safetensors files."""

Cuts = tuple[slice, ...]

_PIECE = 1 << 24
"""Approximate bytes of a piece."""

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_BAD_FILE = "it is damaged or incomplete, so copy or download it again."


@dataclass(frozen=True)
class Tensor:
    """Header of one tensor: its shape, and the name of its dtype (which need not be one of `DTYPES`)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of all elements; the dtype must be one of `DTYPES`."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class _Readable(Protocol):
    def read(self, name: str, cuts: Cuts) -> np.ndarray: ...


class _WeightFile(_Readable, Protocol):
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Part:
    """Rows of a tensor, from ``start`` on."""

    file: _Readable
    whole: str
    start: int

    def read(self, name: str, cuts: Cuts) -> np.ndarray:
        rows = slice((cuts[0].start or 0) + self.start, cuts[0].stop + self.start)
        return self.file.read(self.whole, (rows, *cuts[1:]))


class TensorFiles:
    """The tensors of all weight files of a folder.

    Attributes:
        tensors: Shape and dtype of each by its name; not all dtypes can be read.
    """

    def __init__(self, folder: Path, elsewhere: "AtAddress | None" = None):
        """Reads the headers of `model.safetensors` or its shards, else of `pytorch_model.bin` or its shards.

        ``elsewhere`` holds the weight files, if they are not in the folder.

        Raises:
            UserError: There are no weights, a file is missing or damaged, or torch is needed and not installed.
        """
        paths = weight_files(folder, elsewhere)
        self._files: dict[str, _Readable] = {}
        self.tensors: dict[str, Tensor] = {}
        for file in elsewhere.open(paths) if elsewhere else map(_open, paths):
            self._files |= dict.fromkeys(file.tensors, file)
            self.tensors |= file.tensors

    def split(self, wholes: Mapping[str, Mapping[str, int]]) -> None:
        """Shows the parts of tensors instead of the tensors, of which they are rows; see ``inventory.fused_tensors``.

        A tensor with another number of rows than its parts stays.
        """
        for whole, parts in wholes.items():
            tensor, start = self.tensors.get(whole), 0
            if tensor is None or tensor.shape[:1] != (sum(parts.values()),):
                continue
            del self.tensors[whole]
            file = self._files.pop(whole)
            for part, rows in parts.items():
                self.tensors[part] = Tensor((rows, *tensor.shape[1:]), tensor.dtype)
                self._files[part] = _Part(file, whole, start)
                start += rows

    def read(self, name: str, cuts: Cuts) -> np.ndarray:
        """Reads a part of a tensor's data, given a slice for each axis.

        Raises:
            UserError: Its file is damaged, or the part holds NaN or infinity.
        """
        array = self._files[name].read(name, cuts)
        if not np.isfinite(array).all():
            raise UserError(f"the weight {name} holds NaN or infinity: the checkpoint is damaged, so get it again.")
        return array

    def pieces(self, name: str) -> Iterator[Cuts]:
        """Yields cuts along the first axis that together cover a tensor, each small enough to be held temporarily."""
        first, *others = self.tensors[name].shape
        rows = max(1, _PIECE * first // max(1, self.tensors[name].bytes))
        for start in range(0, first, rows):
            yield (slice(start, min(start + rows, first)), *(slice(size) for size in others))


def weight_files(folder: Path, elsewhere: "AtAddress | None" = None) -> list[Path]:
    """The files that hold the weights of a folder, found in the order in which stock loaders look for them.

    Those that an index names need not exist. ``elsewhere`` holds the weight files, if they are not in the folder.

    Raises:
        UserError: There are no weights, or the index is damaged.
    """
    exists = elsewhere.holds if elsewhere else Path.is_file
    for single in _SINGLE:
        if exists(folder / single):
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            return [folder / name for name in sorted(_shards(index))]
    raise UserError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index of their shards: "
        "name the folder that has them, or download the checkpoint again."
    )


def _shards(index: Path) -> set[str]:
    """The shards that an index names; it may not name files outside of the folder, which could be anything."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = set(map(PurePosixPath, weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of weight files ({first_line(error)}): {_BAD_FILE}") from error
    for file in names:
        if file.is_absolute() or ".." in file.parts or "\\" in str(file):
            raise UserError(
                f"{index} names {file}, which is outside of its folder: do not trust this checkpoint, "
                "and get it from elsewhere."
            )
    return set(map(str, names))


def _open(path: Path) -> _WeightFile:
    if not path.is_file():
        raise UserError(f"{path} is missing, although the index of its folder names it: copy or download it again.")
    if _start(path, 24) == b"version https://git-lfs.":
        raise UserError(f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` in its folder.")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Torch(path)


class _Safetensors:
    """One safetensors file, opened for each tensor: what is read stays in memory until the library's map is closed."""

    def __init__(self, path: Path):
        self._path = path
        with self._opened() as file:
            self._version = self._seen()
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.tensors = {
            name: Tensor(tuple(header.get_shape()), dtype_name(str(header.get_dtype())))
            for name, header in slices.items()
        }

    def read(self, name: str, cuts: Cuts) -> np.ndarray:
        with self._opened() as file:
            if self._seen() != self._version:
                raise UserError(
                    f"{self._path} was replaced while the model was read, and the result would be of both: run the "
                    "command again."
                )
            return file.get_slice(name)[cuts]

    def _seen(self) -> tuple[int, int]:
        """What tells a file from another one that takes its place."""
        about = self._path.stat()
        return about.st_size, about.st_mtime_ns

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, framework="numpy") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path} cannot be read ({first_line(error)}): {_BAD_FILE}") from error


def dtype_name(code: str) -> str:
    """The name of the dtype with a code of safetensors; of those that cannot be read, the code in lower case."""
    return {code: name for name, code in DTYPE_CODES.items()}.get(code, code.lower())


class _Torch:
    """One file written by torch.save; memory-mapped, and read without running any code that it may hold."""

    def __init__(self, path: Path):
        self._tensors = _torch_tensors(path)
        self.tensors = {
            name: Tensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, cuts: Cuts) -> np.ndarray:
        import torch

        tensor = self._tensors[name][cuts].detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # numpy has no such dtype: the bits are passed as integers
            return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
        return tensor.numpy()


def _torch_tensors(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is in PyTorch's own format: to read it, install torch (pip install 'spap-jax[torch]'), "
            "or get the checkpoint in safetensors format."
        ) from error
    try:
        mapped = _start(path, 4) == b"PK\x03\x04"  # files of torch before 1.6 are no archives: no memory map
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:  # its message says how to run code in the file
        raise UserError(
            f"{path} cannot be read as weights: it is damaged, or holds more than tensors, which may be code and is "
            "never loaded; get the checkpoint in safetensors format."
        ) from error
    except Exception as error:  # torch raises all kinds of exceptions for a damaged file or one with more than tensors
        raise UserError(f"{path} cannot be read as weights ({first_line(error)}): {_BAD_FILE}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} holds something other than tensors by name: get the checkpoint in safetensors format.")
    return tensors


def _start(path: Path, count: int) -> bytes:
    """Reads the first bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): check who may read it, or copy or download it again."
        ) from error
