"""The config of the pruned decoder, which follows from the dense one's and the settings alone."""

import dataclasses

from spap_jax.errors import UserError, option
from spap_jax.methods import update_used
from spap_jax.models.config import DecoderConfig
from spap_jax.models.registry import FAMILIES
from spap_jax.pruning import reduce
from spap_jax.settings import PruneSettings


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
