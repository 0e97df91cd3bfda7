"""With a mask, the predictions of its tokens count, and no others."""

import hf_models
import numpy as np
import pytest
from scipy.special import log_softmax

import spap_jax as spap
from spap_jax.data.tokens import TokenBlocks
from spap_jax.evaluation.perplexity import compare, perplexity
from spap_jax.models.model import Model, Source

TOKENS = np.random.default_rng(3).integers(0, 97, (7, 16))
MASK = np.random.default_rng(4).random((7, 16)) < 0.3
BLOCKS = TokenBlocks(TOKENS, "", 7, MASK)


def ported(name: str) -> Model:
    return Model(*hf_models.port(hf_models.hf_model(name)), Source(name, None, "{}"))


def log_probabilities(model: Model) -> np.ndarray:
    return log_softmax(np.asarray(spap.logits(model, TOKENS), np.float64)[:, :-1], axis=-1)


@pytest.mark.parametrize("batch_tokens", [1, 3 * 16, 4096])
def test_perplexity(batch_tokens: int):
    """The padding of a partial last batch does not count."""
    model = ported("llama_tied")
    chosen = np.take_along_axis(log_probabilities(model), TOKENS[:, 1:, None], axis=-1)[..., 0]
    expected = np.exp(-chosen[MASK[:, 1:]].mean())
    assert perplexity(model, TOKENS, batch_tokens, mask=MASK) == pytest.approx(expected, rel=1e-5)
    assert spap.perplexity(model, BLOCKS, batch_tokens) == pytest.approx(expected, rel=1e-5)
    assert float(spap.loss(model, BLOCKS)) == pytest.approx(np.log(expected), rel=1e-5)


def test_divergence():
    models = ported("llama_tied"), ported("llama_biases")
    first, second = map(log_probabilities, models)
    expected = (np.exp(first) * (first - second)).sum(axis=-1)[MASK[:, 1:]].mean()
    assert spap.divergence(*models, BLOCKS, 3 * 16) == pytest.approx(expected, rel=1e-4)
    both = compare(*models, TOKENS, mask=MASK)
    assert both.dense == pytest.approx(spap.perplexity(models[0], BLOCKS), rel=1e-5)
    agreed = (first.argmax(-1) == second.argmax(-1))[MASK[:, 1:]].mean()
    assert both.agreement == pytest.approx(agreed, abs=1e-6)


def test_a_mask_in_which_nothing_counts():
    """Nothing predicts the first token of a window."""
    first = np.zeros(TOKENS.shape, bool)
    first[:, 0] = True
    with pytest.raises(spap.UserError, match="perplexity needs a prediction that counts"):
        spap.perplexity(ported("llama_tied"), TokenBlocks(TOKENS, "", 7, first))
