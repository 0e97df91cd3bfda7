"""Tiny models, and a text that they can learn."""

import functools

import hf_models
import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.models.model import Model, Source
from spap_jax.settings import FinetuneSettings

SETTINGS = FinetuneSettings(
    steps=6, check_every=3, step_sequences=4, learning_rate=1e-2, lora_rank=4, held_out=0.25, batch_tokens=48
)
FULL = SETTINGS.replace(full=True, lora_rank=None)


@functools.cache
def tiny(variant: str = "llama_two_kv_heads", dtype: str = "float32") -> Model:
    """Return a variant of `hf_models` in memory."""
    config, params = hf_models.port(hf_models.hf_model(variant))
    return Model(config, jax.tree.map(lambda a: jnp.asarray(a, dtype), params), Source(variant, None, ""))


def counting(sequences: int = 16, length: int = 12) -> np.ndarray:
    """Return sequences in which every token is the previous one plus three."""
    first = np.random.default_rng(0).integers(0, 97, (sequences, 1))
    return ((first + 3 * np.arange(length)) % 97).astype(np.int32)


def same(one: dict, other: dict) -> bool:
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )
