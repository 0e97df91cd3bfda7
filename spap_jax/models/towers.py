"""Decoders inside models that read more than text: which models have one, and where it is.

``config.json`` has the decoder's part under ``text_config``, and the names of its tensors begin with a prefix. Nothing
else of such a model is read: its other tensors are copied as they are.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig
from spap_jax.models.families import Family

TEXT = "text_config"
"""The field of config.json with the decoder's part."""

PREFIXES = ("model.language_model.", "language_model.model.")
"""What the names of the decoder's tensors begin with: as transformers saves them since 4.52, and before."""

_FOR_ALL = ("auto_map", "quantization_config", "tie_word_embeddings")
"""Fields that apply to the decoder from outside of its part, too, where they take precedence."""


class Tower(NamedTuple):
    """A kind of model with a decoder inside.

    Attributes:
        name: ``model_type`` in config.json.
        architecture: The class that stock loaders instantiate.
        families: Names of the families that the decoder may be of; each is of one kind of model only.
    """

    name: str
    architecture: str
    families: tuple[str, ...]


TOWERS = {
    tower.name: tower
    for tower in (
        Tower("gemma3", "Gemma3ForConditionalGeneration", ("gemma3_text",)),
        Tower("mistral3", "Mistral3ForConditionalGeneration", ("mistral", "ministral3")),
        Tower("qwen3_vl", "Qwen3VLForConditionalGeneration", ("qwen3_vl_text",)),
    )
}


def tower_of(theirs: dict[str, Any]) -> Tower | None:
    """Returns the kind of model of a parsed config.json; None for a decoder by itself."""
    return TOWERS.get(str(theirs.get("model_type")))


def architecture_of(family: Family, config: DecoderConfig) -> str:
    """Returns the class that stock loaders instantiate for the whole model."""
    whole = (tower.architecture for tower in TOWERS.values() if family.name in tower.families)
    return next(whole) if config.in_tower else family.architecture


def text_part(theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns the decoder's part of a parsed config.json, which is all of it for a decoder by itself.

    Raises:
        UserError: There is no such part, or it is of no family that this kind of model has.
    """
    tower = tower_of(theirs)
    if tower is None:
        return theirs
    text = theirs.get(TEXT)
    if not isinstance(text, dict) or text.get("model_type") not in tower.families:
        found = f"of model_type {text.get('model_type')!r}" if isinstance(text, dict) else repr(text)
        raise UserError(
            f"config.json gives a {TEXT} {found}, where {tower.architecture} is supported with one of "
            f"{' or '.join(tower.families)}: get a checkpoint with such a text model."
        )
    return {name: value for name, value in text.items() if name != "architectures"} | {
        name: theirs[name] for name in _FOR_ALL if name in theirs
    }


def with_text(theirs: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns a parsed config.json with changed fields in the decoder's part."""
    return theirs | (changes if tower_of(theirs) is None else {TEXT: theirs[TEXT] | changes})


def named_as(config: DecoderConfig, names: Iterable[str], model: str) -> DecoderConfig:
    """Returns the config of a decoder inside ``model`` with the prefix of the names of its tensors.

    Raises:
        UserError: No names have one of the prefixes.
    """
    names = list(names)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return replace(config, prefix=prefix)
    raise UserError(
        f"{model} holds no text model: no names of its tensors begin with {' or '.join(PREFIXES)}. Get a checkpoint "
        "with all parts of the model."
    )
