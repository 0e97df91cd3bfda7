"""Inspection of a model in a notebook: its predictions, and their quality.

`logits` and `loss` are pure functions of a model and tokens: they work under ``jax.jit`` and ``jax.grad``. The others
run on the host: they check numbers, call jitted programs one after the other, and return results.
"""

from typing import Any

import jax
import jax.numpy as jnp

from spap_jax.data.token_ids import token_blocks
from spap_jax.data.tokens import check_counted, mask_of
from spap_jax.errors import UserError
from spap_jax.evaluation.perplexity import compare
from spap_jax.evaluation.perplexity import perplexity as window_perplexity
from spap_jax.models import decoder
from spap_jax.models.loss import text_loss
from spap_jax.models.model import Model, checked
from spap_jax.numerics import forward_precision
from spap_jax.parallel.mesh import use_mesh
from spap_jax.parallel.placement import bytes_of


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
        tokens: Windows of token ids [B, T], or the result of ``load_tokens``, whose mask says which tokens count.
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

    It runs on the host, in batches; arguments are as in `perplexity`.

    Raises:
        UserError: the tokens are unusable for a model, nothing to predict, other vocabularies, or no such devices.
    """
    dense, pruned = checked(dense), checked(pruned)
    blocks = token_blocks(tokens, dense.config)
    with use_mesh(devices, model_devices, bytes_of((dense.params, pruned.params))):
        return compare(dense, pruned, blocks, batch_tokens, mask_of(tokens)).divergence


def logits(model: Model, tokens: Any, attention_mask: Any = None) -> jax.Array:
    """The next-token logits at every position, float32 [B, T, v]: a pure function, for ``jax.jit`` and ``jax.grad``.

    Under tracing, token ids are unknown, so ids outside the vocabulary are not refused.

    Args:
        tokens: Token ids [B, T], which may be traced; or the result of ``load_tokens``.
        attention_mask: [B, T], 0 at padding and 1 elsewhere; by default there is no padding.

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
    """Mean negative log-likelihood per predicted token, in nats, float32 [].

    It is a pure function: ``jax.grad(spap.loss)(model, tokens)`` returns a model that holds the gradients. A sequence
    of T tokens has T - 1 predictions. Only a few tokens' logits are in memory at once, and gradients recompute each
    layer's activations. Under tracing, ids outside the vocabulary are not refused.

    Args:
        tokens: Token ids [B, T], which may be traced; or the result of ``load_tokens``, whose mask says which tokens
            count.

    Raises:
        UserError: the tokens are unusable for the model, or there is nothing to predict.
    """
    model = checked(model)
    blocks = token_blocks(tokens, model.config)
    if blocks.shape[1] < 2:
        raise UserError(f"a loss needs sequences of at least two tokens, not {list(blocks.shape)}.")
    check_counted(mask := mask_of(tokens), "the sequences")
    return _text_loss(model.config, model.params, blocks, mask)


_logits = jax.jit(forward_precision(decoder.forward), static_argnames="config")
_text_loss = jax.jit(forward_precision(text_loss), static_argnames="config")
