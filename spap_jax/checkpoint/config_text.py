"""config.json: read, and written with the fields that pruning changes; all others keep their values."""

import json
import warnings
from pathlib import Path
from typing import Any

from spap_jax.checkpoint.tensors import DTYPES
from spap_jax.errors import Notice, UserError, first_line, option
from spap_jax.models import DecoderConfig, Family, decoder_of, text_part, with_text
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
    parts = (text_part(theirs), theirs)
    named = next((part[field] for part in parts for field in DTYPE_FIELDS if part.get(field)), "float32")
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
    family, config = decoder_of(theirs)
    if ignored := family.ignored(text_part(theirs)):
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
    whole = json.loads(source.config_text)
    family, before = decoder_of(whole)
    theirs = text_part(whole)
    changes: dict[str, Any] = {family.width_field: config.intermediate}
    if before.layers != config.layers:
        changes |= {family.fields["layers"].name: config.layers}
        if isinstance(types := theirs.get("layer_types"), list):
            changes |= {"layer_types": types[: config.layers]}  # all alike, where the family does not say otherwise
        if config.layer_kinds:
            changes |= family.kind_fields(config.layer_kinds)
    if config.widths or WIDTHS_FIELD in theirs:
        changes |= {WIDTHS_FIELD: config.widths and list(config.widths)}
    if before.mlp_bias != config.mlp_bias:
        changes |= {str(family.mlp_bias_field): config.mlp_bias}
    if before.kv_heads != config.kv_heads:
        # Including head_dim: loaders that find none divide the model's width by the number of heads.
        changes |= {family.fields[name].name: getattr(config, name) for name in ("heads", "kv_heads", "head_dim")}
    if dtype is not None:
        changes |= {field: dtype for field in DTYPE_FIELDS if field in theirs}
        whole |= {field: dtype for field in DTYPE_FIELDS if field in whole}
    written = with_text(whole, changes)
    return source.config_text if written == json.loads(source.config_text) else json.dumps(written, indent=2) + "\n"


def check_describable(source: Source, config: DecoderConfig) -> None:
    """Refuses MLP biases and numbers of heads that no stock loader would read.

    Raises:
        UserError: `config` has biases for which config.json has no field, or fewer heads than the loaders accept.
    """
    family, before = decoder_of(json.loads(source.config_text))
    if before.kv_heads != config.kv_heads:
        family.check_heads(before, config.kv_heads)
    if before.mlp_bias != config.mlp_bias and family.mlp_bias_field is None:
        raise UserError(
            f"the config.json of {family.architecture} has no field for biases on the MLP alone, which the update "
            "'bias' adds, so stock loaders would lose them and this is not written: prune with "
            f"{option('update', 'none')} or {option('update', 'refit')}."
        )
