"""The parallel schedule: channels chosen on the dense stream, of as many layers at a time as there are devices.

No choice changes the dense stream, so layers need not wait for each other. They come in waves, a layer for each device:
all devices accumulate the second moments of one layer after the other, a layer's own device keeps them, and then each
device solves its own layer. No device ever holds the moments of more than two layers, however many layers there are,
and all that the devices tell each other is what they chose. Nor do the moments depend on the sparsity: runs that differ
in nothing else share them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from spap_jax import devices
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import full_precision
from spap_jax.placement import placed
from spap_jax.pruning import moments, streams
from spap_jax.pruning.layer import Choice, Clock, choice_key, search_of, select
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.streams import Streams
from spap_jax.settings import PruneSettings


class Choices:
    """The choices of one run, or of several in a row that differ in how many channels they keep and in nothing else."""

    def __init__(self, keeps: Iterable[int]) -> None:
        """For runs that keep so many channels, in the order in which they come."""
        self._keeps = list(dict.fromkeys(keeps))
        self._made: dict[tuple[range, int], list[Choice]] = {}

    def of(
        self,
        layers: range,
        config: DecoderConfig,
        keep: int,
        read_layer: Callable[[int], Params],
        dense: jax.Array,
        settings: PruneSettings,
        clock: Clock,
    ) -> list[Choice]:
        """The channels of consecutive layers; the first run that asks waits for those of the later ones too.

        Args:
            layers: Their numbers, at most as many as there are devices.
            config: The dense decoder.
            keep: How many channels to keep, k; one of those announced.
            read_layer: Gives the parameters of a dense block by its number.
            dense: [C, B, T, d] the dense stream before the first of them.
            settings: How.
            clock: Where time is counted.
        """
        if (layers, keep) not in self._made:
            own = own_moments(layers, config, read_layer, dense, clock)
            key, search = jax.random.key(settings.seed), search_of(settings)
            for each in self._keeps[self._keeps.index(keep) :]:
                chosen = own_choices(own, config, key, layers.start, each, **search)
                self._made[layers, each] = [jax.tree.map(lambda a, i=i: a[i], chosen) for i in range(len(layers))]
            clock.lap("selection", self._made[layers, keep])
        return self._made[layers, keep]


def own_moments(
    layers: range, config: DecoderConfig, read_layer: Callable[[int], Params], dense: jax.Array, clock: Clock
) -> Moments:
    """Moments of each layer, [devices, ...], on its own device; devices that are left over have the last layer's.

    Args:
        layers: As ``Choices.of`` takes them, like the others.
        config: The dense decoder.
        read_layer: Gives the parameters of a dense block by its number.
        dense: [C, B, T, d] the dense stream before the first of the layers.
        clock: Where time is counted.
    """
    stream, own = Streams(jnp.copy(dense), jnp.copy(dense)), None
    for place, index in enumerate(layers):
        layer = placed(config, read_layer(index))
        clock.lap("reading", layer)
        stream = streams.enter_dense_mlp(config, layer, stream)
        clock.lap("streams", stream)
        own = _give(own, moments.accumulate(config, layer, streams.fitting_tokens(stream)), place)
        clock.lap("statistics", own)
        stream = streams.leave_dense_mlp(config, layer, stream)
        clock.lap("streams", stream)
    assert own is not None
    return own


@functools.partial(jax.jit, donate_argnames="own")
def _give(own: Moments | None, seen: Moments, place: int) -> Moments:
    return devices.give(own, seen, place)


@functools.partial(jax.jit, static_argnames=("config", "keep", "method", "steps", "rounds"))
@full_precision
def own_choices(own: Moments, config: DecoderConfig, key: jax.Array, first: int, keep: int, **search: Any) -> Choice:
    """Every device's choice for its own layer, [devices, ...].

    Args:
        own: [devices, ...] moments.
        config: The dense decoder.
        key: Randomness of the run.
        first: Number of the first device's layer.
        keep: How many channels to keep, k.
        search: As ``select`` takes it.
    """

    def one(seen: Moments, number: jax.Array, key: jax.Array, first: jax.Array) -> Choice:
        return select(seen, choice_key(key, config, first + number), keep, **search)[1]

    return devices.each(one, own, key, first)
