"""What a folder holds, to see that nothing of it has changed."""

import hashlib
import os
from pathlib import Path


def hashes(folder: Path) -> dict[str, str]:
    """Of all that is below a folder: a hash of each file, what each link says, and the kind of everything else."""
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
