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
    layers = [config.of_layer(index).axes for index in range(config.layers)]
    total = mlp = multiplied = 0
    for rule in family.rules_for(config):
        shapes = [rule.shapes(axes)[1] for axes in (layers if rule.stacked else [config.axes])]
        size = sum(map(math.prod, shapes))
        total += size
        mlp += size if rule.ours.startswith("layers/mlp/") else 0
        looked_up = rule.ours == "embed/positions" or (rule.ours == "embed/tokens" and not config.tied)
        multiplied += size if len(shapes[0]) > 1 and not looked_up else 0
    return Parameters(total, mlp, multiplied)


def prefill_operations(family: Family, config: DecoderConfig, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass over [B, T] tokens that computes logits for the last token only.

    Counts two per multiplied weight and token, and four per head channel of every query-key pair that is computed.
    """
    counted = parameters(family, config).multiplied
    head = config.vocabulary * config.embedding
    pairs = batch * config.layers * sum((last - first) * last for first, last in query_blocks(length))
    return 2 * batch * (length * (counted - head) + head) + 4 * pairs * config.heads * config.head_dim


def decode_bytes(family: Family, config: DecoderConfig, batch: int, length: int, weight: int, cached: int) -> int:
    """Bytes read by one decoding step: every multiplied weight once, and the keys and values of ``length`` tokens.

    ``weight`` and ``cached`` are the bytes of a number in the weights and in the cache.
    """
    cache = 2 * batch * length * config.layers * config.kv_heads * config.head_dim
    return parameters(family, config).multiplied * weight + cache * cached
