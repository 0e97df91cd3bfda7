"""Family table for LLaMA 1, 2, 3, 3.1, 3.2 and models of the same architecture."""

from spap_jax.models.families import Family, Field
from spap_jax.models.rules import Rule

FIELDS = {
    "vocabulary": Field("vocab_size"),
    "layers": Field("num_hidden_layers"),
    "width": Field("hidden_size"),
    "embedding": Field("hidden_size"),
    "intermediate": Field("intermediate_size"),
    "heads": Field("num_attention_heads"),
    "kv_heads": Field("num_key_value_heads", absent=lambda read: read["heads"]),
    "head_dim": Field("head_dim", absent=lambda read: read["width"] // read["heads"]),
    "positions": Field("max_position_embeddings", 2048),
    "norm_eps": Field("rms_norm_eps", 1e-6),
    "activation": Field("hidden_act", "silu"),
    "tied": Field("tie_word_embeddings", False),
}

CONSTANTS = {
    "position_offset": None,
    "norm": "rms",
    "norm_affine": True,
    "norms": ("input",),
    "final_norm": True,
    "gated": True,
}

RULES = (
    Rule("model.embed_tokens.weight", "embed/tokens", "v e -> v e"),
    Rule("model.layers.{i}.input_layernorm.weight", "layers/attention_norm/scale", "d -> d"),
    Rule("model.layers.{i}.self_attn.q_proj.weight", "layers/attention/q", "(n h) d -> d n h"),
    Rule("model.layers.{i}.self_attn.k_proj.weight", "layers/attention/k", "(m h) d -> d m h"),
    Rule("model.layers.{i}.self_attn.v_proj.weight", "layers/attention/v", "(m h) d -> d m h"),
    Rule("model.layers.{i}.self_attn.o_proj.weight", "layers/attention/o", "d (n h) -> n h d"),
    Rule("model.layers.{i}.self_attn.q_proj.bias", "layers/attention/q_bias", "(n h) -> n h"),
    Rule("model.layers.{i}.self_attn.k_proj.bias", "layers/attention/k_bias", "(m h) -> m h"),
    Rule("model.layers.{i}.self_attn.v_proj.bias", "layers/attention/v_bias", "(m h) -> m h"),
    Rule("model.layers.{i}.self_attn.o_proj.bias", "layers/attention/o_bias", "d -> d"),
    Rule("model.layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "d -> d"),
    Rule("model.layers.{i}.mlp.gate_proj.weight", "layers/mlp/gate", "f d -> d f"),
    Rule("model.layers.{i}.mlp.up_proj.weight", "layers/mlp/up", "f d -> d f"),
    Rule("model.layers.{i}.mlp.down_proj.weight", "layers/mlp/down", "d f -> f d"),
    Rule("model.layers.{i}.mlp.gate_proj.bias", "layers/mlp/gate_bias", "f -> f"),
    Rule("model.layers.{i}.mlp.up_proj.bias", "layers/mlp/up_bias", "f -> f"),
    Rule("model.layers.{i}.mlp.down_proj.bias", "layers/mlp/down_bias", "d -> d"),
    Rule("model.norm.weight", "head/norm/scale", "d -> d"),
    Rule("lm_head.weight", "head/weight", "v e -> v e"),
)

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields=FIELDS
    | {"qkv_bias": Field("attention_bias", False), "output_bias": Field("attention_bias", False)}
    | {"mlp_bias": Field("mlp_bias", False)},
    constants=CONSTANTS,
    rules=RULES,
    heads_divide_width=True,
)
