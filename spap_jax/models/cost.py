"""Cost of a decoder, computed from its config alone: parameters, floating-point operations, bytes."""

import math
from typing import NamedTuple

from spap_jax.models.attention import query_blocks
from spap_jax.models.config import DecoderConfig
from spap_jax.models.families import Family


class Parameters(NamedTuple):
    """Parameter counts: all, those of the MLPs, and those in the matrix products of every token."""

    total: int
    mlp: int
    multiplied: int


def parameters(family: Family, config: DecoderConfig) -> Parameters:
    """Counts the parameters of a decoder."""
    total = mlp = multiplied = 0
    for rule in family.rules_for(config):
        shapes = [rule.shapes(axes)[1] for axes in (_layer_axes(config) if rule.stacked else [config.axes])]
        size = sum(map(math.prod, shapes))
        total += size
        mlp += size if rule.ours.startswith("layers/mlp/") else 0
        looked_up = rule.ours == "embed/positions" or (rule.ours == "embed/tokens" and not config.tied)
        multiplied += size if len(shapes[0]) > 1 and not looked_up else 0
    return Parameters(total, mlp, multiplied)


def _layer_axes(config: DecoderConfig) -> list[dict[str, int]]:
    return [config.of_layer(index).axes for index in range(config.layers)]


def prefill_operations(family: Family, config: DecoderConfig, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass over [B, T] tokens that computes logits for the last token only.

    Counts two per multiplied weight and token, and four per head channel of every query-key pair that is computed.
    """
    counted = parameters(family, config).multiplied
    head = config.vocabulary * config.embedding
    pairs = batch * attended_pairs(length) * config.layers
    return 2 * batch * (length * (counted - head) + head) + 4 * pairs * config.heads * config.head_dim


def attended_pairs(length: int) -> int:
    """Counts the query-key pairs computed for a sequence; keys after a block of queries are skipped."""
    return sum((last - first) * last for first, last in query_blocks(length))


def decode_bytes(family: Family, config: DecoderConfig, batch: int, length: int, weight: int, state: int = 4) -> int:
    """Bytes read by one decoding step: every multiplied weight once, and the keys and values of ``length`` tokens.

    Args:
        family: The decoder's family.
        config: The decoder.
        batch: Sequences decoded together.
        length: Tokens in the cache.
        weight: Bytes per weight.
        state: Bytes per element of a key or value.
    """
    cache = 2 * batch * length * config.layers * config.kv_heads * config.head_dim
    return parameters(family, config).multiplied * weight + cache * state
