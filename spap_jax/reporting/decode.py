"""JSON files as the types that say what they have to hold."""

from pathlib import Path
from typing import TypeVar

import msgspec

from spap_jax.errors import UserError

T = TypeVar("T")


def content(file: Path) -> bytes:
    """Raises: UserError: the file cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name another file.") from error


def decoded(file: Path, text: bytes, kind: type[T], origin: str) -> T:
    """A file's content.

    Args:
        file: Where it is from.
        text: Its bytes.
        kind: What they have to be.
        origin: The command that writes such files.

    Raises:
        UserError: they are something else.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is cut off, or not what this version's {origin} writes ({error}): make it again."
        ) from error
