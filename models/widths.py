"""Layers that differ in MLP width: the field of config.json that tells it, which stock loaders do not know."""

from typing import Any

from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig

WIDTHS_FIELD = "spap_intermediate_sizes"
"""The width of each layer where they differ; absent or null otherwise."""


def with_own_widths(config: DecoderConfig, widths: Any) -> DecoderConfig:
    """A config with the widths that the field gives.

    Raises:
        UserError: they are not such as layers of this config can have.
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
