"""Detects whether a checkpoint folder has changed, without reading all of it."""

import hashlib
from pathlib import Path

from spap_jax.checkpoint.config_text import read_config_text
from spap_jax.checkpoint.manifest import pieces
from spap_jax.checkpoint.orbax_files import is_orbax, params_files
from spap_jax.checkpoint.ranged import AtAddress
from spap_jax.checkpoint.tensors import weight_files


def fingerprint(folder: Path) -> str:
    """SHA-256 of config.json and of the name, the length and some `pieces` of each weight file.

    Of weight files at an address, what the store says of them takes the place of the pieces. Manual changes of a few
    bytes in a long file may be missed.

    Raises:
        UserError: The folder holds no config.json or no weights.
    """
    total = hashlib.sha256(read_config_text(folder / "config.json").encode())
    elsewhere = AtAddress.of(folder)
    for path in params_files(folder) if is_orbax(folder) else weight_files(folder, elsewhere):
        name = path.relative_to(folder).as_posix()
        if elsewhere:
            total.update(f"\n{name} {elsewhere.version(path)}\n".encode())
            continue
        total.update(f"\n{name} {path.stat().st_size}\n".encode())
        for piece in pieces(path):
            total.update(piece)
    return total.hexdigest()
