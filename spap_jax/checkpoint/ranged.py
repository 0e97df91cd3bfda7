"""Weight files at an address: only the bytes of the wanted rows are read, and nothing is stored.

Of such a checkpoint, `locate` downloads only the other files, with a note on where the weights are.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spap_jax.checkpoint.tensors import DTYPES, Cuts, Tensor, dtype_name
from spap_jax.errors import UserError, first_line
from spap_jax.storage.files import About, Folder, Span, read_note

_LENGTH = 8
"""Bytes of the length of a header, with which a file begins; https://huggingface.co/docs/safetensors."""

_PIECE, _AT_ONCE = 1 << 24, 8
"""Bytes of a request, and the number of requests that are made at once."""


def note_of(address: str, files: Mapping[str, About]) -> str:
    """The text of the note: the address, and what the store says of each weight file there."""
    return json.dumps({"address": address, "files": files}, default=str, sort_keys=True)


class AtAddress:
    """The weight files of a folder whose other files were downloaded."""

    def __init__(self, address: str, files: Mapping[str, About]):
        self._folder, self._files = Folder(address), files

    @classmethod
    def of(cls, folder: Path) -> "AtAddress | None":
        """The weights of a folder that `locate` made, if it left them at their address."""
        note = read_note(folder)
        return cls(**json.loads(note)) if note else None

    def holds(self, path: Path) -> bool:
        """Whether a path in the folder stands for a weight file."""
        return path.name in self._files or path.is_file()

    def version(self, path: Path) -> str:
        """What distinguishes a file from an older one of its name, as the store says."""
        return json.dumps(self._files[path.name], sort_keys=True)

    def check_unchanged(self) -> None:
        """Checks that the store still has the weight files that are noted: what was read may be of two checkpoints.

        Raises:
            UserError: The store fails, or says something else of a file than before.
        """
        there = self._folder.files()
        for name in self._files:
            if name not in there or note_of("", {name: there[name]}) != note_of("", {name: self._files[name]}):
                raise UserError(
                    f"{self._folder.address}/{name} was replaced or removed while it was read: run the command again."
                )

    def open(self, paths: Sequence[Path]) -> "list[RangedFile]":
        """Reads the headers of all files: first their lengths, then the headers, many at once.

        Raises:
            UserError: The store fails, or a file is missing or damaged.
        """
        names = [path.name for path in paths]
        if lost := [name for name in names if name not in self._files]:
            raise UserError(
                f"{self._folder.address}/{lost[0]} is missing, although the index beside it names it: upload it again."
            )
        starts = self._folder.ranges([Span(name, 0, _LENGTH) for name in names])
        lengths = [int.from_bytes(start, "little") for start in starts]
        for name, length in zip(names, lengths, strict=True):
            if not 0 < length <= self._files[name]["size"] - _LENGTH:
                raise _damaged(f"{self._folder.address}/{name}", "it has no header")
        headers = self._folder.ranges([Span(n, _LENGTH, _LENGTH + m) for n, m in zip(names, lengths, strict=True)])
        return [
            RangedFile(self._folder, name, header, self._files[name]["size"])
            for name, header in zip(names, headers, strict=True)
        ]


class RangedFile:
    """One safetensors file at an address."""

    def __init__(self, folder: Folder, name: str, header: bytes, size: int):
        """Parses a file's header, without the 8 bytes of its length; ``size`` is the file's.

        Raises:
            UserError: The header does not describe such a file.
        """
        self._folder, self._name = folder, name
        try:
            told = {tensor: about for tensor, about in json.loads(header).items() if tensor != "__metadata__"}
            self.tensors = {
                tensor: Tensor(tuple(map(int, about["shape"])), dtype_name(about["dtype"]))
                for tensor, about in told.items()
            }
            self._starts = {tensor: _LENGTH + len(header) + about["data_offsets"][0] for tensor, about in told.items()}
            readable = {name: tensor for name, tensor in self.tensors.items() if tensor.dtype in DTYPES}
            for tensor, start in self._starts.items():
                if tensor in readable and not 0 <= start <= size - readable[tensor].bytes:
                    raise ValueError(f"it ends before {tensor}")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(f"{folder.address}/{name}", first_line(error)) from error

    def read(self, name: str, cuts: Cuts) -> np.ndarray:
        """Reads a part of a tensor of one of `DTYPES`, given a slice for each axis, by one range of whole rows.

        Raises:
            UserError: The store fails.
        """
        tensor = self.tensors[name]
        first, last, _ = cuts[0].indices(tensor.shape[0])
        row = tensor.bytes // max(1, tensor.shape[0])
        data = self._data(self._starts[name] + first * row, self._starts[name] + last * row)
        rows = data.view(DTYPES[tensor.dtype]).reshape(last - first, *tensor.shape[1:])
        return rows[(slice(None), *cuts[1:])]

    def _data(self, start: int, stop: int) -> np.ndarray:
        """Reads a range in pieces, several at once."""
        data = np.empty(stop - start, np.uint8)
        spans = [Span(self._name, at, min(at + _PIECE, stop)) for at in range(start, stop, _PIECE)]
        for some in (spans[at : at + _AT_ONCE] for at in range(0, len(spans), _AT_ONCE)):
            for span, piece in zip(some, self._folder.ranges(some), strict=True):
                data[span.start - start : span.stop - start] = np.frombuffer(piece, np.uint8)
        return data


def _damaged(place: str, why: str) -> UserError:
    return UserError(f"{place} is no safetensors file ({why}): it is damaged or incomplete, so upload it again.")
