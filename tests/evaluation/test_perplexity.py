"""Perplexity and divergence against NumPy, with and without a mask of the tokens that count, and invalid inputs."""

import dataclasses
import functools

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import spap_jax as spap
from spap_jax.data.tokens import TokenBlocks
from spap_jax.evaluation.perplexity import _total, compare, perplexity
from spap_jax.models.model import Model, Source

TOKENS = np.random.default_rng(3).integers(0, 97, (7, 16))
MASKS = [None, np.random.default_rng(4).random((7, 16)) < 0.3]


@functools.cache
def ported(name: str = "llama_tied") -> Model:
    return Model(*hf_models.port(hf_models.hf_model(name)), Source(name, None, "{}"))


def log_probabilities(model: Model) -> np.ndarray:
    return log_softmax(np.asarray(spap.logits(model, TOKENS), np.float64)[:, :-1], axis=-1)


def counted(mask: np.ndarray | None) -> np.ndarray:
    return np.ones((7, 15), bool) if mask is None else mask[:, 1:]


@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
@pytest.mark.parametrize("batch_tokens", [1, 3 * 16, 4096])
def test_perplexity(mask: np.ndarray | None, batch_tokens: int):
    """The padding of a partial last batch does not count."""
    model, blocks = ported(), TokenBlocks(TOKENS, "", 7, mask)
    chosen = np.take_along_axis(log_probabilities(model), TOKENS[:, 1:, None], axis=-1)[..., 0]
    expected = np.exp(-chosen[counted(mask)].mean())
    assert perplexity(model, TOKENS, batch_tokens, mask=mask) == pytest.approx(expected, rel=1e-5)
    assert spap.perplexity(model, blocks, batch_tokens) == pytest.approx(expected, rel=1e-5)
    assert float(spap.loss(model, blocks)) == pytest.approx(np.log(expected), rel=1e-5)


@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
def test_divergence(mask: np.ndarray | None):
    """Between models of which one is nearly the other, so that they often agree."""
    dense = ported()
    keys = iter(jax.random.split(jax.random.key(0), 99))
    noisy = jax.tree.map(lambda a: a + 0.05 * np.abs(a).mean() * jax.random.normal(next(keys), a.shape), dense.params)
    models = dense, dense.replace(params=noisy)
    first, second = map(log_probabilities, models)
    expected = (np.exp(first) * (first - second)).sum(axis=-1)[counted(mask)].mean()
    both = compare(*models, TOKENS, batch_tokens=3 * 16, mask=mask)
    assert 1e-3 < both.divergence < 1
    assert both.divergence == pytest.approx(expected, rel=1e-4)
    assert spap.divergence(*models, TokenBlocks(TOKENS, "", 7, mask), 3 * 16) == pytest.approx(expected, rel=1e-4)
    alone = [perplexity(model, TOKENS, mask=mask) for model in models]
    assert (both.dense, both.pruned) == pytest.approx(alone, rel=1e-5)
    agreed = (first.argmax(-1) == second.argmax(-1))[counted(mask)].mean()
    assert both.agreement == pytest.approx(agreed, abs=1e-6)
    assert 0 < both.agreement < 1


def test_a_model_does_not_differ_from_itself():
    same = ported().replace(params=jax.tree.map(np.copy, ported().params))
    assert spap.divergence(ported(), same, TOKENS) == pytest.approx(0, abs=1e-9)


def test_refusals():
    model, first = ported(), np.arange(16) == np.zeros((7, 1))  # a window's first token is predicted by nothing
    with pytest.raises(spap.UserError, match="divergence needs windows"):
        spap.divergence(model, model, np.zeros((2, 1), int))
    for change, noun in (({"vocabulary": 98}, "vocabularies of 97 and 98 tokens"), ({"positions": 8}, "8 positions")):
        with pytest.raises(spap.UserError, match=noun):
            spap.divergence(model, model.replace(config=dataclasses.replace(model.config, **change)), TOKENS)
    with pytest.raises(spap.UserError, match="perplexity needs a prediction that counts"):
        spap.perplexity(model, TokenBlocks(TOKENS, "", 7, first))


def test_perplexity_tells_how_many_windows_are_done():
    """Progress is reported between batches; the last batch is partial."""
    heard: list[tuple[int, int]] = []
    perplexity(ported(), TOKENS, batch_tokens=32, watch=lambda *each: heard.append(each))
    assert heard == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]


def test_sums_of_batches_do_not_drift():
    """In float32, one would be lost beside 2^24."""
    sums = iter(jnp.float32([2**24, 1, 1, 1]))
    total = _total(lambda *_: next(sums), np.zeros((4, 2), np.int32), np.ones((4, 1), bool), 2)
    assert total == 2**24 + 3
