"""Fields of config.json that transformers reads for every family: those without effect, and those restricted in value.

A family's table lists its own fields. transformers does not read any others, so they are ignored;
`tests/models/test_published_configs.py` checks the tables against the installed transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any

INERT = frozenset({
    # Names, versions, storage of weights and format of outputs.
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation",
    "_flash_attn_2_enabled", "_name_or_path", "architectures", "attn_implementation", "chunk_size_feed_forward",
    "dtype", "experts_implementation", "finetuning_task", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate", "tie_last_hidden_states",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache",
    # Read by training and initialisation only. pretraining_tp used to split products into parts with the same sum.
    "activation_dropout", "attention_dropout", "classifier_dropout", "dropout", "gradient_checkpointing",
    "hidden_dropout", "init_std", "initializer_factor", "initializer_range", "layerdrop", "pretraining_tp",
    "tf_legacy_loss",
    # For heads other than a language model's, and for models other than a standalone decoder.
    "id2label", "is_decoder", "label2id", "num_labels", "problem_type",
    # Special tokens and generation settings.
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Fields known to transformers that never change what a forward pass computes."""


def absent(value: Any) -> bool:
    """Whether a field's value is empty: null, or an empty list or object. The number 0 is not empty."""
    return value is None or value == [] or value == {}


def not_true(value: Any) -> bool:
    """Whether a switch is off."""
    return value is None or value is False


def full_attention(layer_types: Any) -> bool:
    """Whether every layer attends to all previous tokens."""
    return absent(layer_types) or (isinstance(layer_types, list) and set(map(str, layer_types)) == {"full_attention"})


ACCEPTED: Mapping[str, Callable[[Any], bool]] = {
    "attention_chunk_size": absent,
    "auto_map": absent,
    "decoder": absent,
    "fusion_config": absent,
    "generator": absent,
    "is_causal": lambda value: value is True,  # transformers treats null as false
    "is_encoder_decoder": not_true,
    "kv_sharing_modes": absent,
    "layer_types": full_attention,
    "per_layer_config": absent,
    "pruned_heads": absent,
    "quantization_config": lambda value: value is None,
    "sliding_window": absent,
    "text_config": absent,
    "text_encoder": absent,
}
"""Fields that affect what transformers computes in any family, each with a test for the values that ports support."""

REASONS: Mapping[str, str] = {
    "quantization_config": "this checkpoint is quantised (quantization_config is set), and pruning needs the weights "
    "themselves: start from the unquantised checkpoint.",
    "auto_map": "this checkpoint brings code of its own (auto_map is set), which is never run, so what the model "
    "computes is unknown: start from a checkpoint without it, or take auto_map out of config.json if transformers' own "
    "class computes this model.",
}
"""Specific error messages for unsupported values of some of these fields."""
