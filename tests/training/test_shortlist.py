"""The shortlist: which tokens are on it, and what steps compute with it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from spap_jax.models import decoder
from spap_jax.models.registry import family_of
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import fully_shard_params
from spap_jax.pruning.joint import job_of
from spap_jax.settings import PruneSettings
from spap_jax.training.engine import batch_of
from spap_jax.training.optimizers import relative
from spap_jax.training.shortlist import Shortlist, length_of, shortened_head, shortlist_of
from spap_jax.training.step import Given, Job, Recipe, Sequences, begin, measure, step

LLAMA = {
    "model_type": "llama",
    "vocab_size": 3000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = np.random.default_rng(0).zipf(1.2, (8, 1, 32)).astype(np.int32) % 3000
TEXT_WEIGHT = 0.3


@drawn(st.integers(6000, 9000), st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_every_token_is_on_it_or_stood_for(vocabulary: int, tokens: int, seed: int):
    text = np.random.default_rng(seed).zipf(1.1, tokens) % vocabulary
    short, counts = shortlist_of(text, vocabulary, seed), np.bincount(text, minlength=vocabulary)
    if short is None:
        assert length_of(vocabulary, tokens) == vocabulary
        return
    assert len(short.ids) == length_of(vocabulary, tokens) < vocabulary
    assert (np.diff(short.ids) > 0).all()
    assert np.exp(short.others).sum() == pytest.approx(vocabulary, rel=1e-4)
    frequent = short.ids[short.others == 0]
    assert counts[frequent].min() >= np.delete(counts, frequent).max()
    place, there = short.places(text)
    assert (short.ids[place[there]] == text[there]).all()
    assert (there == np.isin(text, frequent)).all()


def test_a_small_vocabulary_is_used_whole():
    assert shortlist_of(np.arange(512), 5000, 0) is None


@functools.cache
def model(tied: bool) -> Any:
    config = family_of(LLAMA).read_config(LLAMA | {"tie_word_embeddings": tied})
    return config, jax.device_get(jax.jit(lambda key: decoder.init(config, key))(jax.random.key(1)))


def losses(tied: bool, kept: np.ndarray, short: Shortlist) -> np.ndarray:
    """Compute the losses [B, T - 1] from the logits of the whole vocabulary; those of rare tokens mean nothing."""
    config, params = model(tied)
    wanted = np.asarray(decoder.head(config, params, jnp.asarray(kept[:, 0])), np.float64)
    got = np.asarray(decoder.forward(config, params, jnp.asarray(TOKENS[:, 0]), None), np.float64)
    q, p = (x[:, :-1, short.ids] + short.others for x in (wanted, got))
    q, p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (q, p))
    of_text = np.take_along_axis(q - p, short.places(TOKENS)[0][:, 0, 1:, None], axis=-1)[..., 0]
    return (1 - TEXT_WEIGHT) * (np.exp(q) * (q - p)).sum(-1) + TEXT_WEIGHT * of_text


@pytest.mark.parametrize("tied", [True, False])
def test_predictions_are_compared_by_the_logits_of_the_shortlist(tied: bool):
    config, params = model(tied)
    kept = np.random.default_rng(2).normal(size=(*TOKENS.shape, 32)).astype(np.float32)
    ids = np.unique(TOKENS)[::2][:64].astype(np.int32)  # without many of the tokens of the text
    short = Shortlist(ids, np.where(np.arange(64) % 3 == 1, 2.0, 0.0).astype(np.float32))
    place, there = short.places(TOKENS)
    assert 0.1 < there.mean() < 0.9
    for count in (1, 8):
        with mesh.use_mesh(count):
            frozen = fully_shard_params(config, params)
            outer = {name: frozen[name] for name in ("embed", "head")}
            ids, others = mesh.replicate(tuple(short))
            few = shortened_head(config, outer, ids, "float32") | {"others": others}
            assert max(a.shape[0] for a in jax.tree.leaves(few)) == 64
            tokens, end, mask, own = map(mesh.shard_chunks, (TOKENS, kept, there, place))
            read = Sequences(tokens, end, mask, None, own)
            given = Given(frozen, None, read, len(TOKENS), few)
            job = Job(config, Recipe(relative, ()), "float32", text_weight=TEXT_WEIGHT)
            state = begin(job, {"layers": frozen["layers"]})
            _, loss = step(job, given, state, batch_of(np.arange(len(TOKENS)), given, 64), np.float32(0))
        expected = losses(tied, kept, short)[there[:, 0, 1:]].mean()
        assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_measurements_beside_it_are_of_some_predictions_of_the_whole_vocabulary(masked: bool):
    config, params = model(True)
    kept = np.random.default_rng(2).normal(size=(*TOKENS.shape, 32)).astype(np.float32)
    counts = np.random.default_rng(3).random(TOKENS.shape) < 0.5 if masked else np.ones(TOKENS.shape, bool)
    all_losses, there = losses(True, kept, Shortlist(np.arange(3000), np.zeros(3000))), counts[:, 0, 1:]
    some = all_losses[:, ::4][there[:, ::4]].mean()
    assert some != pytest.approx(all_losses[there].mean(), rel=1e-3)
    settings = PruneSettings(joint_text_weight=TEXT_WEIGHT).resolved(2, 32, 64, TOKENS.size)
    job = job_of(config, settings, thinned=True)
    for count in (1, 8):
        with mesh.use_mesh(count):
            frozen = fully_shard_params(config, params)
            read = Sequences(*map(mesh.shard_chunks, (TOKENS, kept, *[counts] * masked)))
            given = Given(frozen, None, read, len(TOKENS))
            batch = batch_of(np.arange(len(TOKENS)), given, 64)
            loss = measure(job, given, {"layers": frozen["layers"]}, batch)
        assert float(loss) == pytest.approx(some, rel=1e-4)
