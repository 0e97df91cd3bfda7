"""Tiny models in memory, and tokens for them."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
from tiny import DIVISIBLE

from spap_jax import api
from spap_jax.models import DecoderConfig, decoder
from spap_jax.models.model import Model, Source
from spap_jax.models.registry import family_of
from spap_jax.planning import plan
from spap_jax.pruning import run as runs
from spap_jax.pruning.run import Run
from spap_jax.settings import EFFORTS, PruneSettings

SETTINGS = PruneSettings(sparsity=0.3, rounds=2, joint_passes=0, batch_tokens=64, held_out=0.25)
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


@functools.cache
def divisible() -> Model:
    """Return a random model whose vocabulary, channels and query heads divide among eight devices, but not its keys."""
    config = family_of(DIVISIBLE).read_config(DIVISIBLE)
    params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
    louder = jax.tree.map(lambda a: a if (a == 1).all() else 10 * a, params)  # except norm scales
    return Model(config, louder, Source("random", None, ""))


def random_tokens(seed: int = 0, sequences: int = 16, length: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, (sequences, length)).astype(np.int32)


def resolved(
    config: DecoderConfig,
    tokens: Any,
    settings: PruneSettings = SETTINGS,
    dtype: str | None = None,
    *,
    ridge: float = 1e-4,
    correction: float = 1.0,
    steps: int = 10,
    joint_tokens: int = 256,
    joint_rate: float = 0.01,
) -> Run:
    """Resolve a run with a fit that has exact results, and with few and large steps, as suits tiny models."""
    efforts = {name: effort._replace(tokens=joint_tokens) for name, effort in EFFORTS.items()}
    with mock.patch.object(runs, "EFFORTS", efforts):
        run = runs.resolve(config, tokens, settings, dtype)
    rounds = run.rounds and run.rounds._replace(steps=steps, step_tokens=128)
    joint = run.joint and run.joint._replace(rate=joint_rate)
    return dataclasses.replace(run, ridge=ridge, correction=correction, rounds=rounds, joint=joint)


FIT = ("ridge", "correction", "steps", "joint_tokens", "joint_rate")


def prune(model: Model, tokens: Any, settings: PruneSettings = SETTINGS, **changes: Any) -> api.PruneResult:
    """Prune by `spap.prune`, with the arguments of `resolved`."""
    fit = {name: changes.pop(name) for name in FIT if name in changes}
    with mock.patch.object(plan, "resolve", functools.partial(resolved, **fit)):
        return api.prune(model, tokens, settings=settings, **changes)


@functools.cache
def pruned(variant: str, **changes: Any) -> api.PruneResult:
    """Return the result of pruning with `SETTINGS` and some changes on the usual tokens."""
    return prune(tiny(variant), random_tokens(), **changes)


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(forward(model.config, model.params, tokens, np.ones(tokens.shape, bool)))


def divergence(dense: Model, other: Model, tokens: np.ndarray) -> float:
    """Compute the divergence from a dense model in nats per token, from logits."""
    wanted, got = (np.asarray(api.logits(model, tokens), np.float64)[:, :-1] for model in (dense, other))
    wanted, got = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (wanted, got))
    return float((np.exp(wanted) * (wanted - got)).sum(-1).mean())


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
