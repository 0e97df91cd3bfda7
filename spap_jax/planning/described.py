"""The arrays of a run, described by shape, data type and sharding, so that programs can be lowered without values.

The shardings are those of the mesh around, as everywhere in ``devices.py``.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding, get_abstract_mesh, get_mesh

from spap_jax.models import FAMILIES, DecoderConfig, Params, decoder
from spap_jax.numerics import storage
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import fully_sharded_spec, param_spec
from spap_jax.planning.workload import Chunks, Workload
from spap_jax.pruning import reduce
from spap_jax.pruning.layer import Choice
from spap_jax.pruning.moments import Moments
from spap_jax.pruning.streams import Streams
from spap_jax.solver.alternating import Weights
from spap_jax.solver.problem import Problem
from spap_jax.solver.swap import Polished

REPLICATED = PartitionSpec()
"""The spec of arrays that every device holds."""


class Arrays:
    """Describes the arrays of a run.

    Attributes:
        load: The run.
        dtype: Data type of stored weights.
    """

    def __init__(self, load: Workload, device: Any = None):
        """Describes the arrays of a run on the mesh around, or on one device.

        Args:
            load: The run.
            device: The device of a run without a mesh. By default that of the programs' platform.
        """
        self.load, self._device = load, device
        self.dtype = {4: jnp.float32, 2: jnp.bfloat16}[load.weight_bytes]

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.float32, spec: PartitionSpec = REPLICATED) -> Any:
        """Describes one array."""
        if mesh.mesh_size() > 1:
            around = get_abstract_mesh() if get_mesh().empty else get_mesh()
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(around, spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._device and SingleDeviceSharding(self._device))

    def replicated(self, tree: Any) -> Any:
        """Describes arrays of which only the shapes are given, as held by every device."""
        return jax.tree.map(lambda a: self.array(a.shape, a.dtype), tree)

    def cast(self, tree: Any, dtype: Any = jnp.float32) -> Any:
        """Describes the same arrays in another data type."""
        return jax.tree.map(lambda a: self.array(a.shape, dtype, spec_in(a)), tree)

    @functools.cached_property
    def key(self) -> Any:
        """A random key."""
        return self.replicated(jax.eval_shape(lambda: jax.random.key(0)))

    def parameters(self, config: DecoderConfig, spec: Any = param_spec) -> Params:
        """Describes the parameter tree of a decoder, by default as ``placement.shard_params`` shards it."""
        return self.laid_out(config, decoder.shapes(config), self.dtype, spec)

    def laid_out(self, config: DecoderConfig, shapes: Params, dtype: Any, spec: Any = fully_sharded_spec) -> Params:
        """Describes parameters of which only the shapes are given, by default as ``placement.fully_shard_params``."""
        family = FAMILIES[config.family]
        return decoder.map_named(lambda name, a: self.array(a.shape, dtype, spec(family, name, a.shape)), shapes)

    def block(self, config: DecoderConfig) -> Params:
        """Describes the parameters of one block."""
        return jax.tree.map(
            lambda a: self.array(a.shape[1:], a.dtype, PartitionSpec(*spec_in(a)[1:])),
            self.parameters(config)["layers"],
        )

    @functools.cached_property
    def blocks(self) -> Params:
        """The pruned blocks, stacked, which joint steps change."""
        return self.parameters(self.load.tail, fully_sharded_spec)["layers"]

    @functools.cached_property
    def weights(self) -> Weights:
        """The weights of a pruned MLP, as the solver changes them."""
        narrow = jax.eval_shape(reduce.to_weights, self.block(self.load.narrow)["mlp"])
        like: dict[str, Any] = {path: spec_in(a) for path, a in self.block(self.load.narrow)["mlp"].items()}
        specs = Weights({name: like[name] for name in narrow.inner}, like["down"], like.get("down_bias"))
        return jax.tree.map(lambda a, spec: self.array(a.shape, spec=spec), narrow, specs)

    def tokens(self, chunks: Chunks) -> Any:
        """Describes the token ids [C, B, T] of some sequences."""
        return self.array((chunks.count, chunks.sequences, chunks.length), jnp.int32, _along_data(chunks))

    def streams(self, chunks: Chunks) -> Streams:
        """Describes the streams of some sequences; see ``streams.both_at``."""
        load, shape = self.load, (chunks.count, chunks.sequences, chunks.length)
        stream = self.array((*shape, load.dense.width), storage(load.settings.stream_dtype), _along_data(chunks))
        normed, padded = "output" in load.dense.norms, chunks.count * chunks.sequences > chunks.real
        weights = self.array(shape, spec=_along_data(chunks)) if normed or padded else None
        return Streams(stream, stream, stream if normed else None, weights)

    @functools.cached_property
    def fitted(self) -> Streams:
        """The streams of the sequences to fit."""
        return self.streams(self.load.fitted)

    @functools.cached_property
    def held_out(self) -> Streams:
        """The streams of the held-out sequences."""
        return self.streams(self.load.held_out)

    @functools.cached_property
    def kept(self) -> Any:
        """A stream of the fitted sequences, as joint steps read it."""
        return self.cast(self.fitted.dense, storage("bfloat16"))

    @functools.cached_property
    def choice(self) -> Choice:
        """The channels of a layer that are kept."""
        f, k, number = self.load.dense.intermediate, self.load.narrow.intermediate, self.array((), jnp.int32)
        return Choice(Polished(self.array((k,), jnp.int32), number, number), self.array(()), self.array((f,)))

    def moments(self, f: int) -> Moments:
        """Describes the second moments of f channels; ``mesh.shard_rows`` shards the rows of the matrices."""
        d, rows = self.load.dense.width, PartitionSpec(mesh.row_axes(f) or None)
        gram, cross = self.array((f, f), spec=rows), self.array((f, d), spec=rows)
        problem = Problem(gram, cross, self.array(()), cross)
        return Moments(problem, self.array((f,)), self.array((d,)), self.array((f,)))


def spec_in(a: Any) -> PartitionSpec:
    """Returns the spec of a described array."""
    return a.sharding.spec if isinstance(a.sharding, NamedSharding) else REPLICATED


def bytes_here(tree: Any) -> int:
    """Returns the bytes that one device holds of described arrays; random keys are not counted."""
    found = [a for a in jax.tree.leaves(tree) if isinstance(a, jax.ShapeDtypeStruct)]
    arrays = [a for a in found if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]
    shapes = [a.sharding.shard_shape(a.shape) if a.sharding else a.shape for a in arrays]
    return sum(math.prod(shape) * np.dtype(a.dtype).itemsize for shape, a in zip(shapes, arrays, strict=True))


def _along_data(chunks: Chunks) -> PartitionSpec:
    return mesh.DATA_SPEC if chunks.divided else REPLICATED
