"""Small runs to plan, and their programs, compiled."""

from typing import Any

from spap_jax.models.config import DecoderConfig
from spap_jax.models.registry import family_of
from spap_jax.planning.programs import Program, programs
from spap_jax.planning.workload import Workload, workload
from spap_jax.settings import PruneSettings

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 512,
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "ffn_dim": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}


def config_of(theirs: dict, **changes: object) -> DecoderConfig:
    theirs = theirs | changes
    return family_of(theirs).read_config(theirs)


def load_of(
    config: DecoderConfig, sequences: int, length: int, count: int, bytes: int = 4, sharers: int = 1, **settings
) -> Workload:
    """Return the workload of a run on CPUs, where attention computes one group of heads at a time."""
    chosen = PruneSettings(sparsity=0.25, held_out=0.5, rounds=2, steps=200)
    chosen = chosen.replace(compute_dtype="float32", moment_dtype="float32").replace(**settings)
    return workload(config, chosen, sequences, length, count, sharers, bytes, "cpu")


def by_name(load: Workload) -> dict[str, Program]:
    """Return the programs of a run in the mesh around; of those for fitted and held-out sequences, the former."""
    found: dict[str, Any] = {}
    for program in programs(load):
        found.setdefault(program.name, program)
    return found
