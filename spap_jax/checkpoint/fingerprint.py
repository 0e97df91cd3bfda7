"""Detects whether a checkpoint folder has changed, without reading all of it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spap_jax.checkpoint.config_text import read_config_text
from spap_jax.checkpoint.ranged import AtAddress
from spap_jax.checkpoint.side_files import PARAMS, is_orbax
from spap_jax.checkpoint.tensors import weight_files

_PIECE, _PIECES = 1 << 16, 256


def fingerprint(folder: Path) -> str:
    """SHA-256 of config.json and of the name, the length and some pieces of each weight file.

    For files at an address, what the store says of them replaces the pieces. Manual changes of a few bytes in a long
    file may be missed.

    Raises:
        UserError: The folder holds no config.json or no weights.
    """
    total = hashlib.sha256(read_config_text(folder / "config.json").encode())
    elsewhere = AtAddress.of(folder)
    inside = sorted(file for file in (folder / PARAMS).rglob("*") if file.is_file()) if is_orbax(folder) else None
    for path in inside or weight_files(folder, elsewhere):
        name = path.relative_to(folder).as_posix()
        if elsewhere:
            total.update(f"\n{name} {elsewhere.version(path)}\n".encode())
            continue
        total.update(f"\n{name} {path.stat().st_size}\n".encode())
        for piece in _pieces(path):
            total.update(piece)
    return total.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    """Yields 256 evenly spaced pieces of 64 kB of a file, or all of a small one; training changes every piece."""
    length = file.stat().st_size
    count = min(_PIECES, -(-length // _PIECE))
    with file.open("rb") as opened:
        for start in np.linspace(0, max(0, length - _PIECE), count, dtype=np.int64).tolist():
            opened.seek(start)
            yield opened.read(_PIECE)
