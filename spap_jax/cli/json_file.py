"""Numbers of a command as a file, beside what it prints."""

import json
from pathlib import Path
from typing import Any

from spap_jax.errors import UserError


def check_place(file: Path | None) -> None:
    """Said before a run that takes long.

    Raises:
        UserError: a file is wanted in a folder that is not there.
    """
    if file is not None and not file.parent.is_dir():
        raise UserError(f"{file} cannot be written (there is no folder {file.parent}): name another file.")


def write_json(file: Path, result: dict[str, Any]) -> None:
    """Writes what a command found.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.write_text(json.dumps(result, indent=1, default=_plain) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file.") from error


def _plain(value: Any) -> Any:
    """A numpy number as a number; whatever else JSON has no word for as a text."""
    return value.item() if hasattr(value, "item") else str(value)
