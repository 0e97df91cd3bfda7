"""Perplexity as papers measure it, and divergence of two models: on fixed windows, every prediction counted once."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.models import DecoderConfig, Params, decoder
from spap_jax.models.model import Model
from spap_jax.numerics import full_precision, sliced, to_slice
from spap_jax.parallel import collectives, mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.settings import is_count
from spap_jax.training.objective import Predictor, loss_sum, next_tokens, token_groups


def perplexity(
    model: Model,
    tokens: np.ndarray,
    batch_tokens: int = 4096,
    watch: Callable[[int, int], None] = lambda *_: None,
    mask: np.ndarray | None = None,
) -> float:
    """Returns exp of the mean negative log-likelihood per predicted token.

    Each window of T tokens has T - 1 predictions, of which those of the tokens in the mask count. Windows are
    independent of each other. Inside ``mesh.use_mesh``, weights and windows are sharded over the mesh, and all
    processes of a run must call this.

    Args:
        model: The model.
        tokens: Windows [B, T].
        batch_tokens: Number of tokens that a device processes at once.
        watch: Progress callback, called between batches with the number of windows done and the total.
        mask: bool [B, T], True on the tokens that count; by default all count.

    Raises:
        UserError: there is nothing to predict, or a window is longer than the model's positions.
    """
    tokens, counted = counted_windows("perplexity", tokens, mask)
    check_length(model.config, tokens.shape[1])
    params = shard_params(model.config, model.params)
    count, begun, total = len(tokens), 0, None
    watch(0, count)
    for part, counts in window_batches(tokens, counted, batch_tokens):
        before, done = total, begun
        loss = negative_log_likelihood(model.config, params, mesh.shard_chunks(part), mesh.shard_chunks(counts))
        total = loss if total is None else total + loss
        begun = min(count, begun + counts.shape[0] * counts.shape[1])
        jax.block_until_ready(before)  # meanwhile the device works on the next batch
        watch(done, count)
    value = float(np.exp(np.float64(total) / counted.sum()))
    watch(count, count)
    return value


class Comparison(NamedTuple):
    """Perplexities and divergence of two models on the same windows.

    Attributes:
        dense: Perplexity of the first model.
        pruned: Perplexity of the second model.
        divergence: Mean over the predictions of KL(first || second), in nats per token.
        agreement: Fraction of the predictions for which both have the same most likely token.
    """

    dense: float
    pruned: float
    divergence: float
    agreement: float


def compare(
    dense: Model, pruned: Model, tokens: np.ndarray, batch_tokens: int = 4096, mask: np.ndarray | None = None
) -> Comparison:
    """Returns the mean KL(dense || pruned) of the next-token distributions and both perplexities, from one pass each.

    What counts, and how it is computed, is as for ``perplexity``.

    Args:
        dense: The reference model.
        pruned: The model that is compared with it; its vocabulary must be the same.
        tokens: Windows [B, T].
        batch_tokens: Number of tokens that pass through the models at once.
        mask: bool [B, T], True on the tokens that count; by default all count.

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
    batches = window_batches(tokens, counted, batch_tokens)
    total = sum(_sums(configs, params, *map(mesh.shard_chunks, each)) for each in batches)
    loss, other, divergence, agreement = np.asarray(total, np.float64) / counted.sum()
    return Comparison(float(np.exp(loss)), float(np.exp(other)), float(divergence), float(agreement))


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


def check_batch(batch_tokens: int) -> None:
    """Checks the number of tokens that pass through a model at once.

    Raises:
        UserError: it is not a whole number of at least 1.
    """
    if not is_count(batch_tokens):
        raise UserError(f"{option('batch_tokens')} must be a whole number of at least 1, not {batch_tokens!r}.")


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


def window_batches(
    tokens: np.ndarray, counted: np.ndarray, batch_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields windows [B, T] in batches [D, b, T], b for each device, with those of their predictions [B, T - 1].

    The last batch is padded with windows that do not count, so that all batches share one compilation.
    """
    check_batch(batch_tokens)
    shares = mesh.data_size()
    each = min(-(-len(tokens) // shares), max(1, batch_tokens // tokens.shape[1]))
    batch = shares * each
    for first in range(0, len(tokens), batch):
        parts = (array[first : first + batch] for array in (tokens, counted))
        whole, counts = (np.pad(part, ((0, batch - len(part)), (0, 0))) for part in parts)
        yield whole.reshape(shares, each, -1), counts.reshape(shares, each, -1)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def negative_log_likelihood(config: DecoderConfig, params: Params, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """Sums the loss of windows [D, b, T] in float32, over the predictions that count, [D, b, T - 1]."""

    def own(batch: tuple[jax.Array, jax.Array], params: Params) -> jax.Array:
        tokens, counts = (a[0] for a in batch)
        last = final_stream(config, params, tokens)
        return loss_sum(Predictor(config, params), last, next_tokens(tokens), jnp.pad(counts, ((0, 0), (0, 1))))

    return collectives.psum_over_chunks(own, (tokens, counts), params)


@functools.partial(jax.jit, static_argnames="configs")
@full_precision
def _sums(
    configs: tuple[DecoderConfig, DecoderConfig], params: tuple[Params, Params], tokens: jax.Array, counts: jax.Array
) -> jax.Array:
    """Sums the losses of both models, the divergences and the agreements over the predictions that count.

    tokens: [D, b, T], counts: [D, b, T - 1] -> [4] float32.
    """

    def own(batch: tuple[jax.Array, jax.Array], params: tuple[Params, Params]) -> jax.Array:
        tokens, counts = (a[0] for a in batch)
        both = list(zip(configs, params, strict=True))
        last = [final_stream(config, tree, tokens) for config, tree in both]

        def add(total: jax.Array, some: Any) -> tuple[jax.Array, None]:
            streams, following, counts = some
            first, second = (
                jax.nn.log_softmax(decoder.head(config, tree, x[None])[0].astype(jnp.float32))
                for (config, tree), x in zip(both, streams, strict=True)
            )
            divergences = (jnp.exp(first) * (first - second)).sum(axis=-1)
            losses = [-jnp.take_along_axis(which, following[:, None], axis=-1)[:, 0] for which in (first, second)]
            agreements = (first.argmax(axis=-1) == second.argmax(axis=-1)).astype(jnp.float32)
            each = jnp.stack([*losses, divergences, agreements])
            return total + jnp.where(counts, each, 0).sum(axis=1), None

        groups = token_groups((last, next_tokens(tokens), jnp.pad(counts, ((0, 0), (0, 1)))))
        return jax.lax.scan(add, jnp.zeros(4), groups)[0]

    return collectives.psum_over_chunks(own, (tokens, counts), params)


def final_stream(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Computes the stream after the last block in float32, without gradients. tokens: [B, T] -> [B, T, d].

    A `Decoder` computes the same, but a CPU's compiler converts all its blocks to float32 at once; see ``to_slice``.
    """
    positions = decoder.positions_in(tokens.shape)

    def step(x: jax.Array, item: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        layer, number = item
        return decoder.block(config, sliced(layer), x, positions, None, decoder.reach_of(config, number)), None

    x = decoder.embed(config, params, tokens, positions, jnp.float32)
    return jax.lax.scan(step, x, (to_slice(params["layers"]), jnp.arange(config.layers)))[0]


def check_length(config: DecoderConfig, length: int) -> None:
    """Raises UserError if sequences are longer than the model's positions."""
    if length > config.positions:
        raise UserError(
            f"sequences of {length} tokens do not fit the model's {config.positions} positions; "
            f"use a sequence length of at most {config.positions}."
        )
