"""Whether a checkpoint folder is the one it was, without reading all of it."""

import hashlib
from pathlib import Path

import numpy as np

from spap_jax.checkpoint.config_text import read_config_text
from spap_jax.checkpoint.tensors import weight_files

_PIECE, _PIECES = 1 << 16, 256


def fingerprint(folder: Path) -> str:
    """SHA-256 of config.json and, of each weight file, of its name, its length and 256 pieces of 64 kB of it.

    The pieces lie at even distances from the first bytes to the last, so files of up to 16 MB count whole. Training
    changes every tensor, and so every piece; a change of a few bytes by hand in a long file may be missed.

    Raises:
        UserError: The folder holds no config.json or no weights.
    """
    total = hashlib.sha256(read_config_text(folder).encode())
    for path in weight_files(folder):
        length = path.stat().st_size
        total.update(f"\n{path.name} {length}\n".encode())
        count = min(_PIECES, -(-length // _PIECE))
        with path.open("rb") as file:
            for start in np.linspace(0, max(0, length - _PIECE), count, dtype=np.int64).tolist():
                file.seek(start)
                total.update(file.read(_PIECE))
    return total.hexdigest()
