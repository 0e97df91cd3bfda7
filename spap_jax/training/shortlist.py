"""The shortlist: the part of a vocabulary among which joint steps compare predictions.

Text of N tokens holds about 40 sqrt(N) different ones, which grows far more slowly than the text and is a small part
of a vocabulary of a hundred thousand. The dense model gives these nearly all of the probability. Logits of the others
would take most of the time of steps on the last blocks, and memory that no block needs, and change little: both models'
predictions are compared given that the next token is on the shortlist. Measurements use the whole vocabulary.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.placement import fully_shard_params

_BY_ROOT = 40
"""Tokens on the shortlist by the square root of the tokens of the text. English text of 30 720, 61 440 and 245 760
tokens holds 37, 41 and 41 times the root, counted with the tokenizer of SmolLM2."""

_MULTIPLE = 1024
"""The length is a multiple of this number, so that the shortlist can be divided among devices."""


def length_of(vocabulary: int, tokens: int) -> int:
    """Returns the number of tokens on the shortlist of a text; all of the vocabulary if that is small.

    Args:
        vocabulary: Size of the vocabulary, v.
        tokens: Number of tokens of the text.
    """
    return min(vocabulary, math.ceil(_BY_ROOT * tokens**0.5 / _MULTIPLE) * _MULTIPLE)


def most_frequent(tokens: np.ndarray, vocabulary: int) -> np.ndarray | None:
    """Returns the ids on the shortlist of a text in ascending order, [s]; None if they are the whole vocabulary.

    Where the text holds fewer different tokens, others fill it up; where it holds more, the rarest are left out.

    Args:
        tokens: Token ids of the text.
        vocabulary: Size of the vocabulary, v.
    """
    length = length_of(vocabulary, tokens.size)
    if length == vocabulary:
        return None
    counts = np.bincount(tokens.reshape(-1), minlength=vocabulary)
    return np.sort(np.argsort(-counts, kind="stable")[:length]).astype(np.int32)


def places(shortlist: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the place of each token on the shortlist, and whether it is there; the place of others is meaningless."""
    found = np.minimum(np.searchsorted(shortlist, tokens), len(shortlist) - 1).astype(np.int32)
    return found, shortlist[found] == tokens


def shortened(config: DecoderConfig, length: int) -> DecoderConfig:
    """Returns the config of a decoder that predicts the tokens on a shortlist alone."""
    return dataclasses.replace(config, vocabulary=length)


@functools.partial(jax.jit, static_argnames="config")
def shortened_head(config: DecoderConfig, outer: Params, shortlist: jax.Array) -> Params:
    """Returns what turns a stream into the logits of the shortlist, sharded as by ``fully_shard_params``.

    Args:
        config: The decoder.
        outer: Its weights outside the blocks, the parts "embed" and "head" of the tree.
        shortlist: [s] token ids.
    """
    if config.tied:
        few = {"embed": {"tokens": outer["embed"]["tokens"][shortlist]}, "head": outer["head"]}
    else:
        few = {"head": outer["head"] | {"weight": outer["head"]["weight"][shortlist]}}
    return fully_shard_params(config, few)
