"""Kullback-Leibler divergence of a pruned model's predictions from the dense model's, on fixed windows."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import devices
from spap_jax.errors import UserError
from spap_jax.evaluation.perplexity import check_length, check_windows, final_stream, predictions, window_batches
from spap_jax.model import Model
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import full_precision
from spap_jax.placement import shard_params
from spap_jax.training.objective import next_tokens, token_groups


class Comparison(NamedTuple):
    """Perplexities and divergence of two models on the same windows.

    Attributes:
        dense: Perplexity of the first model.
        pruned: Perplexity of the second model.
        divergence: Mean over the predictions of KL(first || second), in nats per token.
        agreement: Fraction of the predictions for which both have the same most likely token.
    """

    dense: float
    pruned: float
    divergence: float
    agreement: float


def mean_divergence(
    dense: Model, pruned: Model, tokens: np.ndarray, batch_tokens: int = 4096, mask: np.ndarray | None = None
) -> float:
    """Returns the mean KL(dense || pruned) of the next-token distributions, in nats per token.

    Each window of T tokens has T - 1 predictions, since the token after the last one is unknown; those of the tokens in
    the mask count. Windows are independent of each other.

    Args:
        dense: The reference model.
        pruned: The model that is compared with it; its vocabulary must be the same.
        tokens: Windows [B, T].
        batch_tokens: Number of tokens that pass through the models at once.
        mask: bool [B, T], True on the tokens that count; by default all count.

    Raises:
        UserError: there is nothing to predict, a window is longer than a model's positions, or vocabularies differ.
    """
    return compare(dense, pruned, tokens, batch_tokens, mask).divergence


def compare(
    dense: Model, pruned: Model, tokens: np.ndarray, batch_tokens: int = 4096, mask: np.ndarray | None = None
) -> Comparison:
    """Returns the divergence and both perplexities from one pass of each model; see ``mean_divergence``."""
    tokens = check_windows("divergence", tokens)
    configs = (dense.config, pruned.config)
    for config in configs:
        check_length(config, tokens.shape[1])
    if len({config.vocabulary for config in configs}) > 1:
        raise UserError(
            f"vocabularies of {configs[0].vocabulary} and {configs[1].vocabulary} tokens cannot be compared; "
            "give a model and what was made of it."
        )
    params, total = (shard_params(dense.config, dense.params), shard_params(pruned.config, pruned.params)), None
    counted = predictions("divergence", tokens, mask)
    for part, counts in window_batches(tokens, counted, batch_tokens):
        sums = _sums(configs, params, devices.shard_chunks(part), devices.shard_chunks(counts))
        total = sums if total is None else total + sums
    loss, other, divergence, agreement = np.asarray(total, np.float64) / counted.sum()
    return Comparison(float(np.exp(loss)), float(np.exp(other)), float(divergence), float(agreement))


@functools.partial(jax.jit, static_argnames="configs")
@full_precision
def _sums(
    configs: tuple[DecoderConfig, DecoderConfig], params: tuple[Params, Params], tokens: jax.Array, counts: jax.Array
) -> jax.Array:
    """Sums the losses of both models, the divergences and the agreements over the predictions that count.

    tokens: [D, b, T], counts: [D, b, T - 1] -> [4] float32.
    """

    def own(batch: tuple[jax.Array, jax.Array], params: tuple[Params, Params]) -> jax.Array:
        tokens, counts = (a[0] for a in batch)
        both = list(zip(configs, params, strict=True))
        last = [final_stream(config, tree, tokens) for config, tree in both]

        def add(total: jax.Array, some: Any) -> tuple[jax.Array, None]:
            streams, following, counts = some
            first, second = (
                jax.nn.log_softmax(decoder.head(config, tree, x[None])[0].astype(jnp.float32))
                for (config, tree), x in zip(both, streams, strict=True)
            )
            divergences = (jnp.exp(first) * (first - second)).sum(axis=-1)
            losses = [-jnp.take_along_axis(which, following[:, None], axis=-1)[:, 0] for which in (first, second)]
            agreements = (first.argmax(axis=-1) == second.argmax(axis=-1)).astype(jnp.float32)
            each = jnp.stack([*losses, divergences, agreements])
            return total + jnp.where(counts, each, 0).sum(axis=1), None

        groups = token_groups((last, next_tokens(tokens), jnp.pad(counts, ((0, 0), (0, 1)))))
        return jax.lax.scan(add, jnp.zeros(4), groups)[0]

    return devices.psum_over_chunks(own, (tokens, counts), params)
