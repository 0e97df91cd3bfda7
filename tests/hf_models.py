"""Tiny transformers models of every supported variant, and their conversion by the family tables alone."""

import copy
import functools
from typing import Any

import numpy as np
import torch
import transformers

from spap_jax.checkpoint.inventory import split
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.registry import decoder_of

torch.set_num_threads(1)  # models are tiny, and waiting threads compete for the cores

Json = dict[str, Any]

POSITIONS = 768

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA = _COMMON | {"model_type": "llama", "intermediate_size": 53, "tie_word_embeddings": False}
_QWEN2 = _LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4}
_QWEN3 = _QWEN2 | {"model_type": "qwen3", "head_dim": 12, "num_key_value_heads": 2}
_MISTRAL = _LLAMA | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}
_MINISTRAL3 = _LLAMA | {
    "model_type": "ministral3",
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_parameters": {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 500.0,
        "factor": 16.0,
        "original_max_position_embeddings": 14,
        "mscale": 0.8,
        "mscale_all_dim": 0.4,
        "llama_4_scaling_beta": 0.7,
    },
}
_OLMO2 = _LLAMA | {"model_type": "olmo2"}
_OLMO3 = _OLMO2 | {
    "model_type": "olmo3",
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_GRANITE = _LLAMA | {
    "model_type": "granite",
    "num_key_value_heads": 2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.5,
    "logits_scaling": 0.7,
}
_GLM4 = _LLAMA | {"model_type": "glm4", "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-5}
_PHI3 = _LLAMA | {"model_type": "phi3", "num_key_value_heads": 2}
_SMOLLM3 = _LLAMA | {"model_type": "smollm3", "num_key_value_heads": 2}
_GEMMA3 = _LLAMA | {
    "model_type": "gemma3_text",
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": True,
}
_GEMMA2 = _GEMMA3 | {"model_type": "gemma2", "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}
_OPT = _COMMON | {"model_type": "opt", "ffn_dim": 53, "pad_token_id": 1, "word_embed_proj_dim": 32}
_LLAMA3_ROPE = {
    # Base and context put the eight wavelengths on both sides of the interpolated band and inside it.
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 96, "beta_fast": 8.0}

VARIANTS: dict[str, Json] = {
    "llama": _LLAMA,
    "llama_tied": _LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "llama_biases": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama_one_kv_head": _LLAMA | {"num_key_value_heads": 1},
    "llama_two_kv_heads": _LLAMA | {"num_key_value_heads": 2},
    "llama_head_dim": _LLAMA | {"head_dim": 12, "num_key_value_heads": 2},
    "llama_theta_v4": _LLAMA | {"rope_theta": 500.0},
    "llama_linear_rope_v4": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_linear_rope_v5": _LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama_llama3_rope_v4": _LLAMA | {"head_dim": 16, "rope_theta": 500.0, "rope_scaling": _LLAMA3_ROPE},
    "llama_llama3_rope_v5": _LLAMA | {"head_dim": 16, "rope_parameters": _LLAMA3_ROPE | {"rope_theta": 500.0}},
    "llama_yarn_v4": _LLAMA | {"head_dim": 16, "rope_theta": 500.0, "rope_scaling": _YARN},
    "llama_yarn_v5": _LLAMA | {"head_dim": 16, "rope_parameters": _YARN | {"rope_theta": 500.0, "beta_slow": 2.0}},
    "qwen2": _QWEN2,
    "qwen2_tied": _QWEN2 | {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "qwen2_one_kv_head": _QWEN2 | {"num_key_value_heads": 1, "use_sliding_window": False, "sliding_window": 16},
    "qwen2_two_kv_heads": _QWEN2 | {"num_key_value_heads": 2, "rope_theta": 1000000.0},
    "qwen3": _QWEN3,
    "qwen3_tied_biases": _QWEN3 | {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4},
    "mistral": _MISTRAL,
    "mistral_window": _MISTRAL | {"sliding_window": 9, "head_dim": 12},
    "ministral3": _MINISTRAL3,
    "gemma2": _GEMMA2,
    "gemma2_uncapped": {name: value for name, value in _GEMMA2.items() if name != "layer_types"}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 500.0},
    "gemma3": _GEMMA3,
    "gemma3_untied_v4": {name: value for name, value in _GEMMA3.items() if name != "layer_types"}
    | {"tie_word_embeddings": False, "sliding_window_pattern": 2, "rope_local_base_freq": 500.0, "rope_theta": 7000.0}
    | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "olmo2": _OLMO2,
    "olmo2_tied_biases": _OLMO2 | {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True},
    "olmo3": _OLMO3,
    "olmo3_yarn_v4": {name: value for name, value in _OLMO3.items() if name != "layer_types"}
    | {"num_hidden_layers": 4, "rope_theta": 500000.0, "rope_scaling": _YARN | {"attention_factor": 1.3}},
    "granite": _GRANITE,
    "granite_tied": _GRANITE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "glm4": _GLM4,
    "glm4_tied_v5": _GLM4
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.68}}
    | {"attention_bias": False, "tie_word_embeddings": True},
    "phi3": _PHI3,
    "phi3_window": _PHI3 | {"sliding_window": 9, "tie_word_embeddings": True, "rope_theta": 500.0},
    "smollm3": _SMOLLM3 | {"no_rope_layers": [1, 0, 1]},
    "smollm3_untied_biases": _SMOLLM3
    | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "no_rope_layer_interval": 2},
    "opt_125m_like": _OPT,
    "opt_350m_like": _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt_post_norm": _OPT | {"do_layer_norm_before": False},
    "opt_no_bias": _OPT | {"enable_bias": False},
    "opt_no_affine": _OPT | {"layer_norm_elementwise_affine": False},
    "opt_no_final_norm": _OPT | {"_remove_final_layer_norm": True},
    "opt_untied": _OPT | {"tie_word_embeddings": False},
    "opt_untied_projected": _OPT | {"tie_word_embeddings": False, "word_embed_proj_dim": 16},
    "opt_gelu": _OPT | {"activation_function": "gelu"},
    "opt_galactica_like": _OPT
    | {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False},
}
"""Name -> content of config.json, as users have it."""


_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,
}
TOWERS: dict[str, Json] = {
    "gemma3_tower": {
        "model_type": "gemma3",
        "text_config": {n: v for n, v in _GEMMA3.items() if n not in ("tie_word_embeddings", "pad_token_id")}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {n: v for n, v in _QWEN3.items() if n != "tie_word_embeddings"}
        | {
            "model_type": "qwen3_vl_text",
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": _QWEN3["hidden_size"],
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "tie_word_embeddings": True,
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
    "mistral3": {
        "model_type": "mistral3",
        "text_config": _MISTRAL | {"head_dim": 12},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 28,
            "patch_size": 7,
        },
        "image_token_index": 90,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    },
}
"""Models with a decoder inside: name -> content of config.json."""
TOWERS["ministral3_tower"] = TOWERS["mistral3"] | {"text_config": _MINISTRAL3}


@functools.cache
def hf_model(name: str) -> transformers.PreTrainedModel:
    """Return a variant with random weights, where no bias is 0 and no norm scale is 1, unlike when initialised."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy((VARIANTS | TOWERS)[name]))
    auto: Any = transformers.AutoModelForImageTextToText if name in TOWERS else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * (0.3 if "embed_" in parameter_name else 1.5 / parameter.shape[1] ** 0.5))
            else:
                parameter.copy_(0.3 * noise + (0.0 if parameter_name.endswith("bias") else 1.0))
    return model


def port(model: transformers.PreTrainedModel) -> tuple[DecoderConfig, Params]:
    """Convert a transformers model to this project's config and parameters."""
    family, config = decoder_of(model.config.to_dict())
    tensors = split(config, {name: tensor.float().numpy() for name, tensor in model.state_dict().items()})
    params: Params = {"embed": {}, "layers": {}, "head": {}}
    for rule in family.rules_for(config):
        if rule.stacked:
            layers = [tensors[rule.theirs.format(i=i)] for i in range(config.layers)]
            array = np.stack([rule.read(tensor, config.axes) for tensor in layers])
        else:
            array = rule.read(tensors[rule.theirs], config.axes)
        *branches, leaf = rule.ours.split("/")
        functools.reduce(lambda tree, branch: tree.setdefault(branch, {}), branches, params)[leaf] = array
    return config, params


def hf_logits(model: transformers.PreTrainedModel, tokens: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Compute the logits [B, T, v] of a transformers model; tokens, valid: [B, T]."""
    arguments = {"input_ids": torch.tensor(tokens, dtype=torch.long)}
    if valid is not None:
        mask = torch.tensor(valid, dtype=torch.long)
        # The positions that transformers uses in generation; its forward pass alone would count padding.
        arguments |= {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(**arguments).logits.float().numpy()
