"""Weight files of a checkpoint: one for each block, with a checksum, and all of them joined into one.

The safetensors library writes a file from all its tensors at once, and reads no bfloat16 from bytes. So the format is
written and read here, in the same order.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spap_jax.checkpoint.tensors import DTYPE_CODES, DTYPES, Tensor

JOINED_BYTES = 5 * 10**9
"""Up to this many bytes, the weights of a checkpoint are joined into one file."""

JOINED = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ALIGNMENT = 8
"""Headers are padded with spaces to a multiple of this many bytes, as the format advises."""

_DTYPES = {code: DTYPES[name] for name, code in DTYPE_CODES.items()}

Arrays = Mapping[str, np.ndarray]


def encode(tensors: Arrays, report: Any) -> bytes:
    """The content of a weight file of contiguous arrays, with a report as a JSON value in its metadata."""
    about = {"report": json.dumps(report), "sha256": _digest(tensors)}
    header, starts = _layout({name: Tensor(array.shape, array.dtype.name) for name, array in tensors.items()}, about)
    return b"".join([header, *(_bytes(tensors[name]) for name in starts)])


def decode(content: bytes | None) -> tuple[Arrays, Any] | None:
    """The tensors and the report of such a file; None if it is absent or damaged."""
    try:
        start = 8 + int.from_bytes((content or b"")[:8], "little")
        header = json.loads((content or b"")[8:start])
        about, data = header.pop("__metadata__"), np.frombuffer(content or b"", np.uint8)[start:]
        tensors = {
            name: data[slice(*of["data_offsets"])].view(_DTYPES[of["dtype"]]).reshape(of["shape"])
            for name, of in header.items()
        }
        return (tensors, json.loads(about["report"])) if about["sha256"] == _digest(tensors) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def final_names(count: int) -> list[str]:
    """The names of the weight files of a checkpoint that has several."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_text(files: Mapping[str, str], size: int) -> str:
    """The index of a checkpoint with several weight files: the file of each tensor, and the bytes of all."""
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    return json.dumps(index, indent=2) + "\n"


def join(path: Path, layout: Mapping[str, Tensor], parts: Iterable[Arrays]) -> None:
    """Writes one weight file, equal to that of the safetensors library, from the tensors of several.

    Args:
        layout: Shape and dtype of all tensors, in any order.
        parts: The tensors, some at a time.
    """
    header, starts = _layout(layout, {})
    with path.open("wb") as file:
        file.write(header)
        for name, array in (item for part in parts for item in part.items()):
            file.seek(len(header) + starts[name])
            file.write(_bytes(array))


def _layout(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a file (https://huggingface.co/docs/safetensors), and where after it each tensor starts."""
    described: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    starts, end = {}, 0
    # Wide dtypes come first, so that every tensor is aligned to its own.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].item_bytes, item[0])):
        starts[name], end = end, end + tensor.bytes
        offsets = [starts[name], end]
        described[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(described, separators=(",", ":")).encode("utf-8")
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, starts


def _digest(tensors: Arrays) -> str:
    total = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(_bytes(array))
    return total.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
