"""The config of a tiny model: eight devices divide its vocabulary, channels and query heads, but not its keys."""

DIVISIBLE = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
