"""The supported families by name."""

from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from spap_jax.errors import UserError
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.families import Family
from spap_jax.models.gemma2 import GEMMA2
from spap_jax.models.gemma3 import GEMMA3
from spap_jax.models.glm4 import GLM4
from spap_jax.models.granite import GRANITE
from spap_jax.models.llama import LLAMA
from spap_jax.models.ministral3 import MINISTRAL3
from spap_jax.models.mistral import MISTRAL
from spap_jax.models.olmo2 import OLMO2
from spap_jax.models.olmo3 import OLMO3
from spap_jax.models.opt import OPT
from spap_jax.models.phi3 import PHI3
from spap_jax.models.qwen2 import QWEN2
from spap_jax.models.qwen3 import QWEN3
from spap_jax.models.qwen3_vl import QWEN3_VL
from spap_jax.models.smollm3 import SMOLLM3
from spap_jax.models.towers import PREFIXES, TOWERS, text_part, tower_of

_LIKE_LLAMA = (LLAMA, MISTRAL, MINISTRAL3, QWEN2, QWEN3, QWEN3_VL, SMOLLM3, GRANITE, PHI3)

FAMILIES = {family.name: family for family in (*_LIKE_LLAMA, GEMMA2, GEMMA3, OLMO2, OLMO3, GLM4, OPT)}


def logical_axes(config: DecoderConfig) -> Params:
    """Returns the names of the axes of each parameter of a ``Decoder``, for ``flax.linen.logical_to_mesh_sharding``.

    They are the axis letters of ``docs/architecture.md``; L is the axis along which blocks are stacked.
    """
    family = FAMILIES[config.family]

    def one(name: str, array: jax.ShapeDtypeStruct) -> PartitionSpec:
        letters = family.letters(name)
        return PartitionSpec(*"L" * (array.ndim - len(letters)), *letters)

    return decoder.map_named(one, decoder.shapes(config))


def family_of(theirs: dict[str, Any]) -> Family:
    """Returns the family of a decoder's part of a parsed config.json.

    It goes by the architecture in any case: early checkpoints say LLaMAForCausalLM.

    Raises:
        UserError: the family is not supported.
    """
    family = FAMILIES.get(str(theirs.get("model_type")))
    architectures = theirs.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(
            f"config.json gives architectures = {architectures!r}, which must be a list of names: correct it."
        )
    if family is not None and (not architectures or family.architecture.lower() in map(str.lower, architectures)):
        return family
    named = ", ".join(architectures) or f"model_type {theirs.get('model_type')!r}"
    known = {each.architecture: name for name, each in (FAMILIES | TOWERS).items()}
    supported = ", ".join(f"{architecture} (model_type {name})" for architecture, name in known.items())
    raise UserError(f"the architecture {named} is not supported; the supported ones are {supported}.")


def decoder_of(theirs: dict[str, Any]) -> tuple[Family, DecoderConfig]:
    """Returns the family and the config of the decoder that a parsed config.json describes, alone or in a tower.

    Raises:
        UserError: The model is not supported.
    """
    text = text_part(theirs)
    family = family_of(text)
    config = family.read_config(text)
    return family, config if tower_of(theirs) is None else replace(config, prefix=PREFIXES[0])
