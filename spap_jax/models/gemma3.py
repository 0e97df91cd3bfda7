"""Family table for Gemma 3 text models: 270m and 1b, the decoders of 4b to 27b, and models of the same architecture.

Scales of norms are stored less 1, norms surround attention and MLP, and embedded tokens are scaled. Most layers attend
within a window, with a rotary embedding of their own; some to all previous tokens.
"""

import math
from typing import Any

from spap_jax.models.families import Family, Field
from spap_jax.models.kinds import of_kind
from spap_jax.models.layer_types import kind_fields, read_kinds, read_ropes
from spap_jax.models.llama import CONSTANTS, FIELDS, RULES
from spap_jax.models.published import absent, not_true
from spap_jax.models.qwen3 import QUERY_KEY_NORMS
from spap_jax.models.rules import Rule


def attention_kinds(theirs: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Reads which layers attend within a window, and both rotary embeddings."""
    period = of_kind("sliding_window_pattern", theirs.get("sliding_window_pattern", 6), int)
    ropes = read_ropes(theirs, theirs.get("rope_local_base_freq", 10000.0), theirs.get("rope_theta", 1000000.0))
    return read_kinds(theirs, read, ropes, period)


def derived(read: dict[str, Any]) -> dict[str, Any]:
    """Derives the scales of embedded tokens and queries."""
    return {
        "embedding_scale": math.sqrt(read["width"]),
        "query_scale": math.sqrt(read["head_dim"] / read["score_divisor"]),
    }


GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    # The text models of 4b leave out the sizes that transformers assumes; all others give theirs.
    fields=FIELDS
    | {"vocabulary": Field("vocab_size", 262208), "heads": Field("num_attention_heads", 8)}
    | {"kv_heads": Field("num_key_value_heads", 4), "head_dim": Field("head_dim", 256)}
    | {"activation": Field("hidden_activation", "gelu_pytorch_tanh"), "tied": Field("tie_word_embeddings", True)}
    | {"positions": Field("max_position_embeddings", 131072), "window": Field("sliding_window", 4096)}
    | {"score_divisor": Field("query_pre_attn_scalar", 256)},
    constants=CONSTANTS
    | {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    | {"norms": ("input", "output"), "norm_shift": 1.0, "query_key_norm": "head"},
    derived=derived,
    attention_kinds=attention_kinds,
    kind_fields=kind_fields,
    rules=(
        *(rule for rule in RULES if rule.ours != "layers/mlp_norm/scale"),
        *QUERY_KEY_NORMS,
        Rule("model.layers.{i}.post_attention_layernorm.weight", "layers/attention_output_norm/scale", "d -> d"),
        Rule("model.layers.{i}.pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", "d -> d"),
        Rule("model.layers.{i}.post_feedforward_layernorm.weight", "layers/mlp_output_norm/scale", "d -> d"),
    ),
    inert=frozenset({"sliding_window_pattern", "rope_local_base_freq"}),
    accepted={
        "attention_bias": not_true,
        "attn_logit_softcapping": absent,
        "final_logit_softcapping": absent,
        "layer_types": lambda _: True,
        "use_bidirectional_attention": not_true,
    },
    heads_divide_width=True,
)
