"""Flax ports of the supported decoders."""

from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Block, Decoder
from spap_jax.models.registry import logical_axes

__all__ = ["Block", "Decoder", "DecoderConfig", "logical_axes"]
