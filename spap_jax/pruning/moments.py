"""Second moments of one block's MLP, accumulated over token chunks: all that the solver sees of the calibration."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spap_jax import devices
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import full_precision
from spap_jax.pruning.streams import mlp_hidden
from spap_jax.solver.alternating import Tokens
from spap_jax.solver.problem import Problem


class Moments(NamedTuple):
    """A layer's problem, with the means that recover the output bias.

    Attributes:
        problem: Second moments; centred where the MLP has an output bias.
        hidden_mean: [f] mean of every hidden channel.
        target_mean: [d] mean of the target.
        variance: [f] variance of every hidden channel.
    """

    problem: Problem
    hidden_mean: jax.Array
    target_mean: jax.Array
    variance: jax.Array


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def accumulate(config: DecoderConfig, layer: Params, tokens: Tokens) -> Moments:
    """One pass over the tokens; no activation is kept beyond its chunk."""
    f, d = config.intermediate, config.width
    start = (jnp.zeros((f, f)), jnp.zeros((f, d)), jnp.zeros(f), jnp.zeros(d), jnp.zeros(()))

    def add(total: tuple, chunk: Tokens) -> tuple[tuple, None]:
        chunk = chunk.flat()
        h = decoder.block(config, layer, chunk.residual, method=mlp_hidden)
        y = chunk.target
        # Transposed in memory first: XLA:CPU is twice as slow at a product that contracts the rows of a large array.
        transposed = jax.lax.optimization_barrier(h.T)
        parts = (transposed @ h, h.T @ y, h.sum(axis=0), y.sum(axis=0), jnp.square(y).sum())
        return jax.tree.map(jnp.add, total, parts), None

    totals = devices.total(lambda own: jax.lax.scan(add, start, own)[0], tokens)
    count = tokens.residual.size // d
    gram, cross, hidden_mean, target_mean, power = jax.tree.map(lambda total: total / count, totals)
    variance = jnp.diagonal(gram) - jnp.square(hidden_mean)
    if config.mlp_bias:
        gram = gram - hidden_mean[:, None] * hidden_mean[None, :]
        cross = cross - hidden_mean[:, None] * target_mean[None, :]
        power = power - jnp.square(target_mean).sum()
    weight = layer["mlp"]["down"].astype(jnp.float32)
    return Moments(Problem(gram, cross, power, weight), hidden_mean, target_mean, jnp.maximum(variance, 0))
