"""Writes safetensors files a tensor at a time, in any order, so that finished tensors need not stay in memory.

The safetensors library writes a file from all its tensors at once. Here, shapes and dtypes are known in advance, so the
files are laid out first, and each tensor is written to its place when it is ready.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spap_jax.checkpoint.tensors import DTYPE_CODES, Tensor

_ALIGNMENT = 8
"""Headers are padded with spaces to a multiple of this many bytes, as the format advises."""


class Shards:
    """The weight files of one checkpoint, whose data read as zeros until they are written."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int):
        """Lays the files out, and creates them with their headers.

        Args:
            folder: Folder of the files.
            tensors: The tensors to write, in the order in which they fill the shards.
            shard_bytes: Maximum size of a file, unless one tensor is larger.
        """
        shards = _filled(tensors, shard_bytes)
        self._folder, self._count = folder, len(shards)
        self._bytes = sum(tensor.bytes for tensor in tensors.values())
        self._places: dict[str, tuple[int, int]] = {}  # the number of the shard, and the offset in its file
        for number, shard in enumerate(shards):
            header = _header({name: tensors[name] for name in shard})
            end = len(header)
            for name in shard:
                self._places[name] = number, end
                end += tensors[name].bytes
            with self._path(number).open("xb") as file:
                file.write(header)
                file.truncate(end)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor's data to their place.

        Args:
            name: Name of the tensor.
            array: Contiguous array of the shape and dtype that were laid out.
        """
        shard, offset = self._places[name]
        with self._path(shard).open("r+b") as file:
            file.seek(offset)
            file.write(array.reshape(-1).view(np.uint8).data)

    def write_index(self) -> None:
        """Writes the index of which file holds which tensor, if there are several files."""
        if self._count == 1:
            return
        weight_map = {name: self._path(shard).name for name, (shard, _) in self._places.items()}
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _path(self, number: int) -> Path:
        several = f"model-{number + 1:05d}-of-{self._count:05d}.safetensors"
        name = "model.safetensors" if self._count == 1 else several
        return self._folder / name


def _filled(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """The names in each shard, in the order of the safetensors library, so that files equal those that it writes.

    Wide dtypes come first, so that every tensor is aligned to its own; ties are sorted by name.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.bytes
    return [sorted(shard, key=lambda name: (-tensors[name].item_bytes, name)) for shard in shards]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The header: the length of the description, and the description; https://huggingface.co/docs/safetensors."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        span = [end, end + tensor.bytes]
        described[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(described, separators=(",", ":")).encode("utf-8")
    text = text.ljust(math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
