"""Inspection of a model in a notebook: its predictions, their quality, and the statistics that pruning uses.

`logits` and `loss` are pure functions of a model and tokens: they work under ``jax.jit`` and ``jax.grad``. The others
run on the host: they check numbers, call jitted programs one after the other, and return results.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax.data.tokens import check_counted, ids_of, mask_of
from spap_jax.errors import UserError
from spap_jax.evaluation.perplexity import check_batch, check_length, compare
from spap_jax.evaluation.perplexity import perplexity as window_perplexity
from spap_jax.models import DecoderConfig, Params, decoder
from spap_jax.models.model import Model, checked
from spap_jax.numerics import full_precision, is_concrete
from spap_jax.parallel.mesh import use_mesh
from spap_jax.parallel.placement import bytes_of
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import streams
from spap_jax.pruning.moments import accumulate
from spap_jax.pruning.pipeline import resized
from spap_jax.pruning.predictions import get_layer
from spap_jax.pruning.streams import Streams
from spap_jax.solver.alternating import Tokens
from spap_jax.solver.problem import Problem
from spap_jax.training.forward import Student
from spap_jax.training.step import Sequences, text_loss


def token_blocks(tokens: Any, config: DecoderConfig) -> Any:
    """Returns token ids [B, T] as int32, checked against the model.

    Traced ids, inside ``jax.jit``, stay traced, and only their shape and dtype are checked.

    Raises:
        UserError: not a block of token ids, too long for the model's positions, or ids outside the vocabulary.
    """
    blocks = ids_of(tokens)
    if isinstance(blocks, str | Path):
        raise UserError(
            f"tokens must be whole numbers [B, T], not the text {str(blocks)[:40]!r}: spap.load_tokens makes them of a "
            "file, a data set or a list of texts."
        )
    if is_concrete(blocks):
        try:
            blocks = np.asarray(blocks)
        except (TypeError, ValueError) as error:  # lengths differ, or a tensor of another library is on a device
            raise UserError(
                "tokens must be whole numbers [B, T] in the memory of the host, with all sequences of the same length."
            ) from error
    if blocks.ndim != 2 or 0 in blocks.shape or not np.issubdtype(blocks.dtype, np.integer):
        raise UserError(f"tokens must be whole numbers [B, T], not {blocks.dtype} {list(blocks.shape)}.")
    mask = mask_of(tokens)
    if mask is not None and (mask.shape != blocks.shape or mask.dtype != bool):
        raise UserError(
            f"the mask of tokens {list(blocks.shape)} must be bool of that shape, not {mask.dtype} {list(mask.shape)}."
        )
    check_length(config, blocks.shape[1])
    if is_concrete(blocks) and (blocks.min() < 0 or blocks.max() >= config.vocabulary):
        raise UserError(
            f"token ids go from {blocks.min()} to {blocks.max()}, outside the model's vocabulary of "
            f"{config.vocabulary}: make them with the tokenizer of this model."
        )
    return blocks.astype(np.int32)


def perplexity(
    model: Model,
    tokens: Any,
    batch_tokens: int = 4096,
    *,
    devices: int | None = None,
    model_devices: int | None = None,
) -> float:
    """Perplexity: exp of the mean negative log-likelihood per predicted token, T - 1 in each window of T tokens.

    It runs on the host, in batches; inside ``jax.jit`` and ``jax.grad`` use `loss`.

    Args:
        model: The model.
        tokens: Windows of token ids [B, T], or the result of ``load_tokens``, of which only the tokens in the mask
            count, if there is one; windows are independent.
        batch_tokens: Tokens that a device processes at once.
        devices: Number of devices to use; by default all of them, but only one if they are CPUs.
        model_devices: Number of devices that the weights are sharded over; by default as many as the weights need.

    Raises:
        UserError: the tokens are unusable for the model, there is nothing to predict, or there are no such devices.
    """
    model = checked(model)
    blocks = token_blocks(tokens, model.config)
    with use_mesh(devices, model_devices, bytes_of(model.params)):
        return window_perplexity(model, blocks, batch_tokens, mask=mask_of(tokens))


def divergence(
    dense: Model,
    pruned: Model,
    tokens: Any,
    batch_tokens: int = 4096,
    *,
    devices: int | None = None,
    model_devices: int | None = None,
) -> float:
    """KL(dense || pruned) in nats per predicted token: how far the pruned model's predictions are from the dense one's.

    It runs on the host, in batches.

    Args:
        dense: The reference model.
        pruned: The model pruned from it.
        tokens: Windows of token ids [B, T], or the result of ``load_tokens``, of which only the tokens in the mask
            count, if there is one; windows are independent.
        batch_tokens: Tokens that a device processes at once.
        devices: Number of devices to use; by default all of them, but only one if they are CPUs.
        model_devices: Number of devices that the weights are sharded over; by default as many as the weights need.

    Raises:
        UserError: the tokens are unusable for a model, there is nothing to predict, the vocabularies differ, or there
            are no such devices.
    """
    dense, pruned = checked(dense), checked(pruned)
    blocks = token_blocks(tokens, dense.config)
    with use_mesh(devices, model_devices, bytes_of((dense.params, pruned.params))):
        return compare(dense, pruned, blocks, batch_tokens, mask_of(tokens)).divergence


def logits(model: Model, tokens: Any, attention_mask: Any = None) -> jax.Array:
    """The next-token logits at every position. A pure function: it works under ``jax.jit`` and ``jax.grad``.

    Under tracing, token ids are unknown, so ids outside the vocabulary are not refused.

    Args:
        model: The model, whose parameters may be traced.
        tokens: Token ids [B, T], which may be traced; or the result of ``load_tokens``.
        attention_mask: [B, T], 0 at padding and 1 elsewhere; by default there is no padding.

    Returns:
        Float32 logits [B, T, v].

    Raises:
        UserError: the tokens are unusable for the model, or the mask has another shape.
    """
    model = checked(model)
    blocks = token_blocks(tokens, model.config)
    valid = jnp.ones(blocks.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
    if valid.shape != blocks.shape:
        raise UserError(f"attention_mask has the shape {list(valid.shape)}, and the tokens have {list(blocks.shape)}.")
    return _logits(model.config, model.params, blocks, valid)


def loss(model: Model, tokens: Any) -> jax.Array:
    """Mean negative log-likelihood per predicted token, in nats.

    It is a pure function: ``jax.grad(spap.loss)(model, tokens)`` returns a model that holds the gradients. A sequence
    of T tokens has T - 1 predictions; with the result of ``load_tokens``, those of the tokens in the mask count, if
    there is one. Only a few tokens' logits are in memory at once, and gradients recompute each layer's activations.
    Under tracing, ids outside the vocabulary are not refused.

    Args:
        model: The model, whose parameters may be traced.
        tokens: Token ids [B, T], which may be traced; or the result of ``load_tokens``.

    Returns:
        Float32 [].

    Raises:
        UserError: the tokens are unusable for the model, or there is nothing to predict.
    """
    model = checked(model)
    blocks = token_blocks(tokens, model.config)
    if blocks.shape[1] < 2:
        raise UserError(f"a loss needs sequences of at least two tokens, not {list(blocks.shape)}.")
    check_counted(mask := mask_of(tokens), "the sequences")
    return _loss(model.config, model.params, blocks, mask)


def moments(model: Model, tokens: Any, layer: int, batch_tokens: int = 4096) -> Problem:
    """The second moments of one layer's MLP in a dense model, which are the solver's input.

    They are those of ``schedule="parallel"``; with ``schedule="sequential"``, pruning takes them on the activations
    that the already pruned layers produce. If the MLP has an output bias, as in OPT, they are centred. To solve
    problem p, call ``spap.solver.solve(p.gram, p.cross, p.weight, keep, target_power=p.target_power)``.

    Args:
        model: The dense model.
        tokens: Token ids [B, T], or the result of ``load_tokens``.
        layer: Number of the layer, from 0.
        batch_tokens: Tokens that pass through a layer at once.

    Returns:
        ``gram`` [f, f], ``cross`` [f, d], ``target_power`` [] and the dense output projection ``weight`` [f, d].

    Raises:
        UserError: the tokens are unusable for the model, or it has no such layer.
    """
    return accumulate(*_entered(model, tokens, layer, batch_tokens)).problem


def hidden(model: Model, tokens: Any, layer: int, batch_tokens: int = 4096) -> jax.Array:
    """The hidden activations of one layer's MLP, which are the input of its output projection.

    Args:
        model: The model.
        tokens: Token ids [B, T], or the result of ``load_tokens``.
        layer: Number of the layer, from 0.
        batch_tokens: Tokens that pass through a layer at once.

    Returns:
        Float32 [B, T, f].

    Raises:
        UserError: the tokens are unusable for the model, or it has no such layer.
    """
    config, block, entered = _entered(model, tokens, layer, batch_tokens)
    channels = _hidden(config, block, entered.residual)
    return channels.reshape(-1, *channels.shape[2:])[: len(token_blocks(tokens, model.config))]  # padding comes last


def _entered(model: Model, tokens: Any, layer: int, batch_tokens: int) -> tuple[DecoderConfig, Params, Tokens]:
    """Passes tokens through the dense model up to the MLP of a layer.

    Returns:
        The decoder with this layer's width, the layer's parameters, and the stream before the MLP's residual addition
        with the desired stream after it, [C, B, T, d] each.
    """
    model = checked(model)
    if not isinstance(layer, int | np.integer) or not 0 <= layer < model.config.layers:
        raise UserError(f"layer must be a whole number from 0 to {model.config.layers - 1}, not {layer!r}.")
    blocks = token_blocks(tokens, model.config)
    check_batch(batch_tokens)

    def enter(index: int, stream: Streams) -> tuple[DecoderConfig, Params, Streams]:
        config = model.config.of_layer(index)
        params = resized(get_layer(model.params["layers"], index), config.intermediate)
        return config, params, streams.enter_dense_mlp(config, params, stream)

    size = streams.largest_divisor(len(blocks), max(1, batch_tokens // blocks.shape[1]))
    entered = enter(0, streams.start(model.config, model.params, chunked(blocks, size)))
    for index in range(1, int(layer) + 1):
        entered = enter(index, streams.leave_dense_mlp(*entered))
    config, params, stream = entered
    return config, params, streams.fitting_tokens(stream)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def _hidden(config: DecoderConfig, layer: Params, residual: jax.Array) -> jax.Array:
    return jax.lax.map(lambda chunk: decoder.block(config, layer, chunk, method=streams.mlp_hidden), residual)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def _logits(config: DecoderConfig, params: Params, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    return decoder.forward(config, params, tokens, valid)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def _loss(config: DecoderConfig, params: Params, tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    return text_loss(Student(config, {}, params), Sequences(tokens, mask=mask))
