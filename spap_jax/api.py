"""What a notebook imports: load, prune, measure, save."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spap_jax import checkpoint
from spap_jax.data import load_tokens
from spap_jax.devices import sharing
from spap_jax.errors import UserError
from spap_jax.evaluation.divergence import mean_divergence
from spap_jax.evaluation.generation import generate
from spap_jax.evaluation.perplexity import check_length
from spap_jax.evaluation.perplexity import perplexity as window_perplexity
from spap_jax.model import Model
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import full_precision
from spap_jax.pruning.allocation import allocated_config
from spap_jax.pruning.pipeline import prune_layers
from spap_jax.pruning.report import LayerReport, PruneReport, SweepReport, data_account, new_report
from spap_jax.pruning.sampling import with_samples
from spap_jax.settings import FinetuneSettings, PruneSettings
from spap_jax.training.report import Check, FinetuneReport
from spap_jax.training.run import run
from spap_jax.training.train import Stage

__all__ = [
    "FinetuneResult",
    "PruneResult",
    "divergence",
    "finetune",
    "generate",
    "load",
    "load_tokens",
    "logits",
    "perplexity",
    "prune",
    "save",
]

load = checkpoint.load
save = checkpoint.save


@dataclass(frozen=True)
class PruneResult:
    """A smaller model and the account of how it was made."""

    model: Model
    report: PruneReport


def prune(
    model: Model,
    tokens: Any,
    *,
    settings: PruneSettings | None = None,
    progress: Callable[[LayerReport | SweepReport], None] | None = None,
    devices: int | None = None,
    model_devices: int = 1,
    **changes: Any,
) -> PruneResult:
    """Removes MLP channels from every layer and recovers the weights of the rest; ``model`` is left as it is.

    Args:
        model: What ``load`` returned, or an earlier result's model.
        tokens: Calibration token ids [B, T], or what ``load_tokens`` returned.
        settings: How; the defaults where absent.
        progress: Called with the report of every layer as it is done, and of every layer in every sweep.
        devices: Over how many devices to spread the work; all where absent, but one of a CPU's.
        model_devices: Among how many of them to divide the weights; a divisor of their number.
        **changes: Single settings, for example ``sparsity=0.3``.

    Raises:
        UserError: a setting, the tokens or the model's numbers are unusable.
    """
    settings = (settings or PruneSettings()).replace(**changes)
    token_blocks(tokens, model.config)
    tokens = with_samples(tokens, lambda: model, settings)
    blocks = token_blocks(tokens, model.config)
    reports: list[LayerReport | SweepReport] = []

    def read_layer(index: int) -> Params:
        return jax.tree.map(lambda array: array[index], model.params["layers"])

    layers: list[Params] = []
    with sharing(devices, model_devices):
        narrow = allocated_config(model.config, model.params, read_layer, blocks, settings)
        for step in prune_layers(model.config, model.params, read_layer, blocks, settings, narrow=narrow):
            reports.append(step.report)
            if progress is not None:
                progress(step.report)
            if step.final:
                layers.append(step.layer)
            del step
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    smaller = Model(narrow, model.params | {"layers": stacked}, model.source)
    return PruneResult(smaller, new_report(settings, model.config, narrow, model.source.name, tokens, reports))


@dataclass(frozen=True)
class FinetuneResult:
    """A trained model and the account of its training."""

    model: Model
    report: FinetuneReport


def finetune(
    model: Model,
    tokens: Any,
    *,
    teacher: Model | None = None,
    settings: FinetuneSettings | None = None,
    progress: Callable[[Check], None] | None = None,
    devices: int | None = None,
    model_devices: int = 1,
    **changes: Any,
) -> FinetuneResult:
    """Trains a model, usually a pruned one, on a text or towards the dense model; ``model`` is left as it is.

    Some sequences are held out. The result has the weights with the least loss on them, and is never worse on them than
    the model was.

    Args:
        model: What ``prune`` or ``load`` returned.
        tokens: Training token ids [B, T], or what ``load_tokens`` returned; the last sequences are held out.
        teacher: The dense model: the loss is then the divergence from its predictions, not that of the next token.
        settings: How; the defaults where absent.
        progress: Called after every look at the held-out sequences.
        devices: Over how many devices to spread the work; all where absent, but one of a CPU's.
        model_devices: Among how many of them to divide the weights; a divisor of their number.
        **changes: Single settings, for example ``steps=500`` or ``full=True``.

    Raises:
        UserError: a setting or the tokens are unusable, the teacher is another model's, or the training diverges.
    """
    settings = (settings or FinetuneSettings()).replace(**changes)
    blocks = token_blocks(tokens, model.config)

    def watch(stage: Stage) -> None:
        if progress is not None:
            progress(stage.checks[-1])

    with sharing(devices, model_devices):
        trained, report = run(model, blocks, teacher, settings, watch)
    return FinetuneResult(trained, replace(report, data=data_account(tokens)))


def token_blocks(tokens: Any, config: DecoderConfig) -> np.ndarray:
    """Token ids [B, T] as int32, checked against the model.

    Raises:
        UserError: not a block of token ids, too long for the model's positions, or ids outside the vocabulary.
    """
    try:
        blocks = np.asarray(getattr(tokens, "tokens", tokens))
    except ValueError as error:
        raise UserError("tokens must be whole numbers [B, T], with all sequences of the same length.") from error
    if blocks.ndim != 2 or 0 in blocks.shape or not np.issubdtype(blocks.dtype, np.integer):
        raise UserError(f"tokens must be whole numbers [B, T], not {blocks.dtype} {list(blocks.shape)}.")
    check_length(config, blocks.shape[1])
    if blocks.min() < 0 or blocks.max() >= config.vocabulary:
        raise UserError(
            f"token ids go from {blocks.min()} to {blocks.max()}, outside the model's vocabulary of "
            f"{config.vocabulary}: make them with the tokenizer of this model."
        )
    return blocks.astype(np.int32)


def perplexity(model: Model, tokens: Any, batch_tokens: int = 4096) -> float:
    """exp of the mean negative log-likelihood per predicted token: T - 1 of them in each window of T tokens.

    Args:
        model: The model.
        tokens: Windows of token ids [B, T], or what ``load_tokens`` returned; windows do not see each other.
        batch_tokens: Tokens that pass through the model at once.

    Raises:
        UserError: the tokens are unusable for the model, or there is nothing to predict.
    """
    return window_perplexity(model, token_blocks(tokens, model.config), batch_tokens)


def divergence(dense: Model, pruned: Model, tokens: Any, batch_tokens: int = 4096) -> float:
    """KL(dense || pruned) in nats per predicted token: how far the pruned model's predictions are from the dense one's.

    Args:
        dense: The model whose predictions are the standard.
        pruned: What was made of it.
        tokens: Windows of token ids [B, T], or what ``load_tokens`` returned; windows do not see each other.
        batch_tokens: Tokens that pass through the models at once.

    Raises:
        UserError: the tokens are unusable for a model, there is nothing to predict, or the vocabularies differ.
    """
    return mean_divergence(dense, pruned, token_blocks(tokens, dense.config), batch_tokens)


def logits(model: Model, tokens: Any, attention_mask: Any = None) -> jax.Array:
    """Float32 logits [B, T, v] of token ids [B, T]; ``attention_mask`` [B, T] is 0 at padding.

    Raises:
        UserError: the tokens are unusable for the model.
    """
    blocks = token_blocks(tokens, model.config)
    valid = np.ones(blocks.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    return _logits(model.config, model.params, blocks, valid)


@functools.partial(jax.jit, static_argnames="config")
@full_precision
def _logits(config: DecoderConfig, params: Params, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    return decoder.forward(config, params, tokens, valid)
