"""Flax ports of the supported decoders."""

from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Block, Cache, Decoder, Params, map_named, with_channels
from spap_jax.models.families import Family
from spap_jax.models.registry import FAMILIES, decoder_of, family_of, logical_axes
from spap_jax.models.rules import Rule
from spap_jax.models.towers import TOWERS, architecture_of, named_as, text_part, with_text

__all__ = [
    "FAMILIES",
    "TOWERS",
    "Block",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Family",
    "Params",
    "Rule",
    "architecture_of",
    "decoder_of",
    "family_of",
    "logical_axes",
    "map_named",
    "named_as",
    "text_part",
    "with_channels",
    "with_text",
]
