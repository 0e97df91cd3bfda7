"""Statistics of one layer of the dense model, as used by pruning: its second moments and its hidden channels."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from spap_jax.model import Model
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import full_precision
from spap_jax.pruning import moments, streams
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.pipeline import resized
from spap_jax.solver.alternating import Tokens


class Entered(NamedTuple):
    """One layer of a dense model, with the tokens at its MLP.

    Attributes:
        config: The decoder, with this layer's width.
        layer: The layer's parameters.
        tokens: The stream before the MLP's residual addition and the desired stream after it, [C, B, T, d] each.
    """

    config: DecoderConfig
    layer: Params
    tokens: Tokens


def enter(model: Model, tokens: np.ndarray, layer: int, batch_tokens: int) -> Entered:
    """Passes tokens through the dense model up to the MLP of a layer.

    Args:
        model: The dense model.
        tokens: Token blocks [B, T].
        layer: Number of the layer, from 0.
        batch_tokens: Tokens that pass through a layer at once.

    Raises:
        ValueError: the model has no layer of this number.
    """
    size = streams.largest_divisor(len(tokens), max(1, batch_tokens // tokens.shape[1]))
    stream = streams.start(model.config, model.params, streams.chunked(tokens, size))
    for index in range(layer + 1):
        config = model.config.of_layer(index)
        params = jax.tree.map(lambda stack, index=index: stack[index], model.params["layers"])
        params = resized(params, config.intermediate)
        stream = streams.enter_dense_mlp(config, params, stream)
        if index == layer:
            return Entered(config, params, streams.fitting_tokens(stream))
        stream = streams.leave_dense_mlp(config, params, stream)
    raise ValueError(f"a model has no layer {layer}")


def dense_moments(entered: Entered) -> Moments:
    """Computes the second moments of the MLP's f hidden channels, and the means that recover an output bias."""
    return moments.accumulate(entered.config, entered.layer, entered.tokens)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def _hidden(config: DecoderConfig, layer: Params, residual: jax.Array) -> jax.Array:
    return jax.lax.map(lambda chunk: decoder.block(config, layer, chunk, method=streams.mlp_hidden), residual)


def dense_hidden(entered: Entered) -> jax.Array:
    """Computes the MLP's hidden channels [B, T, f], float32."""
    channels = _hidden(entered.config, entered.layer, entered.tokens.residual)
    return channels.reshape(-1, *channels.shape[2:])
