"""Per-layer MLP widths: the field of config.json that stores them, which stock loaders do not know."""

from typing import Any

from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig

WIDTHS_FIELD = "spap_intermediate_sizes"
"""The field with the width of each layer if they differ; missing or null otherwise."""


def with_own_widths(config: DecoderConfig, widths: Any) -> DecoderConfig:
    """Returns the config with the per-layer widths from the field, or unchanged if the field is missing or null.

    Raises:
        UserError: the widths are not valid for this config.
    """
    if widths is None:
        return config
    sound = isinstance(widths, list) and all(type(width) is int and width > 0 for width in widths)
    if not sound or len(widths) != config.layers or max(widths) != config.intermediate:
        raise UserError(
            f"config.json gives {WIDTHS_FIELD} = {widths!r}, which must be a positive whole number for each of the "
            f"{config.layers} layers, the largest {config.intermediate}."
        )
    return config.with_widths(widths)
