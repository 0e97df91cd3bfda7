"""The files that belong to a model beside its config and weights: of the tokenizer, of generation, licence, card.

Also how an Orbax folder is told from others, without Orbax.
"""

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from spap_jax.errors import warn
from spap_jax.models.model import Source

SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "*processor_config.json",
    "additional_chat_templates/*.jinja",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Side files, which also apply to models that are made from this one."""

ACCOUNTS = ("README.md", "spap_report.json", "spap_finetune*.json")
"""The card and the reports: they describe how these weights were made, and apply to no others."""


PARAMS, SOURCE = "params", "spap_source.json"
"""In an Orbax folder, the folder of the parameters, and the file that says where they came from."""


def is_orbax(folder: Path) -> bool:
    """Whether a folder was written by `save_orbax`."""
    return (folder / PARAMS).is_dir() and (folder / SOURCE).is_file()


def matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """The names that match one of the patterns, sorted; a star does not match a slash."""

    def fits(name: str, pattern: str) -> bool:
        return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)

    return sorted(name for name in names if any(fits(name, pattern) for pattern in patterns))


def accounts(source: Source) -> dict[str, bytes]:
    """The contents of the card and the reports that a model has, by their names."""
    if source.accounts is not None:
        return {name: text.encode() for name, text in source.accounts}
    folder = source.folder
    found = [file for pattern in ACCOUNTS for file in sorted(folder.glob(pattern))] if folder else []
    return {file.name: file.read_bytes() for file in found if file.is_file()}


def side_files(folder: Path | None) -> dict[str, Path]:
    """The side files of a checkpoint folder by name; a model made in memory has none."""
    if folder is None:
        return {}
    if not folder.is_dir():
        warn(f"{folder} is gone, so that the result has no tokenizer or licence: copy them from elsewhere.")
        return {}
    found = (file for pattern in SIDE_FILES for file in sorted(folder.glob(pattern)) if file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in found}
