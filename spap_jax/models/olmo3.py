"""Family table for OLMo 3: OLMo 2 with a window in three of four layers, and long contexts by yarn in the fourth."""

import dataclasses
from typing import Any

from spap_jax.models.families import Field
from spap_jax.models.layer_types import kind_fields, read_kinds, read_ropes
from spap_jax.models.olmo2 import OLMO2

BASE = 500000.0
"""Base of both rotary embeddings if config.json says none with the type of layer."""


def attention_kinds(theirs: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Reads which layers attend within a window, and both rotary embeddings."""
    return read_kinds(theirs, read, read_ropes(theirs, BASE, BASE), period=4)


OLMO3 = dataclasses.replace(
    OLMO2,
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    fields={**OLMO2.fields, "window": Field("sliding_window", 4096)},
    attention_kinds=attention_kinds,
    kind_fields=kind_fields,
    accepted={
        "layer_types": lambda _: True,
        # Versions of transformers differ in whether another base is also that of the layers with a window.
        "rope_theta": lambda value: value in (None, BASE),
    },
)
