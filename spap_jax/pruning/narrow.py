"""The config of the pruned decoder, which follows from the dense one's and the settings alone.

What it removes differs from what was asked for, since widths and numbers of heads are rounded.
"""

import dataclasses

from spap_jax.errors import UserError, option, warn
from spap_jax.models import FAMILIES, DecoderConfig
from spap_jax.pruning import reduce
from spap_jax.quantities import share_text
from spap_jax.report.schema import Sparsities, Sparsity
from spap_jax.settings import PruneSettings
from spap_jax.solver.methods import update_used

_MOST = 0.9
"""Fraction of removed channels above which a warning is given."""


def pruned_config(config: DecoderConfig, settings: PruneSettings) -> DecoderConfig:
    """Returns the config of the decoder pruned from ``config``: narrower, and with biases if the update adds them.

    Every layer loses the same fraction of its channels, as in the allocation "uniform"; "global" starts from it.

    Raises:
        UserError: rounding leaves nothing to remove, or no stock loader would accept the number of heads.
    """
    multiple = settings.multiple(config.intermediate)
    keep = [reduce.kept_width(width, settings.sparsity, multiple) for width in config.layer_widths]
    for kept, width in zip(keep, config.layer_widths, strict=True):
        if kept == width:
            raise UserError(
                f"nothing to remove: {option('sparsity', settings.sparsity)} of {width} channels, rounded to a "
                f"multiple of {multiple}, keeps all of them; raise {option('sparsity')} or lower "
                f"{option('round_to')}."
            )
    added = update_used(settings) == "bias"
    if added and "output" in config.norms:
        raise UserError(
            "the update 'bias' adds a constant to the MLP's output, and the norm that follows it in this model divides "
            f"by another number for every token: use {option('update', 'none')} or {option('update', 'refit')}."
        )
    narrow = dataclasses.replace(config.with_widths(keep), mlp_bias=config.mlp_bias or added)
    return narrow.with_kv_heads(_kept_kv_heads(config, settings.attention_sparsity))


def sparsities(config: DecoderConfig, narrow: DecoderConfig, settings: PruneSettings) -> Sparsities:
    """Computes the fractions that pruning ``config`` to ``narrow`` removes."""
    channels = 1 - sum(narrow.layer_widths) / sum(config.layer_widths)
    heads = 1 - narrow.kv_heads / config.kv_heads
    return Sparsities(Sparsity(settings.sparsity, channels), Sparsity(settings.attention_sparsity, heads))


def warn_of_sparsity(config: DecoderConfig, narrow: DecoderConfig, settings: PruneSettings) -> None:
    """Warns if rounding changes the requested sparsity noticeably, or if hardly any channels are left."""
    found = sparsities(config, narrow, settings)
    stay = f"{narrow.intermediate} of {config.intermediate} stay in a layer"
    if found.channels.missed:
        warn(
            f"sparsity {settings.sparsity} removes {share_text(found.channels.achieved)} of the MLP channels: {stay}, "
            f"rounded to a multiple of {settings.multiple(config.intermediate)}."
        )
    if found.channels.achieved > _MOST:
        warn(
            f"sparsity {settings.sparsity} removes nearly all MLP channels ({stay}): little of what the model can do "
            "is left, so choose a lower one unless that is what you want to see."
        )
    if found.heads.missed:
        removed = share_text(found.heads.achieved)
        warn(
            f"attention sparsity {settings.attention_sparsity} removes {removed} of the heads: in a layer "
            f"{narrow.kv_heads} of {config.kv_heads} key/value heads stay, which are whole, and at least one."
        )


def _kept_kv_heads(config: DecoderConfig, sparsity: float) -> int:
    if sparsity == 0:
        return config.kv_heads
    keep = reduce.kept_width(config.kv_heads, sparsity, 1)
    FAMILIES[config.family].check_heads(config, keep)
    if keep == config.kv_heads:
        name = option("attention_sparsity")
        advice = f"leave {name} out" if keep == 1 else f"raise {name}"
        raise UserError(
            f"nothing to remove: {option('attention_sparsity', sparsity)} of {keep} key/value "
            f"{'head' if keep == 1 else 'heads'}, rounded, keeps all of them; {advice}."
        )
    return keep
