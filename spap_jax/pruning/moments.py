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
    """Accumulates the moments of a block's MLP in one pass over the tokens; see `mean_products`.

    ``correction`` is that of ``target.aim``; the output of the dense MLP follows from the moments of its channels.
    """

    def hidden(residual: jax.Array) -> jax.Array:
        return decoder.block(config, layer, residual.reshape(-1, config.width), method=mlp_hidden)

    def target(flat: Tokens) -> jax.Array:
        return flat.target if flat.output is None else aim(config, layer, correction, flat)

    mlp = layer["mlp"]
    return _accumulate(hidden, target, mlp["down"], config.mlp_bias, tokens, mlp.get("down_bias"), correction)


@program(static_argnames="config")
@full_precision
def accumulate_attention(config: DecoderConfig, layer: Params, tokens: Tokens) -> Moments:
    """Accumulates the moments of attention, whose channels (f) are those of all heads (n h), in the same way."""
    weight = layer["attention"]["o"].reshape(-1, config.width)

    def heads(residual: jax.Array) -> jax.Array:
        return decoder.block(config, layer, residual, method=attended).reshape(-1, len(weight))

    return _accumulate(heads, lambda flat: flat.target, weight, config.output_bias, tokens)


def _accumulate(
    hidden: Callable[[jax.Array], jax.Array],
    target: Callable[[Tokens], jax.Array],
    weight: jax.Array,
    centred: bool,
    tokens: Tokens,
    bias: jax.Array | None = None,
    correction: float = 1.0,
) -> Moments:
    """Accumulates the moments of a weight's [f, d] channels [N, f] and a target [N, d], sharded along the rows."""
    f, d = weight.shape
    weight = weight.astype(jnp.float32)

    def seen(chunk: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
        flat = chunk.flat()
        h, y = flat.weighted(hidden(chunk.residual)), flat.weighted(target(flat))
        return h, y, jnp.square(y).sum()

    gram, cross, hidden_mean, target_mean, power = mean_products(seen, tokens, f, d)
    if correction < 1 and tokens.output is None:
        # Adds 1 - c times the moments of the dense output, H W + b, and its products with what is missing.
        own = mesh.shard_rows(gram @ weight)
        bias = jnp.zeros(d, jnp.float32) if bias is None else bias.astype(jnp.float32)
        own_mean = hidden_mean @ weight + bias
        c = correction
        crossed = (weight * cross).sum() + bias @ target_mean
        own_power = (weight * own).sum() + bias @ (2 * own_mean - bias)
        power = (1 - c) ** 2 * own_power + 2 * c * (1 - c) * crossed + c**2 * power
        cross = (1 - c) * (own + hidden_mean[:, None] * bias[None, :]) + c * cross
        target_mean = (1 - c) * own_mean + c * target_mean
    variance = jnp.diagonal(gram) - jnp.square(hidden_mean)
    problem = Problem(gram, cross, power, weight)
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
