"""How far a pruned model's predictions are from the dense one's: Kullback-Leibler divergence on fixed windows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.errors import UserError
from spap_jax.evaluation.perplexity import batches, check_length, check_windows, predictions
from spap_jax.model import Model
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import full_precision


class Comparison(NamedTuple):
    """Two models on the same windows.

    Attributes:
        dense: Perplexity of the first.
        pruned: Perplexity of the second.
        divergence: Mean over the predictions of KL(first || second), in nats per token.
    """

    dense: float
    pruned: float
    divergence: float


def mean_divergence(dense: Model, pruned: Model, tokens: np.ndarray, batch_tokens: int = 4096) -> float:
    """KL(dense || pruned) of the next token's distribution, in nats, the mean over the predictions.

    Each window of T tokens gives T - 1 predictions, those whose token is known; windows do not see each other.

    Args:
        dense: The model whose predictions are the standard.
        pruned: The model that stands in for it; of the same vocabulary.
        tokens: [B, T] windows.
        batch_tokens: Tokens that pass through the models at once.

    Raises:
        UserError: there is nothing to predict, a window is longer than a model's positions, or vocabularies differ.
    """
    return compare(dense, pruned, tokens, batch_tokens).divergence


def compare(dense: Model, pruned: Model, tokens: np.ndarray, batch_tokens: int = 4096) -> Comparison:
    """The divergence and both perplexities, for which each model reads the text once; as ``mean_divergence``."""
    tokens = check_windows("divergence", tokens)
    configs = (dense.config, pruned.config)
    for config in configs:
        check_length(config, tokens.shape[1])
    if len({config.vocabulary for config in configs}) > 1:
        raise UserError(
            f"vocabularies of {configs[0].vocabulary} and {configs[1].vocabulary} tokens cannot be compared; "
            "give a model and what was made of it."
        )
    total = jnp.zeros(3, jnp.float32)
    for part, counts in batches(tokens, batch_tokens):
        total += _sums(configs, (dense.params, pruned.params), part, counts)
    loss, other, divergence = np.asarray(total, np.float64) / predictions(tokens)
    return Comparison(float(np.exp(loss)), float(np.exp(other)), float(divergence))


@functools.partial(jax.jit, static_argnames="configs")
@full_precision
def _sums(
    configs: tuple[DecoderConfig, DecoderConfig], params: tuple[Params, Params], tokens: jax.Array, counts: jax.Array
) -> jax.Array:
    """[3] float32 sums over the predictions of the windows that count: losses of both models, and divergences."""
    valid = jnp.ones_like(tokens, dtype=bool)
    first, second = (
        jax.nn.log_softmax(decoder.forward(config, tree, tokens, valid)[:, :-1].astype(jnp.float32))
        for config, tree in zip(configs, params, strict=True)
    )
    divergences = (jnp.exp(first) * (first - second)).sum(axis=-1)
    losses = [-jnp.take_along_axis(which, tokens[:, 1:, None], axis=-1)[..., 0] for which in (first, second)]
    return jnp.stack([(each.sum(axis=1) * counts).sum() for each in (*losses, divergences)])
