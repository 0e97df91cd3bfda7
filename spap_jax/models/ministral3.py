"""Family table for Ministral 3: Mistral's, with long contexts by yarn and queries that grow with the position."""

import dataclasses
from typing import Any

from spap_jax.models.config import AttentionKind
from spap_jax.models.families import Field
from spap_jax.models.kinds import of_kind
from spap_jax.models.mistral import MISTRAL
from spap_jax.models.published import absent
from spap_jax.models.rope import read_rope

GROWTH = "llama_4_scaling_beta"
"""The entry of rope_parameters that says how queries grow."""


def attention_kinds(theirs: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Reads the rotary embedding, which has to be given."""
    given = of_kind("rope_parameters", theirs.get("rope_parameters"), dict)
    growth = of_kind(GROWTH, given.get(GROWTH), float)
    plain = {name: value for name, value in given.items() if name not in (GROWTH, "max_position_embeddings")}
    rope = dataclasses.replace(read_rope({"rope_parameters": plain}), query_growth=growth)
    return {"attention_kinds": (AttentionKind(rope, read["window"]),)}


MINISTRAL3 = dataclasses.replace(
    MISTRAL,
    name="ministral3",
    architecture="Ministral3ForCausalLM",
    fields={
        **MISTRAL.fields,
        "head_dim": Field("head_dim", 128, absent=lambda read: read["width"] // read["heads"]),
        "norm_eps": Field("rms_norm_eps", 1e-5),
        "positions": Field("max_position_embeddings", 262144),
        "window": Field("sliding_window", absent=lambda read: None),
    },
    attention_kinds=attention_kinds,
    accepted={**MISTRAL.accepted, "rope_theta": absent, "rope_scaling": absent},
)
