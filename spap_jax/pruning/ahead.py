"""The parallel schedule: the channels of several layers are chosen at once, on the dense stream.

No choice changes the dense stream, so layers are independent: one program chooses for several, and the devices along
``data`` share the layers. On a single accelerator the small steps of one layer leave it idle.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spap_jax.backend import platform
from spap_jax.numerics import full_precision
from spap_jax.parallel import mesh
from spap_jax.parallel.program import program
from spap_jax.pruning import layer, moments, streams
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.run import Dense, Run
from spap_jax.solver.methods import Choice

_TOGETHER = 4
"""Number of layers that a single accelerator chooses for at once."""


class Ahead:
    """The choices of a run with the parallel schedule, made for a batch of layers when the first is asked for."""

    def __init__(self, run: Run, dense: Dense) -> None:
        """Computes nothing yet."""
        self._run, self._dense, self._made = run, dense, dict[int, Choice]()

    def choice(self, index: int, fitted: streams.Streams, lap: Callable[[str, object], None]) -> Choice | None:
        """Returns the choice for a layer, in the order of the layers; None in the sequential schedule.

        Args:
            fitted: The streams before the layer, of the fitted sequences.
        """
        if self._run.settings.schedule == "sequential":
            return None
        if index not in self._made:
            size = max(mesh.data_size(), 1 if platform() == "cpu" else _TOGETHER)
            batch = range(index, min(index + size, self._run.config.layers))
            seen = self._moments(batch, fitted)
            lap("statistics", seen)
            keys = [self._run.key("choice", number) for number in batch]
            chosen = _choose(seen, keys, self._run.pruned.intermediate, self._run.settings.method, self._run.ridge)
            self._made = dict(zip(batch, chosen, strict=True))
            lap("selection", chosen)
        return self._made[index]

    def _moments(self, batch: range, fitted: streams.Streams) -> Moments:
        """Accumulates the moments [W, ...] of consecutive layers on the dense stream."""
        config = self._run.config
        stream = streams.both_at(config, fitted.dense, fitted.weights)
        seen = []
        for index, params in self._dense.blocks(batch):
            own = config.of_layer(index)
            stream = streams.enter_mlp(own, params, stream)
            seen.append(moments.accumulate(own, params, streams.fitting_tokens(stream)))
            stream = streams.leave_mlp(own, params, stream)
        return _stacked(seen)


@program
def _stacked(seen: list[Moments]) -> Moments:
    """Stacks the moments of layers [W, ...], whose axis W is divided along ``data``, if it can be."""
    return jax.tree.map(lambda *each: mesh.divide_along_data(jnp.stack(each)), *seen)


@program(static_argnames=("keep", "method"))
@full_precision
def _choose(seen: Moments, keys: list[jax.Array], keep: int, method: str, ridge: float) -> list[Choice]:
    """Chooses the channels of several layers, whose moments are [W, ...]."""
    with mesh.rows_undivided(True):  # the layers are
        chosen = jax.vmap(lambda own, key: layer.choose_channels(own, key, keep, method, ridge))(seen, jnp.stack(keys))
    chosen = jax.tree.map(mesh.constrain_replicated, chosen)
    return [jax.tree.map(lambda a, i=i: a[i], chosen) for i in range(len(keys))]
