"""Family table for dense Qwen3 models: LLaMA's table with norms on the queries and keys of each head."""

from spap_jax.models.families import Family, Field
from spap_jax.models.llama import CONSTANTS, FIELDS, RULES
from spap_jax.models.published import not_true
from spap_jax.models.rules import Rule

QUERY_KEY_NORMS = (
    Rule("model.layers.{i}.self_attn.q_norm.weight", "layers/attention/q_norm", "h -> h"),
    Rule("model.layers.{i}.self_attn.k_norm.weight", "layers/attention/k_norm", "h -> h"),
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    # transformers defaults to 32 key/value heads, which is right for few models, so the field is required here.
    fields=FIELDS
    | {"kv_heads": Field("num_key_value_heads"), "head_dim": Field("head_dim", 128)}
    | {"positions": Field("max_position_embeddings", 32768)}
    | {"qkv_bias": Field("attention_bias", False), "output_bias": Field("attention_bias", False)},
    constants=CONSTANTS | {"mlp_bias": False, "query_key_norm": "head"},
    rules=RULES + QUERY_KEY_NORMS,
    inert=frozenset({"sliding_window", "max_window_layers"}),
    accepted={"use_sliding_window": not_true},
)
