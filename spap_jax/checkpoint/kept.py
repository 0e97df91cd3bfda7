"""The resume folder beside an output, which keeps an unfinished run: its name, and what may be removed from it."""

import contextlib
import os
import shutil
from pathlib import Path

from spap_jax.errors import UserError
from spap_jax.places import beside, real_path
from spap_jax.remote import is_address, working_folder

RUN, DECIDED, STEPS, LOCK, OUTPUT = "run.json", "decided.json", "steps", "lock", "output"
NEW = ".new"
"""Suffix of a file that is not completely written yet."""


def resume_role(process: int) -> str:
    """The role of a process's resume folder; see `places.beside`."""
    return f"resume-{process}" if process else "resume"


def resume_folder(output: str | Path, process: int = 0) -> Path:
    """The local folder in which a process of a run into `output` keeps its progress."""
    place = working_folder(str(output)) if is_address(output) else real_path(output)
    return Path(beside(place, resume_role(process)))


def check_resume_folder(output: str | Path, process: int = 0) -> None:
    """Checks that an existing resume folder was made by a run, since the run removes files in it.

    Raises:
        UserError: It is a file, or a folder that no run made.
    """
    folder = resume_folder(output, process)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, where the finished blocks of the run would be kept: move it away.")
    if any(folder.iterdir()) and not (folder / LOCK).exists():
        raise UserError(
            f"{folder}, where the finished blocks of the run would be kept, holds files that no run left: move them "
            "away, or name another output."
        )


def clear_folder(folder: Path, but: str | None = None) -> None:
    """Removes what a run writes, and the folder if nothing else is in it."""
    for name in (STEPS, OUTPUT, RUN, RUN + NEW, DECIDED, DECIDED + NEW, LOCK):
        path = folder / name
        if name == but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
