"""The parallel schedule: channels are selected on the dense stream, for several layers at a time.

No selection changes the dense stream, so layers are independent. They are processed in waves, one layer for each group
of devices that share the weights, which is a single device if none do. All devices accumulate the second moments of one
layer after the other, and each keeps some rows of all of them. Then they exchange these, so that each group has all
rows of its own layer, and solves that. A device never holds more than its share of the moments of two layers, however
many layers there are. Since the moments do not depend on the sparsity, runs that differ in nothing else share them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spap_jax.checkpoint.ahead import blocks_in_order
from spap_jax.models import DecoderConfig, Params
from spap_jax.numerics import full_precision
from spap_jax.parallel import collectives, mesh
from spap_jax.pruning import moments, streams
from spap_jax.pruning.layer import Choice, PhaseClock, choice_key, choose_channels, search_of
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.streams import Streams

if TYPE_CHECKING:
    from spap_jax.pruning.run import Run


class Choices:
    """The selections of one run, or of consecutive runs that differ only in the number of channels they keep."""

    def __init__(self, keeps: Iterable[int]) -> None:
        """Prepares for runs that keep these numbers of channels, in this order."""
        self._keeps = list(dict.fromkeys(keeps))
        self._made: dict[tuple[range, int], list[Choice]] = {}

    def of(self, layers: range, run: "Run", fitted: Streams, clock: PhaseClock) -> list[Choice]:
        """Selects the channels of consecutive layers; the first run's call also makes the selections of later runs.

        Args:
            layers: Numbers of the layers, at most as many as there are groups of devices.
            run: The run; the number of channels that it keeps is one of those passed to the constructor.
            fitted: The streams before the first of these layers, of which the dense one is used.
            clock: Records the time by phase.
        """
        keep = run.narrow.intermediate
        if (layers, keep) not in self._made:
            own = own_moments(layers, run.config, run.read_layer, fitted, clock)
            key, search = jax.random.key(run.settings.seed), search_of(run.settings)
            for each in self._keeps[self._keeps.index(keep) :]:
                chosen = own_choices(own, run.config, key, layers.start, each, **search)
                self._made[layers, each] = [jax.tree.map(lambda a, i=i: a[i], chosen) for i in range(len(layers))]
            clock.lap("selection", self._made[layers, keep])
        return self._made[layers, keep]


def own_moments(
    layers: range, config: DecoderConfig, read_layer: Callable[[int], Params], fitted: Streams, clock: PhaseClock
) -> Moments:
    """Accumulates each layer's moments on its own group of devices, [groups, ...]; spare ones get the last layer's.

    Args:
        layers: Numbers of the layers, as in ``Choices.of``.
        config: The dense decoder.
        read_layer: Returns the parameters of a dense block by its number.
        fitted: The streams before the first of the layers, of which the dense one is used.
        clock: Records the time by phase.
    """
    # Copies, since the stream is updated in place, and the run goes on from the original.
    dense, counted = jax.tree.map(jnp.copy, (fitted.dense, fitted.weights))
    stream = streams.both_at(config, dense, counted)
    kept = seen = layer = None
    for index, layer in blocks_in_order(config, read_layer, layers):
        alike = config.reaching_like(index)
        clock.lap("reading", layer)
        stream = streams.enter_dense_mlp(alike, layer, stream)
        clock.lap("streams", stream)
        seen = moments.accumulate(alike, layer, streams.fitting_tokens(stream))
        kept = _keep(kept, seen, index - layers.start)
        clock.lap("statistics", kept)
        stream = streams.leave_dense_mlp(config, layer, stream)
        clock.lap("streams", stream)
    assert seen is not None
    for spare in range(len(layers), mesh.data_size()):
        kept = _keep(kept, seen, spare)
    del stream, dense, counted, layer, seen  # their memory is needed
    arrays, structure = jax.tree.flatten(kept)
    del kept
    own = jax.tree.unflatten(structure, [_exchange(arrays.pop(0), config.intermediate) for _ in range(len(arrays))])
    clock.lap("statistics", own)
    return own


@functools.partial(jax.jit, donate_argnames="kept")
def _keep(kept: Moments | None, seen: Moments, group: int) -> Moments:
    return collectives.keep_for_group(kept, seen, group)


_exchange = jax.jit(collectives.exchange, static_argnames="rows")


@functools.partial(jax.jit, static_argnames=("config", "keep", "method", "steps", "rounds"))
@full_precision
def own_choices(own: Moments, config: DecoderConfig, key: jax.Array, first: int, keep: int, **search: Any) -> Choice:
    """Selects, in every group of devices, the channels of its own layer, [groups, ...].

    Args:
        own: [groups, ...] moments.
        config: The dense decoder.
        key: Random key of the run.
        first: Number of the first group's layer.
        keep: Number of channels to keep, k.
        search: Keyword arguments of ``choose_channels``.
    """

    def one(seen: Moments, number: jax.Array, key: jax.Array, first: jax.Array) -> Choice:
        return choose_channels(seen, choice_key(key, config, first + number), keep, **search)

    return collectives.map_over_groups(one, own, key, first)
