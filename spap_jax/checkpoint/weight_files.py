"""Weight files of a checkpoint: one for each block, or all of them joined into one."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from spap_jax.checkpoint.tensors import DTYPE_CODES, DTYPES

JOINED_BYTES = 10**9
"""Up to this many bytes, the weights of a checkpoint are joined into one file, in memory."""

JOINED = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {code: DTYPES[name] for name, code in DTYPE_CODES.items()}

Arrays = Mapping[str, np.ndarray]


def encode(tensors: Arrays, report: Any = None) -> bytes:
    """The content of a weight file of contiguous arrays, perhaps with a report as a JSON value in its metadata."""
    about = {} if report is None else {"report": json.dumps(report)}
    return save(dict(tensors), {"format": "pt", **about})


def decode(content: bytes | None) -> tuple[Arrays, Any] | None:
    """The tensors and the report of such a file; None if it is absent or damaged."""
    if content is None:
        return None
    try:
        found = deserialize(content)
    except SafetensorError:
        return None
    tensors = {name: np.frombuffer(of["data"], _DTYPES[of["dtype"]]).reshape(of["shape"]) for name, of in found}
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return tensors, json.loads(about.get("report", "null"))
