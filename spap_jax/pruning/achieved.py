"""Achieved versus requested sparsity, which differ because widths and numbers of heads are rounded."""

from spap_jax.errors import warn
from spap_jax.models.config import DecoderConfig
from spap_jax.quantities import share_text
from spap_jax.reporting.schema import Sparsities, Sparsity
from spap_jax.settings import PruneSettings

_MOST = 0.9
"""Fraction of removed channels above which a warning is given."""


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
