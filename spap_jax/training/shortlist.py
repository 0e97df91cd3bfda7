"""The shortlist: the part of a vocabulary that joint steps compute the logits of.

Text of N tokens holds about 40 sqrt(N) different ones, which grows far more slowly than the text and is a small part of
a vocabulary of a hundred thousand. Logits of all would take most of the time of steps on the last blocks, and memory
that no block needs. So the shortlist holds the most frequent tokens of the text and a random sample of the others. Each
of the sample stands for several: the logarithm of their number is added to its logit, so that the sums in both models'
softmax keep their expectation (importance sampling; Bengio and Senecal, 2003). Without the sample nothing would keep
down what the pruned model gives to the others. Measurements use the whole vocabulary, at some of the tokens.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from spap_jax.models import DecoderConfig, Params
from spap_jax.parallel.placement import fully_shard_params

_BY_ROOT = 40
"""Frequent tokens by the square root of the tokens of the text. English text of 30 720, 61 440 and 245 760 tokens holds
37, 41 and 41 times the root, counted with the tokenizer of SmolLM2."""

_MULTIPLE = 1024
"""The number of frequent tokens is a multiple of this number, so that the shortlist can be divided among devices."""

_SAMPLE = 4096
"""Number of the others; "The whole model" in ``docs/method.md`` has what none, 1024 and 3072 gain."""


class Shortlist(NamedTuple):
    """The tokens whose logits are computed.

    Attributes:
        ids: int32 [s] their ids, ascending.
        others: float32 [s] logarithm of the number of tokens that each stands for: 0 for the frequent ones.
    """

    ids: np.ndarray
    others: np.ndarray

    def places(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the place of each token among the ids, and whether it is one of the frequent tokens there.

        The place of any other token is meaningless.
        """
        found = np.minimum(np.searchsorted(self.ids, tokens), len(self.ids) - 1).astype(np.int32)
        return found, (self.ids[found] == tokens) & (self.others[found] == 0)


def length_of(vocabulary: int, tokens: int) -> int:
    """Returns the length of the shortlist of a text, s; that of the vocabulary if this is small.

    Args:
        vocabulary: Size of the vocabulary, v.
        tokens: Number of tokens of the text.
    """
    return min(vocabulary, math.ceil(_BY_ROOT * tokens**0.5 / _MULTIPLE) * _MULTIPLE + _SAMPLE)


def shortlist_of(tokens: np.ndarray, vocabulary: int, seed: int) -> Shortlist | None:
    """Returns the shortlist of a text; None if that is the whole vocabulary.

    Where the text holds more different tokens than the list has room for, the rarest are among the others.

    Args:
        tokens: Token ids of the text.
        vocabulary: Size of the vocabulary, v.
        seed: Seed of the sample.
    """
    length = length_of(vocabulary, tokens.size)
    if length == vocabulary:
        return None
    counts = np.bincount(tokens.reshape(-1), minlength=vocabulary)
    by_count = np.argsort(-counts, kind="stable")
    frequent, rest = np.split(by_count, [length - _SAMPLE])
    sample = np.random.default_rng(seed).choice(rest, _SAMPLE, replace=False)
    ids = np.concatenate([frequent, sample])
    others = np.repeat([0, math.log(len(rest) / _SAMPLE)], [len(frequent), _SAMPLE])
    order = np.argsort(ids)
    return Shortlist(ids[order].astype(np.int32), others[order].astype(np.float32))


def shortened(config: DecoderConfig, length: int) -> DecoderConfig:
    """Returns the config of a decoder whose vocabulary is a shortlist."""
    return dataclasses.replace(config, vocabulary=length)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def shortened_head(config: DecoderConfig, outer: Params, ids: jax.Array, dtype: str) -> Params:
    """Returns what turns a stream into the logits of the shortlist, sharded as by ``fully_shard_params``.

    Args:
        config: The decoder.
        outer: Its weights outside the blocks, the parts "embed" and "head" of the tree.
        ids: [s] the ids on the shortlist.
        dtype: Data type of their rows: that of the steps, none of which has to convert them.
    """
    rows = (outer["embed"]["tokens"] if config.tied else outer["head"]["weight"])[ids].astype(dtype)
    few: Params = {"embed": {"tokens": rows}} if config.tied else {}
    head = outer["head"] if config.tied else outer["head"] | {"weight": rows}
    return fully_shard_params(config, few | {"head": head})
