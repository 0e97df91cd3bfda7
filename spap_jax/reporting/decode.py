"""Decoding of JSON files into validated types."""

from pathlib import Path
from typing import TypeVar

from spap_jax.errors import UserError
from spap_jax.reporting.schema import parsed

T = TypeVar("T")


def content(file: Path) -> bytes:
    """Reads a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name another file.") from error


def decoded(file: Path, text: bytes, kind: type[T], origin: str) -> T:
    """Decodes the JSON content of a file.

    Args:
        file: The file, for error messages.
        text: Its bytes.
        kind: Type to decode to.
        origin: The command that writes files of this kind.

    Raises:
        UserError: the content is not JSON of this type.
    """
    try:
        return parsed(text, kind)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is cut off, or not what this version's {origin} writes ({error}): make it again."
        ) from error
