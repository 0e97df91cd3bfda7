"""Family table for the text model of Qwen3-VL: Qwen3 with a position for each of three axes.

Those of text are alike, so that its rotary embedding is the plain one, whatever parts of a head an axis rotates.
"""

import dataclasses
from typing import Any

from spap_jax.models.config import AttentionKind
from spap_jax.models.families import Field
from spap_jax.models.qwen3 import QWEN3
from spap_jax.models.rope import read_rope

AXES = ("mrope_interleaved", "mrope_section")
"""Fields that say which channels of a head rotate by which of the three positions of a part of an image."""


def attention_kinds(theirs: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Reads the rotary embedding without what concerns images."""
    plain = dict(theirs)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(scaling := theirs.get(name), dict):
            plain[name] = {field: value for field, value in scaling.items() if field not in AXES}
    return {"attention_kinds": (AttentionKind(read_rope(plain)),)}


QWEN3_VL = dataclasses.replace(
    QWEN3,
    name="qwen3_vl_text",
    architecture="Qwen3VLForConditionalGeneration",
    fields={**QWEN3.fields, "positions": Field("max_position_embeddings", 128000)},
    attention_kinds=attention_kinds,
    inert=frozenset(),
    accepted={},
)
