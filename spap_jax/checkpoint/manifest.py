"""The list of the files of a folder that this program wrote, so that nothing else is ever replaced."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from spap_jax.errors import UserError, option

MANIFEST = "spap_files.json"
"""Its name. It is a JSON object with the size of each file, except itself, by its path below the folder."""

_SHOWN = 3


def manifest_text(sizes: Mapping[str, int]) -> str:
    """The text of a manifest of files of these sizes."""
    return json.dumps({name: sizes[name] for name in sorted(sizes) if name != MANIFEST}, indent=1) + "\n"


def parse_manifest(content: bytes | None) -> dict[str, int]:
    """The sizes in a manifest by name; empty if it is not valid."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def foreign(sizes: Mapping[str, int], content: bytes | None) -> list[str]:
    """The files in a folder, given with their sizes, that its manifest does not name with that size."""
    listed = parse_manifest(content)
    return sorted(name for name, size in sizes.items() if listed.get(name) != size and (name != MANIFEST or not listed))


def check_replaceable(place: str | Path, overwrite: bool, others: Sequence[str]) -> None:
    """Refuses to replace a folder unless that was asked for and loses no ``others``, files of another origin.

    Raises:
        UserError: It may not be replaced.
    """
    if not overwrite:
        raise UserError(f"{place} exists: name another folder, or pass {option('overwrite', True)} to replace it.")
    if others:
        shown = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
        raise UserError(
            f"{place} is not overwritten, because it holds files that spap did not write or that have another size "
            f"({shown}): name another folder, or move them out of it."
        )
