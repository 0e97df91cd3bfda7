"""Divergence: agreement with NumPy and torch, zero between a model and itself, and invalid inputs."""

import dataclasses

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import spap_jax as spap
from spap_jax.evaluation.perplexity import _total, compare, perplexity
from spap_jax.models.model import Model, Source

NAME = "llama_tied"


def other(theirs: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return a copy of the model with slightly perturbed weights."""
    copy = type(theirs)(theirs.config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mine, source in zip(copy.parameters(), theirs.parameters(), strict=True):
            mine.copy_(source + 0.05 * source.abs().mean() * torch.randn(source.shape, generator=generator))
    return copy


def ported(theirs: transformers.PreTrainedModel) -> Model:
    return Model(*hf_models.port(theirs), Source("test", None, "{}"))


def pair() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    theirs = hf_models.hf_model(NAME)
    return theirs, other(theirs)


def windows() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 97, (7, 16))


def test_it_is_that_of_torch() -> None:
    """The padding of a partial last batch does not count."""
    dense, pruned = pair()
    tokens = torch.tensor(windows())
    with torch.no_grad():
        first, second = (model(tokens).logits[:, :-1].double().log_softmax(-1) for model in (dense, pruned))
    expected = torch.nn.functional.kl_div(second, first, reduction="sum", log_target=True) / (7 * 15)
    found = compare(ported(dense), ported(pruned), windows(), 3 * 16).divergence
    assert 1e-3 < found < 1
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_a_model_does_not_differ_from_itself() -> None:
    model = ported(hf_models.hf_model(NAME))
    same = dataclasses.replace(model, params=jax.tree.map(np.copy, model.params))
    assert spap.divergence(model, same, windows()) == pytest.approx(0, abs=1e-9)


def test_perplexities_come_along() -> None:
    dense, pruned = map(ported, pair())
    both = compare(dense, pruned, windows(), batch_tokens=3 * 16)
    assert both.dense == pytest.approx(perplexity(dense, windows()), rel=1e-5)
    assert both.pruned == pytest.approx(perplexity(pruned, windows()), rel=1e-5)
    first, second = (np.asarray(spap.logits(model, windows()))[:, :-1].argmax(-1) for model in (dense, pruned))
    assert both.agreement == pytest.approx((first == second).mean(), abs=1e-6)
    assert both.agreement < 1


def test_refusals() -> None:
    model = ported(hf_models.hf_model(NAME))
    with pytest.raises(spap.UserError, match="divergence needs windows"):
        spap.divergence(model, model, np.zeros((2, 1), int))
    wide = dataclasses.replace(model, config=dataclasses.replace(model.config, vocabulary=98))
    with pytest.raises(spap.UserError, match="vocabularies of 97 and 98 tokens"):
        spap.divergence(model, wide, windows())
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, positions=8))
    with pytest.raises(spap.UserError, match="8 positions"):
        spap.divergence(model, short, windows())


def test_perplexity_tells_how_many_windows_are_done():
    """Progress is reported between batches; the last batch is partial."""
    heard: list[tuple[int, int]] = []
    model = ported(hf_models.hf_model(NAME))
    perplexity(model, windows(), batch_tokens=32, watch=lambda *each: heard.append(each))
    assert heard == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]


def test_sums_of_batches_do_not_drift():
    """In float32, one would be lost beside 2^24."""
    sums = iter(jnp.float32([2**24, 1, 1, 1]))
    total = _total(lambda *_: next(sums), np.zeros((4, 2), np.int32), np.ones((4, 1), bool), 2)
    assert total == 2**24 + 3
