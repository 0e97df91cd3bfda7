"""The loss of predictions: that of the next token, or what is lost against the predictions of another model.

The logits are computed a few tokens at a time, and their gradient with them: a backward pass would have to compute them
again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spap_jax.backend import platform
from spap_jax.models import decoder
from spap_jax.models.blocks import Params
from spap_jax.models.config import DecoderConfig

HEAD_TOKENS, CPU_HEAD_TOKENS = 256, 128
"""Number of tokens whose logits are held at once; with fewer, an accelerator would wait for the weights."""


class Predictor(NamedTuple):
    """What turns a stream after the last block into predictions: a config, and the parameters outside the blocks."""

    config: DecoderConfig
    params: Params

    def logits(self, x: jax.Array) -> jax.Array:
        """Computes the next token's logits. x: [N, d] -> [N, v] float32."""
        return decoder.head(self.config, self.params, x[None])[0].astype(jnp.float32)


class Target(NamedTuple):
    """Predictions of another model, the target beside the text.

    Attributes:
        stream: [B, T, d] the teacher's stream after the last block.
        text_weight: Weight of the text's next token in the target, from 0 to 1; the rest is that of the predictions.
    """

    teacher: Predictor
    stream: jax.Array
    text_weight: float = 0.0


class Comparison(NamedTuple):
    """Sums over the predictions that count; float32 [] each.

    Attributes:
        loss: Loss of the next token in nats.
        divergence: KL(teacher || model) in nats.
        agreement: Number of predictions whose most likely token is the teacher's.
    """

    loss: jax.Array
    teacher_loss: jax.Array
    divergence: jax.Array
    agreement: jax.Array


def loss_sum(
    model: Predictor, last: jax.Array, tokens: jax.Array, weights: jax.Array, target: Target | None = None
) -> jax.Array:
    """Sums the losses of predictions in nats, each times its weight, with a gradient, float32 [].

    Without a target q, the loss of a prediction p is -log p(next token). With it, it is what is lost against it, 0 for
    p = q: (1 - a) KL(q || p) + a (log q(next token) - log p(next token)), with a the text's weight.

    Args:
        last: [B, T, d] stream after the last block.
        tokens: [B, T] the next tokens.
        weights: [B, T] weights of the predictions; they have no gradient.
        target: The predictions to learn; they have no gradient.
    """
    if target is None:
        loss, by_token, teacher = functools.partial(_next_token_losses, model.config), (tokens,), {}
    else:
        loss = functools.partial(_losses_against, model.config, target.teacher.config, target.text_weight)
        by_token, teacher = (tokens, target.stream), target.teacher.params
    return _sum(loss, model.params, last, jax.lax.stop_gradient((by_token, weights.astype(jnp.float32), teacher)))


def compare(model: Predictor, last: jax.Array, tokens: jax.Array, counts: jax.Array, target: Target) -> Comparison:
    """Compares predictions with those of a teacher, without a gradient; arguments as in `loss_sum`."""

    def add(total: Comparison, group: Any) -> tuple[Comparison, None]:
        x, following, stream, counts = group
        mine, theirs = model.logits(x), target.teacher.logits(stream)
        each = Comparison(
            _next_token_loss(mine, following),
            _next_token_loss(theirs, following),
            _divergence(jax.nn.softmax(theirs), theirs, mine),
            mine.argmax(axis=-1) == theirs.argmax(axis=-1),
        )
        return jax.tree.map(lambda sums, a: sums + jnp.where(counts > 0, a, 0).sum(), total, each), None

    groups = token_groups((last, tokens, target.stream, counts))
    return jax.lax.scan(add, Comparison(*jnp.zeros(4)), groups)[0]


def text_loss(config: DecoderConfig, params: Params, tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Computes the mean next-token loss [] of tokens [B, T], in nats per prediction; mask: see `counted_predictions`.

    Gradients compute each block again, and sum those of the embedding and the head in float32.
    """
    outside = {name: jax.tree.map(lambda a: a.astype(jnp.float32), params[name]) for name in ("embed", "head")}
    module = decoder.Decoder(config, policy=jax.checkpoint_policies.nothing_saveable)
    last: Any = module.apply({"params": params | outside}, tokens, logits=False)
    counts = counted_predictions(tokens, mask)
    return loss_sum(Predictor(config, outside), last, next_tokens(tokens), counts) / counts.sum()


def counted_predictions(tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns which predictions of sequences [B, T] count: those of the mask's tokens, or of all but the first."""
    after = jnp.ones_like(tokens[:, 1:], bool) if mask is None else mask[:, 1:] > 0
    return jnp.pad(after, [(0, 0), (0, 1)])


def next_tokens(tokens: jax.Array) -> jax.Array:
    """Returns the token after each one of tokens [B, T]; after the last comes the first, as the next one is unknown."""
    return jnp.roll(tokens, -1, axis=1)


_Loss = Callable[[Params, jax.Array, Any, Params], jax.Array]
"""Losses [N], from the weights outside the blocks, the stream [N, d], the targets [N, ...], and the teacher's weights.
"""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(loss: _Loss, params: Params, last: jax.Array, fixed: tuple[Any, jax.Array, Params]) -> jax.Array:
    def add(total: jax.Array, some: Any) -> tuple[jax.Array, None]:
        return total + _weighted(loss, params, some[0], some[1:], fixed[2]), None

    return jax.lax.scan(add, jnp.float32(0), token_groups((last, *fixed[:2])))[0]


def _sum_and_gradient(loss: _Loss, params: Any, last: Any, fixed: Any) -> tuple[jax.Array, tuple[Params | None, Any]]:
    moves = any(leaf.perturbed for leaf in jax.tree.leaves(params, is_leaf=_is_primal))
    params, last, (targets, weights, teacher) = jax.tree.map(
        lambda a: a.value, (params, last, fixed), is_leaf=_is_primal
    )
    of = jax.value_and_grad(functools.partial(_weighted, loss), argnums=(0, 1) if moves else (1,))

    def add(total: Any, some: Any) -> tuple[Any, jax.Array]:
        value, (*by_params, by_last) = of(params, some[0], some[1:], teacher)
        return jax.tree.map(jnp.add, total, (value, by_params)), by_last

    zeros = (jnp.float32(0), [jax.tree.map(jnp.zeros_like, params)] if moves else [])
    (value, by_params), by_last = jax.lax.scan(add, zeros, token_groups((last, targets, weights)))
    by_last = by_last.reshape(-1, last.shape[-1])[: last[..., 0].size].reshape(last.shape)
    return value, (by_params[0] if moves else None, by_last)


def _times(_: _Loss, gradient: tuple[Params | None, jax.Array], factor: Any) -> tuple[Any, Any, None]:
    return *jax.tree.map(lambda a: (a * factor).astype(a.dtype), gradient), None


_sum.defvjp(_sum_and_gradient, _times, symbolic_zeros=True)


def _is_primal(value: Any) -> bool:
    return isinstance(value, jax.custom_derivatives.CustomVJPPrimal)


def _weighted(loss: _Loss, params: Params, last: jax.Array, some: tuple[Any, jax.Array], teacher: Params) -> jax.Array:
    targets, weights = some
    return jnp.where(weights > 0, weights * loss(params, last, targets, teacher), 0).sum()


def token_groups(by_token: Any) -> Any:
    """Divides arrays [B, T, ...] into groups [G, n, ...] of tokens; the last one is filled up with zeros."""

    def one(array: jax.Array) -> jax.Array:
        flat = array.reshape(-1, *array.shape[2:])
        size = min(CPU_HEAD_TOKENS if platform() == "cpu" else HEAD_TOKENS, len(flat))
        flat = jnp.pad(flat, [(0, -len(flat) % size), *[(0, 0)] * (flat.ndim - 1)])
        return flat.reshape(-1, size, *flat.shape[1:])

    return jax.tree.map(one, by_token)


def _next_token_losses(
    config: DecoderConfig, params: Params, x: jax.Array, target: tuple[jax.Array], _: Params
) -> jax.Array:
    return _next_token_loss(Predictor(config, params).logits(x), target[0])


def _losses_against(
    config: DecoderConfig,
    teacher: DecoderConfig,
    text_weight: float,
    params: Params,
    x: jax.Array,
    by_token: tuple[jax.Array, jax.Array],
    teacher_params: Params,
) -> jax.Array:
    (tokens, stream), mine = by_token, Predictor(config, params).logits(x)
    theirs = Predictor(teacher, teacher_params).logits(stream)
    target = jax.nn.softmax(theirs)
    if text_weight:
        target = (1 - text_weight) * target + text_weight * jax.nn.one_hot(tokens, target.shape[-1])
    return _divergence(target, theirs, mine)


def _next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns -log p(token). logits: [N, v], tokens: [N] -> [N]."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]


def _divergence(target: jax.Array, theirs: jax.Array, mine: jax.Array) -> jax.Array:
    """Returns the expectation over a target [N, v] of the difference of log-probabilities of two logits, [N]."""
    # Differences of logits, whose sums keep small losses apart, and which need fewer passes than probabilities.
    expected = (target * (theirs - mine)).sum(axis=-1)
    return expected - (jax.nn.logsumexp(theirs, axis=-1) - jax.nn.logsumexp(mine, axis=-1))
