"""The objective: the next-token loss, or what is lost against the predictions of another model.

The logits are computed a few tokens at a time, whatever the vocabulary. Their gradient is computed with them, since the
sum of the losses is all that is differentiated: a backward pass would have to compute them again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spap_jax.backend import platform
from spap_jax.models import DecoderConfig, Params, decoder

HEAD_TOKENS, CPU_HEAD_TOKENS = 256, 128
"""Number of tokens whose logits are held at once. With fewer, products on an accelerator would wait for the weights; a
CPU needs no more."""


class Predictor(NamedTuple):
    """What turns a stream after the last block into predictions.

    Attributes:
        config: The decoder.
        outer: Its weights outside the blocks; "others" beside them is added to the logits, see ``shortlist``.
    """

    config: DecoderConfig
    outer: Params


class Wanted(NamedTuple):
    """Predictions of another model, the target beside the text.

    Attributes:
        predictor: What makes them of the stream.
        stream: [B, T, d] the stream after the last block of the model that makes them.
        text_weight: Weight of the text's next token in the target, from 0 to 1; the rest is that of the predictions.
    """

    predictor: Predictor
    stream: jax.Array
    text_weight: float = 0.0


def loss_sum(
    own: Predictor, last: jax.Array, tokens: jax.Array, weights: jax.Array, wanted: Wanted | None = None
) -> jax.Array:
    """Sums the losses of predictions in nats, each times its weight.

    Without wanted predictions q, the loss of a prediction p is -log p(next token). With them it is what is lost against
    them, 0 for p = q: (1 - a) KL(q || p) + a (log q(next token) - log p(next token)), with a the text's weight.

    Args:
        own: What makes predictions of ``last``.
        last: [B, T, d] stream after the last block.
        tokens: [B, T] the next tokens.
        weights: [B, T] weights of the predictions; they have no gradient.
        wanted: The wanted predictions; they have no gradient.

    Returns:
        [] float32.
    """
    if wanted is None:
        loss, by_token, others = functools.partial(_next_token_losses, own.config), (tokens,), {}
    else:
        loss = functools.partial(_losses_against, own.config, wanted.predictor.config, wanted.text_weight)
        by_token, others = (tokens, wanted.stream), wanted.predictor.outer
    return _sum(loss, own.outer, last, jax.lax.stop_gradient((by_token, weights.astype(jnp.float32), others)))


def next_tokens(tokens: jax.Array) -> jax.Array:
    """Returns the token after each one [B, T]; that after the last is unknown, and the first one is in its place."""
    return jnp.roll(tokens, -1, axis=1)


_Loss = Callable[[Params, jax.Array, Any, Params], jax.Array]
"""Losses [N] of tokens, from the weights outside the blocks, the stream [N, d], the targets [N, ...], and the weights
outside the blocks of the model that makes these."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(loss: _Loss, outer: Params, last: jax.Array, fixed: tuple[Any, jax.Array, Params]) -> jax.Array:
    def add(total: jax.Array, some: Any) -> tuple[jax.Array, None]:
        return total + _weighted(loss, outer, some[0], some[1:], fixed[2]), None

    return jax.lax.scan(add, jnp.float32(0), token_groups((last, *fixed[:2])))[0]


def _sum_and_gradient(loss: _Loss, outer: Any, last: Any, fixed: Any) -> tuple[jax.Array, tuple[Params | None, Any]]:
    moves = any(leaf.perturbed for leaf in jax.tree.leaves(outer, is_leaf=_is_primal))
    outer, last, (targets, weights, others) = jax.tree.map(lambda a: a.value, (outer, last, fixed), is_leaf=_is_primal)
    of = jax.value_and_grad(functools.partial(_weighted, loss), argnums=(0, 1) if moves else (1,))

    def add(total: Any, some: Any) -> tuple[Any, jax.Array]:
        value, (*by_outer, by_last) = of(outer, some[0], some[1:], others)
        return jax.tree.map(jnp.add, total, (value, by_outer)), by_last

    zeros = (jnp.float32(0), [jax.tree.map(jnp.zeros_like, outer)] if moves else [])
    (value, by_outer), by_last = jax.lax.scan(add, zeros, token_groups((last, targets, weights)))
    by_last = by_last.reshape(-1, last.shape[-1])[: last[..., 0].size].reshape(last.shape)
    return value, (by_outer[0] if moves else None, by_last)


def _times(_: _Loss, gradient: tuple[Params | None, jax.Array], factor: Any) -> tuple[Any, Any, None]:
    return *jax.tree.map(lambda a: (a * factor).astype(a.dtype), gradient), None


_sum.defvjp(_sum_and_gradient, _times, symbolic_zeros=True)


def _is_primal(value: Any) -> bool:
    return isinstance(value, jax.custom_derivatives.CustomVJPPrimal)


def _weighted(loss: _Loss, outer: Params, last: jax.Array, some: tuple[Any, jax.Array], others: Params) -> jax.Array:
    targets, weights = some
    return jnp.where(weights > 0, weights * loss(outer, last, targets, others), 0).sum()


def token_groups(by_token: Any) -> Any:
    """Divides arrays [B, T, ...] into groups [G, n, ...] of tokens; the last one is filled up with zeros."""

    def one(array: jax.Array) -> jax.Array:
        flat = array.reshape(-1, *array.shape[2:])
        size = min(CPU_HEAD_TOKENS if platform() == "cpu" else HEAD_TOKENS, len(flat))
        flat = jnp.pad(flat, [(0, -len(flat) % size), *[(0, 0)] * (flat.ndim - 1)])
        return flat.reshape(-1, size, *flat.shape[1:])

    return jax.tree.map(one, by_token)


def _next_token_losses(
    config: DecoderConfig, outer: Params, x: jax.Array, target: tuple[jax.Array], _: Params
) -> jax.Array:
    logits = _logits(config, outer, x)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[0][:, None], axis=1)[:, 0]


def _losses_against(
    config: DecoderConfig,
    other: DecoderConfig,
    text_weight: float,
    outer: Params,
    x: jax.Array,
    by_token: tuple[jax.Array, jax.Array],
    others: Params,
) -> jax.Array:
    (tokens, stream), mine = by_token, _logits(config, outer, x)
    theirs = _logits(other, others, stream)
    target = jax.nn.softmax(theirs)
    if text_weight:
        target = (1 - text_weight) * target + text_weight * jax.nn.one_hot(tokens, target.shape[-1])
    # Differences of logits, whose sums keep small losses apart, and which need fewer passes than probabilities.
    expected = (target * (theirs - mine)).sum(axis=-1)
    return expected - (jax.nn.logsumexp(theirs, axis=-1) - jax.nn.logsumexp(mine, axis=-1))


def _logits(config: DecoderConfig, outer: Params, x: jax.Array) -> jax.Array:
    """Returns the next token's logits [n, v] for the stream after the last block [n, d]."""
    logits = decoder.head(config, outer, x[None])[0].astype(jnp.float32)
    return logits + outer["others"][None] if "others" in outer else logits
