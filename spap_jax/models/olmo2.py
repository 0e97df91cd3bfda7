"""Family table for OLMo 2: norms on the output of attention and MLP, and on all queries and all keys of a token."""

from spap_jax.models.families import Family, Field
from spap_jax.models.llama import CONSTANTS, FIELDS, RULES
from spap_jax.models.rules import Rule

OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=FIELDS
    | {"norm_eps": Field("rms_norm_eps", 1e-5)}
    | {"qkv_bias": Field("attention_bias", False), "output_bias": Field("attention_bias", False)},
    constants=CONSTANTS | {"mlp_bias": False, "norms": ("output",), "query_key_norm": "all"},
    rules=(
        *(rule for rule in RULES if "_norm/" not in rule.ours),
        Rule("model.layers.{i}.self_attn.q_norm.weight", "layers/attention/q_norm", "(n h) -> n h"),
        Rule("model.layers.{i}.self_attn.k_norm.weight", "layers/attention/k_norm", "(m h) -> m h"),
        Rule("model.layers.{i}.post_attention_layernorm.weight", "layers/attention_output_norm/scale", "d -> d"),
        Rule("model.layers.{i}.post_feedforward_layernorm.weight", "layers/mlp_output_norm/scale", "d -> d"),
    ),
)
