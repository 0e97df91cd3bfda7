"""Family table for OPT, 125m to 66b, and Galactica."""

from spap_jax.models.config import AttentionKind
from spap_jax.models.families import Family, Field
from spap_jax.models.rules import Rule


def derived(read: dict) -> dict:
    """Derives sizes and switches that OPT's config does not state directly."""
    return {
        "kv_heads": read["heads"],
        "head_dim": read["width"] // read["heads"],
        "output_bias": read["qkv_bias"],
        "mlp_bias": read["qkv_bias"],
        "norms": ("input",) if read["pre_norm"] else ("sum",),
        "final_norm": read["pre_norm"] and not read["final_norm_removed"],
    }


OPT = Family(
    name="opt",
    architecture="OPTForCausalLM",
    fields={
        "vocabulary": Field("vocab_size"),
        "layers": Field("num_hidden_layers"),
        "width": Field("hidden_size"),
        "embedding": Field("word_embed_proj_dim", absent=lambda read: read["width"]),
        "intermediate": Field("ffn_dim"),
        "heads": Field("num_attention_heads"),
        "positions": Field("max_position_embeddings", 2048),
        "activation": Field("activation_function", "relu"),
        "pre_norm": Field("do_layer_norm_before", True),
        "final_norm_removed": Field("_remove_final_layer_norm", False),
        "norm_affine": Field("layer_norm_elementwise_affine", True),
        "qkv_bias": Field("enable_bias", True),
        "tied": Field("tie_word_embeddings", True),
    },
    constants={
        "attention_kinds": (AttentionKind(None),),
        "position_offset": 2,
        "norm": "layer",
        "norm_eps": 1e-5,
        "gated": False,
    },
    derived=derived,
    rules=(
        Rule("model.decoder.embed_tokens.weight", "embed/tokens", "v e -> v e"),
        Rule("model.decoder.embed_positions.weight", "embed/positions", "p d -> p d"),
        Rule("model.decoder.project_in.weight", "embed/project_in", "d e -> e d"),
        Rule("model.decoder.layers.{i}.self_attn_layer_norm.weight", "layers/attention_norm/scale", "d -> d"),
        Rule("model.decoder.layers.{i}.self_attn_layer_norm.bias", "layers/attention_norm/bias", "d -> d"),
        Rule("model.decoder.layers.{i}.self_attn.q_proj.weight", "layers/attention/q", "(n h) d -> d n h"),
        Rule("model.decoder.layers.{i}.self_attn.k_proj.weight", "layers/attention/k", "(m h) d -> d m h"),
        Rule("model.decoder.layers.{i}.self_attn.v_proj.weight", "layers/attention/v", "(m h) d -> d m h"),
        Rule("model.decoder.layers.{i}.self_attn.out_proj.weight", "layers/attention/o", "d (n h) -> n h d"),
        Rule("model.decoder.layers.{i}.self_attn.q_proj.bias", "layers/attention/q_bias", "(n h) -> n h"),
        Rule("model.decoder.layers.{i}.self_attn.k_proj.bias", "layers/attention/k_bias", "(m h) -> m h"),
        Rule("model.decoder.layers.{i}.self_attn.v_proj.bias", "layers/attention/v_bias", "(m h) -> m h"),
        Rule("model.decoder.layers.{i}.self_attn.out_proj.bias", "layers/attention/o_bias", "d -> d"),
        Rule("model.decoder.layers.{i}.final_layer_norm.weight", "layers/mlp_norm/scale", "d -> d"),
        Rule("model.decoder.layers.{i}.final_layer_norm.bias", "layers/mlp_norm/bias", "d -> d"),
        Rule("model.decoder.layers.{i}.fc1.weight", "layers/mlp/up", "f d -> d f"),
        Rule("model.decoder.layers.{i}.fc1.bias", "layers/mlp/up_bias", "f -> f"),
        Rule("model.decoder.layers.{i}.fc2.weight", "layers/mlp/down", "d f -> f d"),
        Rule("model.decoder.layers.{i}.fc2.bias", "layers/mlp/down_bias", "d -> d"),
        Rule("model.decoder.final_layer_norm.weight", "head/norm/scale", "d -> d"),
        Rule("model.decoder.final_layer_norm.bias", "head/norm/bias", "d -> d"),
        Rule("model.decoder.project_out.weight", "head/project_out", "e d -> d e"),
        Rule("lm_head.weight", "head/weight", "v e -> v e"),
    ),
)
