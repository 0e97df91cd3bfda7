"""A tiny model to plan runs of, the same as that of the tests of pruning, so that programs are compiled once."""

from tiny import DIVISIBLE

from spap_jax.models.registry import family_of
from spap_jax.settings import PruneSettings

CONFIG = family_of(DIVISIBLE).read_config(DIVISIBLE)
SHAPE = 16, 16
FORWARD = ("enter mlp", "leave mlp", "measure")
"""Programs that pass through the model alone: none of their products is at full precision."""

JOINT = PruneSettings(sparsity=0.25, rounds=2, joint_passes=0.5, batch_tokens=64, held_out=0.25)
