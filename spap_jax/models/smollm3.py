"""Family table for SmolLM3: LLaMA's table, without rotary embedding in some layers."""

from typing import Any

from spap_jax.errors import UserError
from spap_jax.models.config import AttentionKind
from spap_jax.models.families import Family, Field
from spap_jax.models.llama import CONSTANTS, FIELDS, RULES
from spap_jax.models.published import not_true
from spap_jax.models.rope import read_rope


def attention_kinds(theirs: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Reads which layers have a rotary embedding: those listed, or all but every fourth."""
    given = theirs.get("no_rope_layers")
    if given is None:  # the field says where there is one, other than its name
        interval = read["plain_interval"]
        given = [int((layer + 1) % interval != 0) for layer in range(read["layers"])]
    if not isinstance(given, list) or len(given) < read["layers"] or any(rotated not in (0, 1) for rotated in given):
        raise UserError(
            f"config.json gives no_rope_layers = {given!r}, which must be 0 or 1 for each of the {read['layers']} "
            "layers: correct it."
        )
    rotated = AttentionKind(read_rope({"rope_theta": 2000000.0} | theirs))
    return {"attention_kinds": (AttentionKind(None), rotated), "layer_kinds": tuple(map(int, given[: read["layers"]]))}


SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    fields=FIELDS
    | {"kv_heads": Field("num_key_value_heads", 4, absent=lambda read: read["heads"])}
    | {"positions": Field("max_position_embeddings", 32768), "tied": Field("tie_word_embeddings", True)}
    | {"qkv_bias": Field("attention_bias", False), "output_bias": Field("attention_bias", False)}
    | {"mlp_bias": Field("mlp_bias", False), "plain_interval": Field("no_rope_layer_interval", 4)},
    constants=CONSTANTS,
    rules=RULES,
    attention_kinds=attention_kinds,
    kind_fields=lambda kinds: {"no_rope_layers": list(kinds)},
    inert=frozenset({"sliding_window"}),
    accepted={"use_sliding_window": not_true, "no_rope_layers": lambda _: True},
)
