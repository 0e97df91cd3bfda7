"""config.json as text: parsed to be read, edited in place to be written.

Every rewriting of a config loses or renames fields that some loader reads, so all but the edited values stays byte for
byte.
"""

import json
import re
from pathlib import Path
from typing import Any

from spap_jax.errors import UserError
from spap_jax.model import Source
from spap_jax.models.config import DecoderConfig
from spap_jax.models.registry import FAMILIES

DTYPE_FIELDS = ("torch_dtype", "dtype")
"""Where config.json names the dtype of the weights; either is absent in some of them."""


def read_config_text(folder: Path) -> str:
    """The text of a folder's config.json, line ends and all.

    Raises:
        UserError: It cannot be read.
    """
    path = folder / "config.json"
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a folder with a model's config.json.") from error


def parse_config(text: str, name: str) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        UserError: It is not a JSON object.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"the config.json of {name} is not valid JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"the config.json of {name} is not a JSON object: download it again.")
    return content


def written_config_text(source: Source, config: DecoderConfig, dtype: str | None = None) -> str:
    """The source's config.json with the MLP width of `config`, and the name of the dtype if one is given."""
    changes: dict[str, Any] = {FAMILIES[config.family].width_field: config.intermediate}
    if dtype is not None:
        changes |= {field: dtype for field in DTYPE_FIELDS if field in json.loads(source.config_text)}
    return edited(source.config_text, changes)


def edited(text: str, changes: dict[str, Any]) -> str:
    """The text of a JSON object with other values for some of its own fields, and not one other byte changed."""
    spans = _value_spans(text)
    result = text
    for field in sorted(changes, key=lambda field: spans[field], reverse=True):
        start, end = spans[field]
        result = result[:start] + json.dumps(changes[field]) + result[end:]
    if json.loads(result) != json.loads(text) | changes:
        raise AssertionError("the edit of config.json changed more than it should")
    return result


def _value_spans(text: str) -> dict[str, tuple[int, int]]:
    """Where the value of each field of a JSON object starts and ends in the object's text."""
    decoder, spans = json.JSONDecoder(), {}
    at = _past(r"\s*\{\s*", text, 0)
    while text[at] != "}":
        field, at = decoder.raw_decode(text, at)
        start = _past(r"\s*:\s*", text, at)
        _, end = decoder.raw_decode(text, start)
        spans[field] = (start, end)
        at = _past(r"\s*,?\s*", text, end)
    return spans


def _past(pattern: str, text: str, at: int) -> int:
    """Where a match of the pattern that starts at a place ends."""
    match = re.compile(pattern).match(text, at)
    assert match is not None  # the text has been parsed as JSON before
    return match.end()
