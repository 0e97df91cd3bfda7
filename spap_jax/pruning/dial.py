"""The dial: which blocks, heads and how many channels are removed so that a model reaches a size or a speed.

Blocks are ordered by what the predictions lose without them, each measured on the model without those before it. Then
the least divergence decides how many go, and how many key/value heads: for each number, the channels make up the rest,
and the model is pruned and refitted on a part of the text ("Depth, heads and width" in ``docs/method.md``).
"""

import heapq
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from spap_jax.data.tokens import TokenBlocks, ids_of
from spap_jax.errors import UserError, option
from spap_jax.models import FAMILIES, DecoderConfig, Params, cost
from spap_jax.parallel.placement import shard_params
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning.predictions import divergence_of_blocks, stacked_blocks, start
from spap_jax.pruning.prune import MemoryStore, prune
from spap_jax.pruning.run import Dense, multiple_of, pruned_config, resolve, undivided
from spap_jax.report.schema import Check, GenerationWorkload
from spap_jax.settings import PruneSettings

DECIDED = ("sparsity", "drop_blocks", "attention_sparsity")
"""The settings that the dial decides."""

_MOST_DROPPED = 0.5
"""Largest fraction of the blocks that are dropped."""

_LEAST_WIDTH = 0.1
"""Least fraction of the channels that a shape keeps."""

_TOKENS, _PER_CHANNEL = 16384, 4
"""Least number of tokens on which a shape is tried, and of tokens for each channel of a dense layer."""

_JUDGED = 2048
"""Number of tokens on which the predictions without a block are measured."""

_WORSE = 2
"""Number of shapes in a row, each with fewer blocks, that are worse than the best one when their search ends."""

_CLEAR = 0.05
"""Lead, relative to the best divergence so far, that fewer blocks or heads need; smaller ones fail on other text."""

_WORK = GenerationWorkload()

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


class Target(NamedTuple):
    """What a pruned model may cost at most.

    Attributes:
        limit: The cost that it may have.
        cost: Computes the cost of a model from its config.
    """

    limit: float
    cost: Callable[[DecoderConfig], float]


def target_of(config: DecoderConfig, text: str, weight_bytes: float) -> Target:
    """Reads a target: 0.8, params=100M, bytes=200MB, speed=1.3x, or speed=1.3x@prefill.

    Speed is by the arithmetic of ``spap bench``: the bytes that a decoding step reads at batch 1, or the operations of
    the prompt. ``weight_bytes`` are those of a weight of the output.

    Raises:
        UserError: the target cannot be read, or the dense model reaches it.
    """
    family = FAMILIES[config.family]

    def parameters(config: DecoderConfig) -> float:
        return cost.parameters(family, config).total

    def operations(config: DecoderConfig) -> float:
        return cost.prefill_operations(family, config, 1, _WORK.prompt)

    def bytes_read(config: DecoderConfig) -> float:
        sizes = round(weight_bytes), round(weight_bytes)
        return cost.decode_bytes(family, config, 1, _WORK.prompt + _WORK.new, *sizes)

    found = re.fullmatch(r"(?:(params|bytes|speed)=)?([\d.]+)([KMGBT]?)B?(x(?:@(prefill|decode))?)?", text)
    try:
        kind, number, unit, times, phase = found.groups() if found else (None, "", "", None, None)
        value = float(number) * _UNITS[unit]
    except ValueError:
        kind, value, unit, times, phase = None, 0.0, "", None, None
    if kind == "speed" and times and value > 1 and not unit:
        speed = operations if phase == "prefill" else bytes_read
        target = Target(speed(config) / value, speed)
    elif kind == "params" and not times and value > 0:
        target = Target(value, parameters)
    elif kind == "bytes" and not times and value > 0:
        target = Target(value, lambda config: parameters(config) * weight_bytes)
    elif kind is None and not (times or unit) and 0 < value < 1:
        target = Target(value * parameters(config), parameters)
    else:
        raise UserError(
            f"{option('target', text)} cannot be read: give the share of the parameters that stay (0.8), params=100M, "
            "bytes=200MB, speed=1.3x (of decoding) or speed=1.3x@prefill."
        )
    if target.cost(config) <= target.limit:
        raise UserError(f"{option('target', text)} asks for no less than the dense model is: nothing is to be removed.")
    return target


def reached(config: DecoderConfig, settings: PruneSettings, weight_bytes: float) -> Iterator[PruneSettings]:
    """Yields settings that reach the target with the fewest dropped blocks, then with one more each.

    Which blocks go is not decided: the first ones after block 0 stand for them. Without a target, yields the settings.

    Raises:
        UserError: nothing reaches the target, or what the target decides is given too.
    """
    if settings.target is None:
        yield settings
        return
    if settings.sparsity is not None or settings.drop_blocks:
        given = " and ".join(map(option, ("sparsity", "drop_blocks")))
        raise UserError(f"{option('target')} finds the blocks and the sparsity itself: leave out {given}.")
    target = target_of(config, settings.target, weight_bytes)
    found = False
    for count in range(max(1, round(config.layers * _MOST_DROPPED))):
        shape = _widest(config, settings.replace(drop_blocks=range(1, 1 + count)), target)
        if shape is not None:
            yield shape
            found = True
            if not shape.sparsity:
                return  # blocks alone reach it
    if not found:
        more = ""
        with suppress(UserError):  # of families that keep all heads
            FAMILIES[config.family].check_heads(config, 1)
            more = f", or remove attention heads too ({option('attention_sparsity')})"
        raise UserError(
            f"{option('target', settings.target)} cannot be reached with half of the blocks and a tenth of their "
            f"channels: ask for a larger or a slower model{more}."
        )


def _widest(config: DecoderConfig, settings: PruneSettings, target: Target) -> PruneSettings | None:
    """Returns the settings with the least sparsity that reaches the target; None if none does."""
    multiple, whole = multiple_of(settings, config.intermediate), config.intermediate
    removing = settings.drop_blocks or settings.attention_sparsity
    widths = [*([whole] if removing else []), *range(multiple, whole, multiple)[::-1]]
    shapes = (settings.replace(sparsity=1 - width / whole) for width in widths if width >= _LEAST_WIDTH * whole)
    return next((shape for shape in shapes if target.cost(pruned_config(config, shape)) <= target.limit), None)


def decide(
    dense: Dense, tokens: Any, settings: PruneSettings, weight_bytes: float, say: Callable[[str], None] = lambda _: None
) -> PruneSettings:
    """Returns the settings with the blocks that are dropped and the sparsities which reach the target best.

    Without a target, these are the settings themselves. All dense blocks are in memory meanwhile.

    Args:
        tokens: Calibration sequences, as for `run.resolve`.
        say: Called with a sentence about each shape that was tried.

    Raises:
        UserError: nothing reaches the target.
    """
    if settings.target is None:
        return settings

    def loss_of(shape: PruneSettings) -> float:
        loss = _divergence(dense, tokens, shape)
        say(f"{_words(dense.config, shape)}: divergence {loss:.3f} before joint steps")
        return loss

    order, gone = dropped_first(dense, tokens, settings), list[int]()
    best, least, worse = settings, np.inf, 0
    for shape in reached(dense.config, settings, weight_bytes):
        gone += itertools.islice(order, len(shape.drop_blocks) - len(gone))
        tried = shape.replace(drop_blocks=sorted(gone))
        loss = loss_of(tried)
        worse = 0 if loss < least else worse + 1
        if loss < (1 - _CLEAR) * least:
            best, least = tried, loss
        if worse == _WORSE:
            break
    for shape in _fewer_heads(dense.config, best, weight_bytes):
        loss = loss_of(shape)
        if loss >= (1 - _CLEAR) * least:
            break
        best, least = shape, loss
    say(f"chosen: {_words(dense.config, best)}")
    return best


def _fewer_heads(config: DecoderConfig, settings: PruneSettings, weight_bytes: float) -> Iterator[PruneSettings]:
    """Yields shapes with the same blocks that reach the target with fewer and fewer heads that servers can divide."""
    assert settings.target
    target = target_of(config, settings.target, weight_bytes)
    for heads in range(pruned_config(config, settings).kv_heads - 1, 0, -1):
        fewer = settings.replace(attention_sparsity=1 - heads / config.kv_heads)
        try:
            shape = None if undivided(config.kv_heads, heads) else _widest(config, fewer, target)
        except UserError:
            shape = None  # the family's loaders accept no such number
        if shape is not None:
            yield shape


def _words(config: DecoderConfig, settings: PruneSettings) -> str:
    """Says what stays: "28 of 30 blocks (without 17, 20), 2 of 3 key/value heads, 1280 of 1536 channels"."""
    pruned, dropped = pruned_config(config, settings), ", ".join(map(str, settings.drop_blocks))
    blocks = f"{pruned.layers} of {config.layers} blocks" + (f" (without {dropped})" if dropped else "")
    heads = f"{pruned.kv_heads} of {config.kv_heads} key/value heads, " if settings.attention_sparsity else ""
    return f"{blocks}, {heads}{pruned.intermediate} of {config.intermediate} channels"


def _divergence(dense: Dense, tokens: Any, settings: PruneSettings) -> float:
    """Prunes to a shape on a part of the text, without rounds and joint steps, and measures the predictions."""
    length = ids_of(tokens).shape[1]
    part = _part(tokens, -(-max(_TOKENS, _PER_CHANNEL * dense.config.intermediate) // length))
    quick = settings.replace(rounds=0, joint_passes=0, held_out=0.25, allocation="uniform")
    run = resolve(dense.config, part, quick)
    last = prune(run, dense, _Discarding(run.pruned))[-1]
    assert isinstance(last, Check)
    return last.held_out


class _Discarding(MemoryStore):
    """Keeps nothing."""

    def replace(self, index: int, layer: Params) -> None:
        """Keeps nothing."""


def _part(tokens: Any, count: int) -> Any:
    """Returns the first sequences, without the further ones."""
    if not isinstance(tokens, TokenBlocks):
        return tokens[:count]
    mask = None if tokens.mask is None else tokens.mask[:count]
    return replace(tokens, tokens=tokens.tokens[:count], mask=mask, further=None)


def dropped_first(dense: Dense, tokens: Any, settings: PruneSettings) -> Iterator[int]:
    """Yields blocks in the order in which they go, each the one without which the predictions lose least.

    A block loses more, the more others are gone. So only those are measured again that could still be the next.
    """
    config = dense.config
    ids = ids_of(tokens)[-max(1, _JUDGED // ids_of(tokens).shape[1]) :]
    judged = chunked(ids, max(1, settings.batch_tokens // ids.shape[1]))
    outer, blocks = shard_params(config, dense.outer), stacked_blocks(dense)
    compared = start(config, outer, blocks, judged)

    def loss(gone: list[int]) -> float:
        stays = jnp.ones(config.layers, bool).at[jnp.array(gone)].set(False)
        return float(divergence_of_blocks(config, outer, blocks, stays, compared))

    gone: list[int] = []
    waiting = [(loss([index]), index, 0) for index in range(1, config.layers - 1)]
    heapq.heapify(waiting)
    while waiting:
        _, index, measured = heapq.heappop(waiting)
        if measured == len(gone):
            gone.append(index)
            yield index
        else:
            heapq.heappush(waiting, (loss([*gone, index]), index, len(gone)))
