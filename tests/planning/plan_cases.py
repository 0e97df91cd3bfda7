"""A tiny model to plan runs of, the same as that of the tests of pruning, so that programs are compiled once."""

from spap_jax.models.registry import family_of
from spap_jax.settings import PruneSettings

THEIRS = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
CONFIG = family_of(THEIRS).read_config(THEIRS)
SHAPE = 16, 16
JOINT = PruneSettings(sparsity=0.25, rounds=2, joint_passes=0.5, batch_tokens=64, held_out=0.25)
