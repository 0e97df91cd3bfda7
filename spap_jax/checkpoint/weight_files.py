"""Weight files of a checkpoint: one for each block, which tells of damage, and all of them joined into one.

A file of the safetensors library is written from all its tensors at once. The joined file is laid out first instead,
and filled a block at a time.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from spap_jax.checkpoint.tensors import DTYPE_CODES, Tensor

JOINED_BYTES = 5 * 10**9
"""Up to this many bytes, the weights of a checkpoint are joined into one file."""

JOINED = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ALIGNMENT = 8
"""Headers are padded with spaces to a multiple of this many bytes, as the format advises."""

Arrays = Mapping[str, np.ndarray]


def encode(tensors: Arrays, report: Any) -> bytes:
    """The content of a weight file, with a report as a JSON value in its metadata.

    Args:
        tensors: Contiguous arrays by name.
        report: A JSON value.
    """
    about = {"format": "pt", "report": json.dumps(report), "sha256": _digest(tensors)}
    return safetensors.numpy.save(dict(tensors), about)


def decode(content: bytes | None) -> tuple[Arrays, Any] | None:
    """The tensors and the report of such a file; None if it is absent or damaged."""
    if content is None:
        return None
    try:
        tensors = safetensors.numpy.load(content)
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        return (tensors, json.loads(about["report"])) if about["sha256"] == _digest(tensors) else None
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def final_names(count: int) -> list[str]:
    """The names of the weight files of a checkpoint that has several."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_text(files: Mapping[str, str], size: int) -> str:
    """The index of a checkpoint with several weight files.

    Args:
        files: The file of each tensor.
        size: Bytes of all tensors.
    """
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    return json.dumps(index, indent=2) + "\n"


def join(path: Path, layout: Mapping[str, Tensor], parts: Iterable[Arrays]) -> None:
    """Writes one weight file, equal to that of the safetensors library, from the tensors of several.

    Args:
        path: The file.
        layout: Shape and dtype of all tensors, in any order.
        parts: The tensors, some at a time.
    """
    # Wide dtypes come first, so that every tensor is aligned to its own.
    names = sorted(layout, key=lambda name: (-layout[name].item_bytes, name))
    header, ends = _header({name: layout[name] for name in names}), [0]
    for name in names:
        ends.append(ends[-1] + layout[name].bytes)
    starts = dict(zip(names, ends, strict=False))
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + ends[-1])
        for name, array in (item for part in parts for item in part.items()):
            file.seek(len(header) + starts[name])
            file.write(_bytes(array))


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


def _digest(tensors: Arrays) -> str:
    total = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(_bytes(array))
    return total.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
