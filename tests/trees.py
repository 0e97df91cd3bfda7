"""A snapshot of a folder's contents, to check that nothing in it has changed."""

import hashlib
import os
from pathlib import Path


def hashes(folder: Path) -> dict[str, str]:
    """Return, for all paths below a folder, a file's hash, a link's target, or the kind of anything else."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            about = f"-> {os.readlink(path)}"
        elif path.is_file():
            about = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            about = "folder" if path.is_dir() else "special"
        found[path.relative_to(folder).as_posix()] = about
    return found
