"""Perplexity as papers measure it, and divergence of two models: on fixed windows, every prediction counted once."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.models import DecoderConfig, Params, decoder, loss
from spap_jax.models.decoder import check_length
from spap_jax.models.loss import Predictor, Target, loss_sum, next_tokens
from spap_jax.models.model import Model
from spap_jax.numerics import forward_precision
from spap_jax.parallel import collectives, mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.parallel.program import program
from spap_jax.settings import is_count


def perplexity(
    model: Model,
    tokens: np.ndarray,
    batch_tokens: int = 4096,
    watch: Callable[[int, int], None] = lambda *_: None,
    mask: np.ndarray | None = None,
) -> float:
    """Returns exp of the mean negative log-likelihood per predicted token, T - 1 in each window of T tokens.

    Inside ``mesh.use_mesh``, weights and windows are sharded over the mesh, and all processes of a run must call this.

    Args:
        tokens: Windows [B, T], independent of each other.
        watch: Called between batches with the number of windows done and the total.
        mask: bool [B, T], True on the tokens that count; by default all count.

    Raises:
        UserError: there is nothing to predict, or a window is longer than the model's positions.
    """
    tokens, counted = counted_windows("perplexity", tokens, mask)
    check_length(model.config, tokens.shape[1])
    sums = functools.partial(negative_log_likelihood, model.config, shard_params(model.config, model.params))
    return float(np.exp(_total(sums, tokens, counted, batch_tokens, watch) / counted.sum()))


class Comparison(NamedTuple):
    """Perplexities and divergence of two models on the same windows.

    Attributes:
        divergence: Mean over the predictions of KL(first || second), in nats per token.
        agreement: Fraction of the predictions for which both have the same most likely token.
    """

    dense: float
    pruned: float
    divergence: float
    agreement: float


def compare(
    dense: Model,
    pruned: Model,
    tokens: np.ndarray,
    batch_tokens: int = 4096,
    mask: np.ndarray | None = None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> Comparison:
    """Returns the mean KL(dense || pruned) of the next-token distributions and both perplexities, from one pass each.

    Arguments are those of `perplexity`; the vocabularies must be the same.

    Raises:
        UserError: there is nothing to predict, a window is longer than a model's positions, or vocabularies differ.
    """
    tokens, counted = counted_windows("divergence", tokens, mask)
    configs = (dense.config, pruned.config)
    for config in configs:
        check_length(config, tokens.shape[1])
    if len({config.vocabulary for config in configs}) > 1:
        raise UserError(
            f"vocabularies of {configs[0].vocabulary} and {configs[1].vocabulary} tokens cannot be compared; "
            "give a model and what was made of it."
        )
    params = shard_params(dense.config, dense.params), shard_params(pruned.config, pruned.params)
    sums = functools.partial(_compared, configs, params)
    dense_loss, pruned_loss, divergence, agreement = _total(sums, tokens, counted, batch_tokens, watch) / counted.sum()
    return Comparison(float(np.exp(dense_loss)), float(np.exp(pruned_loss)), float(divergence), float(agreement))


def _total(
    sums: Callable[[jax.Array, jax.Array], jax.Array],
    tokens: np.ndarray,
    counted: np.ndarray,
    batch_tokens: int,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> np.ndarray:
    """Adds up in float64 what ``sums`` of each batch, windows [D, b, T] and predictions [D, b, T - 1], is in float32.

    The last batch is padded with windows that do not count, so that all batches share one compilation.
    """
    if not is_count(batch_tokens):
        raise UserError(f"{option('batch_tokens')} must be a whole number of at least 1, not {batch_tokens!r}.")
    shares, count, total = mesh.data_size(), len(tokens), np.zeros(())
    each = min(-(-count // shares), max(1, batch_tokens // tokens.shape[1]))
    batch = shares * each
    watch(0, count)
    for first in range(0, count, batch):
        parts = (array[first : first + batch] for array in (tokens, counted))
        whole = (np.pad(part, ((0, batch - len(part)), (0, 0))).reshape(shares, each, -1) for part in parts)
        total = total + np.asarray(sums(*map(mesh.shard_chunks, whole)), np.float64)
        watch(min(count, first + batch), count)
    return total


def check_finite(value: float, name: str, what: str = "perplexity") -> None:
    """Raises an error if a measure of a model's predictions is not finite.

    Raises:
        NotFiniteError: the predictions of the model called `name` overflow.
    """
    if not np.isfinite(value):
        raise NotFiniteError(
            f"the {what} of {name} is {value}: its predictions overflow in float32, so its weights are damaged, or "
            "do not belong to its config.json."
        )


def counted_windows(measure: str, tokens: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns windows [B, T] as int32, and which predictions count, bool [B, T - 1]: those of the tokens in the mask.

    Raises:
        UserError: there is nothing to predict, or nothing counts; the message names the measure.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise UserError(f"{measure} needs windows [B, T] of at least two tokens, not an array {list(tokens.shape)}.")
    counted = np.ones((len(tokens), tokens.shape[1] - 1), bool) if mask is None else mask[:, 1:]
    if not counted.any():
        raise UserError(f"{measure} needs a prediction that counts, and the mask has none: give other windows.")
    return tokens, counted


@program(static_argnames="config")
@forward_precision
def negative_log_likelihood(config: DecoderConfig, params: Params, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """Sums the loss of windows [D, b, T] in float32, over the predictions that count, [D, b, T - 1]."""

    def own(batch: tuple[jax.Array, jax.Array], params: Params) -> jax.Array:
        tokens, counts = (a[0] for a in batch)
        last = decoder.last_stream(config, params, tokens)
        return loss_sum(Predictor(config, params), last, next_tokens(tokens), jnp.pad(counts, ((0, 0), (0, 1))))

    return collectives.psum_over_chunks(own, (tokens, counts), params)


@program(static_argnames="configs")
@forward_precision
def _compared(
    configs: tuple[DecoderConfig, DecoderConfig], params: tuple[Params, Params], tokens: jax.Array, counts: jax.Array
) -> jax.Array:
    """Sums both losses, the divergences and the agreements. tokens: [D, b, T], counts: [D, b, T - 1] -> [4] float32."""

    def own(batch: tuple[jax.Array, jax.Array], params: tuple[Params, Params]) -> jax.Array:
        tokens, counts = (a[0] for a in batch)
        dense, pruned = map(Predictor, configs, params)
        target = Target(dense, decoder.last_stream(*dense, tokens))
        last, counts = decoder.last_stream(*pruned, tokens), jnp.pad(counts, ((0, 0), (0, 1)))
        found = loss.compare(pruned, last, next_tokens(tokens), counts, target)
        return jnp.stack([found.teacher_loss, found.loss, found.divergence, found.agreement])

    return collectives.psum_over_chunks(own, (tokens, counts), params)
