"""Qwen2 and Qwen2.5: LLaMA's table with biases on queries, keys and values."""

from spap_jax.models.families import Family, Field
from spap_jax.models.llama import CONSTANTS, FIELDS, RULES


def only_full_attention(layer_types: list[str] | None) -> bool:
    """Whether no layer uses a sliding window."""
    return set(layer_types or ()) <= {"full_attention"}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    # transformers takes 32 key/value heads where the field is missing, which fits few members: it must be there.
    fields=FIELDS | {"kv_heads": Field("num_key_value_heads"), "positions": Field("max_position_embeddings", 32768)},
    constants=CONSTANTS | {"qkv_bias": True, "output_bias": False, "mlp_bias": False},
    rules=RULES,
    inert=frozenset({"sliding_window", "max_window_layers"}),
    accepted={"layer_types": only_full_attention},
    recomputed=r"\.rotary_emb\.inv_freq$",
)
