"""Family table for dense Mistral models: LLaMA's table with a sliding window in early versions."""

from spap_jax.models.families import Family, Field
from spap_jax.models.llama import CONSTANTS, FIELDS, RULES
from spap_jax.models.published import absent

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    # Without these fields, transformers assumes the window of the first version, and 8 key/value heads.
    fields=FIELDS
    | {"kv_heads": Field("num_key_value_heads", 8, absent=lambda read: read["heads"])}
    | {"window": Field("sliding_window", 4096, absent=lambda read: None)}
    | {"positions": Field("max_position_embeddings", 131072)},
    accepted={"layer_types": absent},  # with any, transformers takes another class, which has no window
    constants=CONSTANTS | {"qkv_bias": False, "output_bias": False, "mlp_bias": False},
    rules=RULES,
)
