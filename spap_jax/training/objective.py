"""The training objective: the next-token loss, or the divergence from a teacher's predictions.

Blocks are scanned, and the backward pass recomputes what is inside a block: only the residual stream between blocks
and the hidden channels of one block are held. The logits are computed a few tokens at a time and recomputed as well.
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
"""Number of tokens whose logits are held at once."""


class Decoder(NamedTuple):
    """A model inside a jitted program; its config and the scale of its updates are static.

    Attributes:
        config: Its sizes and switches.
        params: The parameter tree.
        updates: Low-rank updates of its blocks; may be empty.
        scale: Factor of the updates.
    """

    config: DecoderConfig
    params: Params
    updates: Params
    scale: float


def loss_sum(student: Decoder, teacher: Decoder | None, tokens: jax.Array) -> jax.Array:
    """Sums the loss over the predictions, in nats: -log p(next token), or KL(teacher || student).

    Args:
        student: The model that is trained.
        teacher: The model whose predictions are the target; None for the next token of the text.
        tokens: [B, T]; each sequence has T - 1 predictions, since the token after the last one is unknown.
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
    """Maps a per-token loss over the stream after the last block [B, T, d] and further arrays [B, T, ...] -> [B, T]."""
    flat = [a.reshape(-1, *a.shape[2:]) for a in (last, *more)]
    losses = jax.lax.map(lambda token: jax.checkpoint(loss)(*token), tuple(flat), batch_size=_HEAD_TOKENS)
    return losses.reshape(last.shape[:2])


def _next_token_loss(student: Decoder, x: jax.Array, token: jax.Array) -> jax.Array:
    return -_log_probabilities(student, x)[token]


def _divergence(student: Decoder, teacher: Decoder, x: jax.Array, wanted: jax.Array) -> jax.Array:
    own, others = _log_probabilities(student, x), _log_probabilities(teacher, wanted)
    return (jnp.exp(others) * (others - own)).sum()


def _log_probabilities(model: Decoder, x: jax.Array) -> jax.Array:
    """Returns the next-token log-probabilities [v] for x [d], one token's residual stream after the last block."""
    return jax.nn.log_softmax(decoder.head(model.config, model.params, x[None, None])[0, 0].astype(jnp.float32))


def _last_stream(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Computes the residual stream after the last block. [B, T] -> [B, T, d], float32."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    valid = jnp.ones_like(tokens, dtype=bool)

    @jax.checkpoint
    def step(x: jax.Array, layer: tuple[Params, Params]) -> tuple[jax.Array, None]:
        weights = lora.merged(*layer, model.scale)
        return decoder.block(model.config, weights, x, positions, valid), None

    x = decoder.embed(model.config, model.params, tokens, positions, jnp.float32)
    return jax.lax.scan(step, x, (model.params["layers"], model.updates))[0]
