"""config.json as text: parsed to be read, edited in place to be written.

Regenerating a config loses or renames fields that some loader reads, so everything but edited values and needed fields
that were missing stays byte for byte.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from spap_jax.checkpoint.tensors import DTYPES
from spap_jax.errors import Notice, UserError, first_line, option
from spap_jax.models import FAMILIES, DecoderConfig, Family, family_of
from spap_jax.models.model import Source
from spap_jax.models.widths import WIDTHS_FIELD

DTYPE_FIELDS = ("torch_dtype", "dtype")
"""Fields of config.json that name the dtype of the weights; some configs lack one or the other."""


def read_config_text(file: Path) -> str:
    """Reads a config.json as text, with its line ends.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): name a folder with a model's config.json.") from error


def read_config(file: Path, name: str) -> tuple[DecoderConfig, int]:
    """Reads a config.json: the config, and the bytes of a stored weight in its dtype (by default float32).

    ``name`` is the model's in errors.

    Raises:
        UserError: It cannot be read, or the model is not supported.
    """
    text = read_config_text(file)
    _, config = understood(text, name)
    theirs = json.loads(text)
    named = next((theirs[field] for field in DTYPE_FIELDS if theirs.get(field)), "float32")
    return config, DTYPES.get(str(named), DTYPES["float32"]).itemsize


def understood(text: str, name: str) -> tuple[Family, DecoderConfig]:
    """Returns the family and the config of a config.json's text; one `Notice` names the ignored fields, if any.

    ``name`` is the model's in errors.

    Raises:
        UserError: It is not a JSON object, or the model is not supported.
    """
    try:
        theirs = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = first_line(error)
        raise UserError(f"the config.json of {name} is not valid JSON ({said}): download it again.") from error
    if not isinstance(theirs, dict):
        raise UserError(f"the config.json of {name} is not a JSON object: download it again.")
    family = family_of(theirs)
    config = family.read_config(theirs)
    if ignored := family.ignored(theirs):
        reader = f"transformers' {family.architecture}"
        said = f"config.json of {name}: ignoring {', '.join(ignored)}, which {reader} does not read"
        warnings.warn(said, Notice, stacklevel=1)  # names this line for all callers: once for each model
    return family, config


def written_config_text(source: Source, config: DecoderConfig, dtype: str | None = None) -> str:
    """The source's config.json with the widths and biases of `config`, and the name of the dtype if one is given.

    Raises:
        UserError: It has no field for the biases, or stock loaders would not accept the number of heads.
    """
    check_describable(source, config)
    theirs, family = json.loads(source.config_text), FAMILIES[config.family]
    before = family.read_config(theirs)
    changes: dict[str, Any] = {family.width_field: config.intermediate}
    if config.widths or WIDTHS_FIELD in theirs:
        changes |= {WIDTHS_FIELD: config.widths and list(config.widths)}
    if before.mlp_bias != config.mlp_bias:
        changes |= {str(family.mlp_bias_field): config.mlp_bias}
    if before.kv_heads != config.kv_heads:
        # Including head_dim: loaders that find none divide the model's width by the number of heads.
        changes |= {family.fields[name].name: getattr(config, name) for name in ("heads", "kv_heads", "head_dim")}
    if dtype is not None:
        changes |= {field: dtype for field in DTYPE_FIELDS if field in theirs}
    return edited(source.config_text, changes)


def check_describable(source: Source, config: DecoderConfig) -> None:
    """Refuses MLP biases and numbers of heads that no stock loader would read.

    Raises:
        UserError: `config` has biases for which config.json has no field, or fewer heads than the loaders accept.
    """
    family = FAMILIES[config.family]
    before = family.read_config(json.loads(source.config_text))
    if before.kv_heads != config.kv_heads:
        family.check_heads(before, config.kv_heads)
    if before.mlp_bias != config.mlp_bias and family.mlp_bias_field is None:
        raise UserError(
            f"the config.json of {family.architecture} has no field for biases on the MLP alone, which the update "
            "'bias' adds, so stock loaders would lose them and this is not written: prune with "
            f"{option('update', 'none')} or {option('update', 'refit')}."
        )


def edited(text: str, changes: dict[str, Any]) -> str:
    """Replaces the values of some fields in the text of a JSON object, without changing any other byte.

    Missing fields are added after the last one, in its layout; the object must have at least one field.
    """
    places = _places(text)
    last = max(places.values(), key=lambda place: place.end)
    added = (f",{last.lead}{json.dumps(f)}{last.colon}{json.dumps(v)}" for f, v in changes.items() if f not in places)
    result = text[: last.end] + "".join(added) + text[last.end :]
    for field in sorted(changes.keys() & places.keys(), key=lambda field: places[field].start, reverse=True):
        place = places[field]
        result = result[: place.start] + json.dumps(changes[field]) + result[place.end :]
    if json.loads(result) != json.loads(text) | changes:
        raise AssertionError("the edit of config.json changed more than it should")
    return result


class _Place(NamedTuple):
    """A field in a JSON text: ``lead`` precedes its name, ``colon`` its value, from ``start`` to ``end``."""

    lead: str
    colon: str
    start: int
    end: int


def _places(text: str) -> dict[str, _Place]:
    """Finds the position of each field in the text of a JSON object."""
    decoder, places = json.JSONDecoder(), {}
    at = _past(r"\s*\{", text, 0)
    while text[name := _past(r"\s*", text, at)] != "}":
        field, named = decoder.raw_decode(text, name)
        start = _past(r"\s*:\s*", text, named)
        _, end = decoder.raw_decode(text, start)
        places[field] = _Place(text[at:name], text[named:start], start, end)
        at = _past(r"\s*,?", text, end)
    return places


def _past(pattern: str, text: str, at: int) -> int:
    """The index at which a match of the pattern from a given index ends."""
    match = re.compile(pattern).match(text, at)
    assert match is not None  # the text has been parsed as JSON before
    return match.end()
