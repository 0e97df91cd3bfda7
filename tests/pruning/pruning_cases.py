"""Tiny models in memory, and tokens for them."""

import functools
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import api
from spap_jax.models import decoder
from spap_jax.models.model import Model, Source
from spap_jax.models.registry import family_of
from spap_jax.settings import PruneSettings

SETTINGS = PruneSettings(
    ridge=1e-4,
    correction=1.0,  # exact results are compared, with and without steps
    sparsity=0.3,
    rounds=2,
    steps=10,
    joint_passes=0,
    step_tokens=128,
    batch_tokens=64,
    held_out=0.25,
)
CHANNELS, KEPT = 53, 37

forward = jax.jit(decoder.forward, static_argnames="config")


def tiny(variant: str) -> Model:
    """Return a variant of `hf_models`; its arrays are shared by all tests, which must not change them."""
    config, params = _ported(variant)
    return Model(config, params, Source(variant, None, ""))


@functools.cache
def _ported(variant: str):
    config, params = hf_models.port(hf_models.hf_model(variant))
    return config, jax.tree.map(jnp.asarray, params)


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


@functools.cache
def divisible() -> Model:
    """Return a random model whose vocabulary, channels and query heads divide among eight devices, but not its keys."""
    config = family_of(DIVISIBLE).read_config(DIVISIBLE)
    params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
    louder = jax.tree.map(lambda a: a if (a == 1).all() else 10 * a, params)  # except norm scales
    return Model(config, louder, Source("random", None, ""))


def random_tokens(seed: int = 0, sequences: int = 16, length: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, (sequences, length)).astype(np.int32)


@functools.cache
def pruned(variant: str, **changes: Any) -> api.PruneResult:
    """Return the result of pruning with `SETTINGS` and some changes on the usual tokens."""
    return api.prune(tiny(variant), random_tokens(), settings=SETTINGS, **changes)


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(forward(model.config, model.params, tokens, np.ones(tokens.shape, bool)))


def loss(dense: Model, other: Model, tokens: np.ndarray, text_weight: float = SETTINGS.text_weight) -> float:
    """Compute what is lost against a dense model in nats per token, from logits."""
    wanted, got = (np.asarray(api.logits(model, tokens), np.float64)[:, :-1] for model in (dense, other))
    wanted, got = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (wanted, got))
    divergence = (np.exp(wanted) * (wanted - got)).sum(-1).mean()
    rise = np.take_along_axis(wanted - got, tokens[:, 1:, None], axis=-1).mean()
    return float((1 - text_weight) * divergence + text_weight * rise)


def with_mlp(model: Model, **arrays) -> Model:
    """Return the model with some stacked MLP parameters replaced."""
    layers = model.params["layers"] | {"mlp": model.params["layers"]["mlp"] | arrays}
    return Model(model.config, model.params | {"layers": layers}, model.source)


def one_layer(model: Model, index: int) -> dict:
    return jax.tree.map(lambda array: array[index], model.params["layers"])


def chosen_channels(seed: int, count: int, layers: int) -> np.ndarray:
    """Choose different channels in each layer, ascending [layers, count]."""
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.permutation(CHANNELS)[:count]) for _ in range(layers)])
