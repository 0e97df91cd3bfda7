"""Second moments of one block's MLP or attention, accumulated over token chunks: the only input of the solver."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spap_jax.models import DecoderConfig, Params, decoder
from spap_jax.numerics import full_precision
from spap_jax.parallel import mesh
from spap_jax.parallel.program import program
from spap_jax.pruning.streams import attended, mlp_hidden
from spap_jax.pruning.target import aim
from spap_jax.solver.alternating import Tokens, Weights, mean_products
from spap_jax.solver.problem import Problem, explained


class Moments(NamedTuple):
    """A layer's problem, with the means that recover the output bias.

    Attributes:
        problem: Second moments; centred if there is an output bias.
        hidden_mean: [f] mean of every hidden channel.
        target_mean: [d] mean of the target.
        variance: [f] variance of every hidden channel.
    """

    problem: Problem
    hidden_mean: jax.Array
    target_mean: jax.Array
    variance: jax.Array


@program(static_argnames=("config", "correction"))
@full_precision
def accumulate(config: DecoderConfig, layer: Params, tokens: Tokens, correction: float = 1.0) -> Moments:
    """Accumulates the moments of a block's MLP in one pass over the tokens, towards ``target.aim``."""

    def seen(flat: Tokens) -> tuple[jax.Array, jax.Array]:
        channels = decoder.block(config, layer, flat.residual, method=mlp_hidden)
        return channels, aim(config, layer, correction, flat, channels)

    return _accumulate(lambda chunk: seen(chunk.flat()), layer["mlp"]["down"], config.mlp_bias, tokens)


@program(static_argnames="config")
@full_precision
def accumulate_attention(config: DecoderConfig, layer: Params, tokens: Tokens) -> Moments:
    """Accumulates the moments of attention, whose channels (f) are those of all heads (n h), in the same way."""
    weight = layer["attention"]["o"].reshape(-1, config.width)

    def seen(chunk: Tokens) -> tuple[jax.Array, jax.Array]:
        heads = decoder.block(config, layer, chunk.residual, method=attended)
        return heads.reshape(-1, len(weight)), chunk.flat().target

    return _accumulate(seen, weight, config.output_bias, tokens)


def _accumulate(
    seen: Callable[[Tokens], tuple[jax.Array, jax.Array]], weight: jax.Array, centred: bool, tokens: Tokens
) -> Moments:
    """Accumulates the moments of a weight's [f, d] channels [N, f] and a target [N, d], sharded along the rows."""

    f, d = weight.shape

    def weighted(chunk: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
        h, y = map(chunk.flat().weighted, seen(chunk))
        return h, y, jnp.square(y).sum()

    gram, cross, hidden_mean, target_mean, power = mean_products(weighted, tokens, f, d)
    variance = jnp.diagonal(gram) - jnp.square(hidden_mean)
    problem = Problem(gram, cross, power, weight.astype(jnp.float32))
    if centred:
        problem = problem.centred(hidden_mean, target_mean)
    problem = jax.tree.map(lambda a: mesh.shard_rows(a) if a.ndim else a, problem)
    return Moments(problem, hidden_mean, target_mean, jnp.maximum(variance, 0))


def relative_error(seen: Moments, centred: bool, kept: jax.Array, weights: Weights) -> jax.Array:
    """Computes ``|Y - H_S V - b|^2 / |Y|^2``, [], on the tokens of the moments, without another pass over them.

    Args:
        centred: Whether the moments are centred, which is the case if the dense layer has an output bias.
        kept: [k] channel numbers.
        weights: The output projection [k, d] of these channels and the bias [d], if there is one.
    """
    mean = jnp.square(seen.target_mean - seen.hidden_mean[kept] @ weights.down)
    bias = 0 if weights.bias is None else weights.bias
    left = jnp.square(seen.target_mean - seen.hidden_mean[kept] @ weights.down - bias)
    squared = seen.problem.target_power - explained(seen.problem, kept, weights.down)
    squared = squared + (left - (0 if centred else mean)).sum()
    power = seen.problem.target_power + (jnp.square(seen.target_mean).sum() if centred else 0)
    return jnp.maximum(squared, 0) / jnp.maximum(power, jnp.finfo(jnp.float32).tiny)
