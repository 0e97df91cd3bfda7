"""Family table for Qwen2 and Qwen2.5: LLaMA's table with biases on queries, keys and values."""

from spap_jax.models.families import Family, Field
from spap_jax.models.llama import CONSTANTS, FIELDS, RULES
from spap_jax.models.published import not_true

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    # transformers defaults to 32 key/value heads, which is right for few models, so the field is required here.
    fields=FIELDS | {"kv_heads": Field("num_key_value_heads"), "positions": Field("max_position_embeddings", 32768)},
    constants=CONSTANTS | {"qkv_bias": True, "output_bias": False, "mlp_bias": False},
    rules=RULES,
    inert=frozenset({"sliding_window", "max_window_layers"}),
    accepted={"use_sliding_window": not_true},
)
