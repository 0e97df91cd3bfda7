"""What training lowers: the loss of the next token, or the divergence from a teacher's predictions.

Blocks are scanned, and gradients compute what is inside of one again: the stream between blocks is held, and the
hidden channels of one block. The logits are taken a few tokens at a time and computed again as well.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.training import lora

_HEAD_TOKENS = 512
"""Tokens whose logits are held at once."""


class Decoder(NamedTuple):
    """A model inside of a program; its config and the scale of the updates are not arrays.

    Attributes:
        config: Its sizes and switches.
        params: The parameter tree.
        updates: Low-rank updates of its blocks; may be empty.
        scale: Weight of the updates.
    """

    config: DecoderConfig
    params: Params
    updates: Params
    scale: float


def loss_sum(student: Decoder, teacher: Decoder | None, tokens: jax.Array) -> jax.Array:
    """Sum over the predictions of the loss in nats: -log p(next token), or KL(teacher || student).

    Args:
        student: What is trained.
        teacher: Whose predictions are the standard; the text itself where absent.
        tokens: [B, T]; there are T - 1 predictions in each sequence, those whose token is known.
    """
    last = _last_stream(student, tokens)
    known = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :] < tokens.shape[1] - 1, tokens.shape)
    next_token = jnp.roll(tokens, -1, axis=1)

    if teacher is None:
        losses = _by_token(functools.partial(_next_token_loss, student), last, next_token)
    else:
        wanted = jax.lax.stop_gradient(_last_stream(teacher, tokens))
        losses = _by_token(functools.partial(_divergence, student, teacher), last, wanted)
    return jnp.where(known, losses, 0.0).sum()


def _by_token(loss, last: jax.Array, *more: jax.Array) -> jax.Array:
    """Losses [B, T] of the stream after the last block [B, T, d] and of what else there is for every token."""
    flat = [a.reshape(-1, *a.shape[2:]) for a in (last, *more)]
    losses = jax.lax.map(lambda token: jax.checkpoint(loss)(*token), tuple(flat), batch_size=_HEAD_TOKENS)
    return losses.reshape(last.shape[:2])


def _next_token_loss(student: Decoder, x: jax.Array, token: jax.Array) -> jax.Array:
    return -_log_probabilities(student, x)[token]


def _divergence(student: Decoder, teacher: Decoder, x: jax.Array, wanted: jax.Array) -> jax.Array:
    own, others = _log_probabilities(student, x), _log_probabilities(teacher, wanted)
    return (jnp.exp(others) * (others - own)).sum()


def _log_probabilities(model: Decoder, x: jax.Array) -> jax.Array:
    """Of the tokens [v] that may follow one whose last stream is x [d]."""
    return jax.nn.log_softmax(decoder.head(model.config, model.params, x[None, None])[0, 0].astype(jnp.float32))


def _last_stream(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The stream after the last block. [B, T] -> [B, T, d], float32."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    valid = jnp.ones_like(tokens, dtype=bool)

    @jax.checkpoint
    def step(x: jax.Array, layer: tuple[Params, Params]) -> tuple[jax.Array, None]:
        weights = lora.merged(*layer, model.scale)
        return decoder.block(model.config, weights, x, positions, valid), None

    x = decoder.embed(model.config, model.params, tokens, positions, jnp.float32)
    return jax.lax.scan(step, x, (model.params["layers"], model.updates))[0]
