"""The target: the output that the weights of a pruned MLP are fitted to."""

import functools

import jax
import jax.numpy as jnp

from spap_jax.models import Block, DecoderConfig, Params, decoder
from spap_jax.pruning.streams import NORM_EPS, mlp_hidden
from spap_jax.solver.alternating import Tokens


def aim(
    config: DecoderConfig, layer: Params, correction: float, tokens: Tokens, hidden: jax.Array | None = None
) -> jax.Array:
    """Computes the output that a pruned MLP is fitted to, [..., d].

    That is the dense MLP's output for the pruned stream, and a share of what is then still missing to the dense stream.
    If a norm follows the MLP, it is the dense MLP's output for the dense stream, and what repairs the errors of earlier
    blocks from before the norm, as far as that changes the output little.

    Args:
        layer: Parameters of the dense block.
        correction: The share; 1 restores the dense stream, but before a norm, where nothing can, repairs nothing.
        hidden: [..., f] hidden channels of the tokens in the dense MLP. By default they are computed here.
    """
    if correction == 1:
        return tokens.target
    if tokens.output is not None:
        return tokens.output + _repair(config, layer, correction, tokens)
    if hidden is None:
        hidden = decoder.block(config, layer, tokens.residual, method=mlp_hidden)
    own = decoder.block(config, layer, hidden, method=lambda block, h: block.mlp.project(h))
    return own + correction * (tokens.target - own)


def _repair(config: DecoderConfig, layer: Params, correction: float, tokens: Tokens) -> jax.Array:
    """Computes what is added to the output before a norm to repair the stream after it, [..., d].

    The norm divides the output by its size and multiplies it by its scale s, which may be near 0. With e the errors of
    earlier blocks, the result is the size times the x that minimises c |e - s x|^2 + (1 - c) mean(e^2) |x|^2.
    """
    assert tokens.output is not None
    norm, c = functools.partial(decoder.block, config, layer, method=Block.mlp_addition), correction
    errors = tokens.total - norm(tokens.output) - tokens.residual
    scale = norm(jnp.ones([*[1] * (errors.ndim - 1), config.width]))
    size = jnp.sqrt(jnp.square(tokens.output).mean(axis=-1, keepdims=True) + NORM_EPS)
    power = jnp.square(errors).mean(axis=-1, keepdims=True)
    return size * c * scale * errors / (c * jnp.square(scale) + (1 - c) * power + jnp.finfo(jnp.float32).tiny)
