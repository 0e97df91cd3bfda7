"""Family table for GLM-4 (2025): four norms in a block, and rotary embeddings of neighbours in half of each head."""

import dataclasses
from typing import Any

from spap_jax.errors import UserError
from spap_jax.models.config import AttentionKind
from spap_jax.models.families import Family, Field
from spap_jax.models.kinds import of_kind
from spap_jax.models.llama import CONSTANTS, FIELDS, RULES
from spap_jax.models.phi3 import PHI3
from spap_jax.models.rope import read_rope
from spap_jax.models.rules import Rule

SHARE = "partial_rotary_factor"
"""The field that says which part of a head is rotated, beside the base or with it."""


def attention_kinds(theirs: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Reads the rotary embedding, of half of each head unless it says otherwise."""
    given = of_kind("rope_parameters", theirs.get("rope_parameters") or {}, dict)
    share = of_kind(SHARE, given.get(SHARE, theirs.get(SHARE, 0.5)), float)
    if not 0 < share <= 1 or int(read["head_dim"] * share) % 2:
        raise UserError(
            f"config.json gives {SHARE} = {share} of heads of width {read['head_dim']}, which must be a part of them "
            "with an even number of channels: correct it."
        )
    plain = {name: value for name, value in theirs.items() if name != SHARE}
    plain["rope_parameters"] = {name: value for name, value in given.items() if name != SHARE}
    return {"attention_kinds": (AttentionKind(dataclasses.replace(read_rope(plain), share=share, interleaved=True)),)}


GLM4 = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    fields=FIELDS
    | {"kv_heads": Field("num_key_value_heads", 2), "head_dim": Field("head_dim", 128)}
    | {"positions": Field("max_position_embeddings", 131072), "norm_eps": Field("rms_norm_eps", 1.5625e-07)}
    | {"qkv_bias": Field("attention_bias", True)},
    constants=CONSTANTS | {"output_bias": False, "mlp_bias": False, "norms": ("input", "output")},
    attention_kinds=attention_kinds,
    rules=(
        *RULES,
        Rule("model.layers.{i}.post_self_attn_layernorm.weight", "layers/attention_output_norm/scale", "d -> d"),
        Rule("model.layers.{i}.post_mlp_layernorm.weight", "layers/mlp_output_norm/scale", "d -> d"),
    ),
    fused={whole: parts for whole, parts in PHI3.fused.items() if "gate_up" in whole},
)
