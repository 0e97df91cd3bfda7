"""Flax ports of the supported decoders."""

from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Block, Cache, Decoder, Params, map_named, with_channels
from spap_jax.models.families import Family
from spap_jax.models.registry import FAMILIES, family_of, logical_axes
from spap_jax.models.rules import Rule

__all__ = [
    "FAMILIES",
    "Block",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Family",
    "Params",
    "Rule",
    "family_of",
    "logical_axes",
    "map_named",
    "with_channels",
]
