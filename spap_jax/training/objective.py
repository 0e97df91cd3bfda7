"""The objective: the divergence from wanted predictions, or the next-token loss.

The logits are computed a few tokens at a time, and recomputed in the backward pass, whatever the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params

HEAD_TOKENS = 512
"""Number of tokens whose logits are held at once."""


class Predictor(NamedTuple):
    """What turns a stream after the last block into predictions.

    Attributes:
        config: The decoder.
        outer: Its weights outside the blocks.
    """

    config: DecoderConfig
    outer: Params


class Wanted(NamedTuple):
    """The predictions that are the target.

    Attributes:
        predictor: What makes them of the stream.
        stream: [B, T, d] the stream after the last block of the model that makes them.
    """

    predictor: Predictor
    stream: jax.Array


def token_losses(own: Predictor, last: jax.Array, target: Wanted | jax.Array) -> jax.Array:
    """Computes the loss of each token's prediction in nats: KL(wanted || own), or -log p(next token).

    Args:
        own: What makes predictions of ``last``.
        last: [B, T, d] stream after the last block.
        target: The wanted predictions, or the next tokens [B, T].

    Returns:
        [B, T] float32.
    """
    if isinstance(target, Wanted):
        wanted = jax.lax.stop_gradient(target.stream)
        return _by_token(functools.partial(_divergence, own, target.predictor), last, wanted)
    return _by_token(functools.partial(_next_token_loss, own), last, target)


def next_tokens(tokens: jax.Array) -> jax.Array:
    """Returns the token after each one [B, T]; that after the last is unknown, and the first one is in its place."""
    return jnp.roll(tokens, -1, axis=1)


def _by_token(loss: Callable[..., jax.Array], last: jax.Array, *more: jax.Array) -> jax.Array:
    """Maps a per-token loss over the stream after the last block [B, T, d] and further arrays [B, T, ...] -> [B, T]."""
    flat = [a.reshape(-1, *a.shape[2:]) for a in (last, *more)]
    losses = jax.lax.map(lambda token: jax.checkpoint(loss)(*token), tuple(flat), batch_size=HEAD_TOKENS)
    return losses.reshape(last.shape[:2])


def _next_token_loss(own: Predictor, x: jax.Array, token: jax.Array) -> jax.Array:
    return -_log_probabilities(own, x)[token]


def _divergence(own: Predictor, other: Predictor, x: jax.Array, wanted: jax.Array) -> jax.Array:
    mine, theirs = _log_probabilities(own, x), _log_probabilities(other, wanted)
    return (jnp.exp(theirs) * (theirs - mine)).sum()


def _log_probabilities(predictor: Predictor, x: Any) -> jax.Array:
    """Returns the next-token log-probabilities [v] for x [d], one token's residual stream after the last block."""
    logits = decoder.head(predictor.config, predictor.outer, x[None, None])[0, 0]
    return jax.nn.log_softmax(logits.astype(jnp.float32))
