"""Types and ranges of config.json values: an invalid value is refused by its field name before it is used."""

import reprlib
import sys
from typing import Any

from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig
from spap_jax.models.layers import ACTIVATIONS

_ABOVE = 2**31
"""Exclusive upper bound of sizes: JAX counts the elements of an axis in 32 bits."""

_MOST_LAYERS = 10_000
"""Limit on the number of layers: more tensor names would exhaust memory before the checkpoint could contradict them."""

_WORDS = {
    bool: "true or false",
    int: "a positive whole number below 2^31",
    float: "a number of at least 0",
    str: "a name",
    dict: "an object",
}


def of_kind(name: str, value: Any, kind: type) -> Any:
    """Returns a value of config.json after checking its kind: bool, int (a size), float (finite, at least 0), str or
    dict.

    Raises:
        UserError: the value is of another kind, or out of range.
    """
    if not _fits(value, kind):
        raise UserError(f"config.json gives {name} = {reprlib.repr(value)}, which must be {_WORDS[kind]}: correct it.")
    return value


def _fits(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and 0 < value < _ABOVE
    if kind is float:
        return type(value) in (int, float) and 0 <= value <= sys.float_info.max
    return type(value) is kind


def check_config(config: DecoderConfig) -> None:
    """Raises UserError for sizes that no model can have and for unsupported activations."""
    if config.layers > _MOST_LAYERS:
        raise UserError(f"config.json gives {config.layers} layers, more than any model has: correct it.")
    if config.head_dim < 1 or (config.head_dim % 2 and any(each.rope for each in config.attention_kinds)):
        raise UserError(
            f"config.json gives {config.heads} heads of width {config.head_dim}, which must be positive, and even for "
            "rotary embeddings: correct it."
        )
    if config.heads % config.kv_heads:
        raise UserError(
            f"config.json gives {config.heads} heads for {config.kv_heads} key/value heads, which must divide them."
        )
    if config.activation not in ACTIVATIONS:
        raise UserError(
            f"the activation {config.activation!r} is not supported; the supported ones are {', '.join(ACTIVATIONS)}."
        )
